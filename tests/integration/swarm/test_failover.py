"""Losing servers at any moment: the answer stays the same, and only what was lost is computed again."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swarm.client.blocks import BlockSession, SequenceInput
from swarm.client.connection import SwarmBlocks
from swarm.client.remote_model import SwarmModelForCausalLM
from swarm.client.session.driver import SessionDriver
from swarm.errors import DeadlineError, LengthLimitError, NoRouteError, PeerBusyError, SessionStateError
from swarm.kvcache.admission import AdmissionConfig
from swarm.pb import node_pb2
from swarm.pb import session_pb2 as pb
from swarm.server.node import Node
from swarm.server.rpc.sessions import SessionLimits
from swarm.wire.frames import Frame, decode_frame, encode_frame
from tests.at_token import AtToken
from tests.model_pair import GREEDY, prompt
from tests.raw_client import RawClient
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until
from tests.tampering_server import Edit, TamperingServer, edit_result
from tests.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

HIDDEN_SIZE = 32
PAGE_TOKENS = 16
BYTES_PER_TOKEN = 2 * 2 * 8 * 4
"""Of one block: keys and values of two heads of 8 numbers in fp32."""
THIRDS = ((0, 2), (2, 4), (4, 6))


class Doors:
    """Servers that can be killed, and a client's view of them."""

    def __init__(self, swarm: InProcessSwarm, spans: Sequence[tuple[int, int]]) -> None:
        self.swarm = swarm
        self.servers = [TamperingServer.of_span(swarm, start, end) for start, end in spans]

    def of(self, session: Any, index: int) -> TamperingServer:
        """The server of a session's hop."""
        (server,) = [server for server in self.servers if server.peer_id == session.route[index].peer_id]
        return server

    def add(self, start: int, end: int) -> TamperingServer:
        self.servers.append(TamperingServer.of_span(self.swarm, start, end))
        return self.servers[-1]


@contextmanager
def servers_of(llama: TinyLlama, *spans: tuple[int, int], grace_s: float = 5.0) -> Iterator[Doors]:
    """A swarm of such servers; at its end nothing of any session may be left on those that live."""
    with InProcessSwarm(llama.folder, [], limits=SessionLimits(detach_grace_s=grace_s)) as swarm:
        doors = Doors(swarm, spans)
        yield doors
        for client in swarm._clients:
            client.close()
        alive = [server.node for server in doors.servers if not server.is_dead]
        wait_until(lambda: all(map(is_idle, alive)), timeout_s=20.0)


def tokens_run(node: Node) -> int:
    """Tokens a server has computed since it started."""
    with RawClient(node.info) as raw:
        return raw.info().num_tokens_run


def rows(count: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(256, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))[:count].clone()


def append(session: BlockSession, count: int) -> torch.Tensor:
    """`count` more rows of sequence 0."""
    held = session.lengths[0] if session.lengths else 0
    hidden = rows(held + count)[held:]
    (output,) = session.step([SequenceInput(sequence=0, parent=0, start=held, hidden=hidden)])
    return output


def assert_right(llama: TinyLlama, output: torch.Tensor, length: int) -> None:
    """`output` are the last rows of those of the first `length`."""
    (expected,) = llama.blocks.run_stateless([rows(length)])
    assert (output - expected[-len(output) :]).abs().max() < 1e-4


def remote_model(doors: Doors, client: SwarmBlocks) -> Any:
    return SwarmModelForCausalLM.from_blocks(doors.swarm.source, client)


def avoided(client: SwarmBlocks) -> set[str]:
    return {peer.peer_id for peer in client.peer_health() if peer.avoided_for_s > 0}


# -- killed ------------------------------------------------------------------------------------------------


NUM_PROMPT, NUM_NEW = 12, 24
PAGE_END = PAGE_TOKENS - NUM_PROMPT


@pytest.mark.parametrize("token", [0, PAGE_END - 1, PAGE_END, PAGE_END + PAGE_TOKENS, NUM_NEW - 2])
def test_any_server_can_die_at_any_token(llama: TinyLlama, token: int) -> None:
    """First, last, at the edge of a page: the same tokens, and those after the lost one compute nothing again."""
    settings: dict[str, Any] = {"max_new_tokens": NUM_NEW, "eos_token_id": None, **GREEDY}
    expected = llama.local.generate(prompt(NUM_PROMPT), **settings)
    with servers_of(llama, *THIRDS, *THIRDS) as doors:
        client = doors.swarm.connect(ban_s=60.0)
        model = remote_model(doors, client)
        killed: set[str] = set()
        for index in range(3):
            with model.session(max_length=64) as session:
                before: dict[str, int] = {}

                def kill(session: Any = session, index: int = index, before: dict[str, int] = before) -> None:
                    before.update(
                        {hop.peer_id: tokens_run(doors.of(session, i).node) for i, hop in enumerate(session.route)}
                    )
                    server = doors.of(session, index)
                    killed.add(server.peer_id)
                    server.die()

                ids = model.generate(prompt(NUM_PROMPT), session=session, streamer=AtToken(token, kill), **settings)
                assert torch.equal(ids, expected)
                assert session.num_failovers == 1
                assert avoided(client) == killed, "the healthy are not avoided"
                num_left = NUM_NEW - 1 - token
                for position, hop in enumerate(session.route):
                    if position == index:
                        continue
                    again = tokens_run(doors.of(session, position).node) - before[hop.peer_id] - num_left
                    # Servers before the lost one get the log again. They nearly always find all but its last page in
                    # their memory, but make no promise of it.
                    most = NUM_PROMPT + token if position < index else 0
                    assert again <= most + 1, (index, position, again)


def test_two_of_three_die_at_once(llama: TinyLlama) -> None:
    """A power cut takes all machines of a house."""
    with servers_of(llama, *THIRDS, *THIRDS) as doors:
        for first, second in [(0, 1), (1, 2)]:
            session = doors.swarm.connect().open_session(max_length=64)
            append(session, 20)
            survivor = doors.of(session, 3 - first - second)
            for server in (doors.of(session, first), doors.of(session, second)):
                server.die()
                server.withdraw()
            assert_right(llama, append(session, 3), 23)
            assert doors.of(session, 3 - first - second) is survivor
            session.close()
            for span in (THIRDS[first], THIRDS[second]):
                doors.add(*span)


def test_the_replacement_dies_during_the_replay(llama: TinyLlama) -> None:
    """Misfortunes come together; each attempt begins from what is certain."""
    with servers_of(llama, (0, 2), (2, 4), (4, 6)) as doors:
        client = doors.swarm.connect(max_step_tokens=4)
        session = client.open_session(max_length=64)
        append(session, 30)
        last = doors.of(session, 2)
        num_run = tokens_run(last.node)
        spare = doors.add(2, 4)
        num_messages = 0

        def die_amid(method: str, body: bytes) -> bytes:
            nonlocal num_messages
            num_messages += method == "Push"
            if num_messages == 4:
                spare.die_soon()
                threading.Thread(target=doors.add, args=(2, 4)).start()
            return body

        spare.edit_request = die_amid
        doors.of(session, 1).die()
        assert_right(llama, append(session, 2), 32)
        assert spare.is_dead
        assert avoided(client) >= {spare.peer_id}
        assert tokens_run(last.node) == num_run + 2, "who was not touched by the replays has lost nothing"
        session.close()
        wait_until(lambda: len(doors.servers) == 5)


def test_a_part_of_a_wide_server_replaces_a_narrow_one(llama: TinyLlama) -> None:
    """Spans of those who survive stay as they are, whatever the newcomer could do besides."""
    with servers_of(llama, (0, 1), (1, 3), (3, 6)) as doors:
        session = doors.swarm.connect().open_session(max_length=64)
        append(session, 20)
        first, last = doors.of(session, 0), doors.of(session, 2)
        nums_run = [tokens_run(server.node) for server in (first, last)]
        doors.of(session, 1).die()
        wide = doors.add(0, 6)
        assert_right(llama, append(session, 1), 21)
        assert [(hop.start, hop.end) for hop in session.route] == [(0, 1), (1, 3), (3, 6)]
        assert [doors.of(session, index) for index in range(3)] == [first, wide, last]
        assert tokens_run(last.node) == nums_run[1] + 1
        session.close()


def test_a_survivor_that_alone_holds_the_lost_blocks_takes_them_too(llama: TinyLlama) -> None:
    """One server is one hop of a route: it then starts again with more blocks."""
    with servers_of(llama, (0, 3), (2, 6)) as doors:
        session = doors.swarm.connect().open_session(max_length=64)
        append(session, 20)
        doors.servers[0].die()
        doors.servers[0].withdraw()
        doors.add(0, 2)
        assert_right(llama, append(session, 1), 21)
        assert [(hop.start, hop.end) for hop in session.route] == [(0, 2), (2, 6)]
        session.close()


def test_a_gap_is_waited_for_as_long_as_the_request_may_take(llama: TinyLlama) -> None:
    """A new session gives up sooner; this one has something to lose."""
    with servers_of(llama, (0, 3), (3, 6)) as doors:
        client = doors.swarm.connect(no_route_wait_s=0.1, request_timeout_s=30.0)
        session = client.open_session(max_length=64)
        append(session, 20)
        num_run = tokens_run(doors.servers[1].node)
        doors.servers[0].die()
        doors.servers[0].withdraw()
        timer = threading.Timer(1.5, doors.add, (0, 3))
        timer.start()
        assert_right(llama, append(session, 1), 21)
        timer.join()
        assert tokens_run(doors.servers[1].node) == num_run + 1, "who waited kept everything"
        session.close()


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_gap_that_stays_is_named_in_time(llama: TinyLlama, is_announced: bool) -> None:
    """One clear error that names the blocks, also while a dead server's announcement stands; then all is usable."""
    with servers_of(llama, (0, 3), (3, 6)) as doors:
        client = doors.swarm.connect(request_timeout_s=2.0)
        session = client.open_session(max_length=64)
        append(session, 20)
        doors.servers[1].die()
        if not is_announced:
            doors.servers[1].withdraw()
        started_s = time.monotonic()
        with pytest.raises(NoRouteError, match=r"blocks 3-5 of .* --blocks 3:6") as raised:
            append(session, 1)
        assert time.monotonic() - started_s < 10.0
        assert raised.value.missing_blocks == (3, 4, 5)
        assert session.lengths == (20,)
        num_run = tokens_run(doors.servers[0].node)
        doors.add(3, 6)
        assert_right(llama, append(session, 1), 21)
        assert tokens_run(doors.servers[0].node) <= num_run + PAGE_TOKENS + 1
        session.close()


def test_the_deadline_names_what_ended_the_session_first(llama: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "The session is dead on this server" helps nobody who could have shortened the prompt."""
    num_runs = 0

    async def refuse(*_: Any, **__: Any) -> None:
        nonlocal num_runs
        num_runs += 1
        if num_runs == 1:
            raise PeerBusyError("the KV memory is too small")
        raise SessionStateError("the session is dead on this server")

    monkeypatch.setattr(SessionDriver, "_run", refuse)
    with servers_of(llama, (0, 6)) as doors:
        session = doors.swarm.connect(request_timeout_s=1.0).open_session(max_length=64)
        with pytest.raises(DeadlineError, match="within 1 s; last: the KV memory is too small"):
            append(session, 20)
        assert num_runs > 1
        session.close()


def add_small(swarm: InProcessSwarm, start: int, end: int, *, num_tokens: int = 64) -> Node:
    """A server whose KV memory holds few tokens of its blocks."""
    return swarm.add_server(start, end, kv_memory_bytes=num_tokens * BYTES_PER_TOKEN * (end - start))


def test_a_small_server_does_not_end_what_a_large_one_goes_on_with(
    llama: TinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large one has failed once, so the small one is asked, and refuses: that is not the end."""
    with InProcessSwarm(llama.folder, [], limits=SessionLimits(detach_grace_s=5.0)) as swarm:
        large = swarm.add_server(0, 6)
        session = swarm.connect(request_timeout_s=60.0, ban_s=5.0).open_session(max_length=200)
        append(session, 100)
        add_small(swarm, 0, 6)
        assert large._engine is not None
        backend = large._engine._backend
        real, num_failures = backend.run_steps, 0

        def fail_once(works: Any) -> Any:
            nonlocal num_failures
            num_failures += 1
            return [RuntimeError("a hiccup")] * len(works) if num_failures == 1 else real(works)

        monkeypatch.setattr(backend, "run_steps", fail_once)
        append(session, 1)
        assert num_failures > 1
        session.close()


@pytest.mark.parametrize("spans", [[(0, 6)], [(0, 3), (3, 6)]])
def test_what_never_fits_ends_at_once(llama: TinyLlama, spans: list[tuple[int, int]]) -> None:
    """Until the deadline nothing would change, and each attempt costs the server a whole prompt."""
    with InProcessSwarm(llama.folder, [], limits=SessionLimits(detach_grace_s=5.0)) as swarm:
        nodes = [swarm.add_server(*span) for span in spans[:-1]]
        nodes.append(add_small(swarm, *spans[-1]))
        client = swarm.connect(request_timeout_s=60.0, max_step_tokens=40)
        session = client.open_session(max_length=200)
        append(session, 20)
        started_s = time.monotonic()
        with pytest.raises(LengthLimitError, match=r"holds 64 tokens in all; use a shorter prompt or another server"):
            append(session, 100)
        assert time.monotonic() - started_s < 20.0
        # Pushed tensors come from others, so what is said of them is believed once the client has carried them.
        assert nodes[-1]._engine is not None and nodes[-1]._engine.counters.num_failed_steps == len(spans)
        held = session.lengths[0]
        assert held in (20, 60), "parts that went through all blocks are kept"
        assert_right(llama, append(session, 2), held + 2)
        assert all(peer.num_failures == 0 for peer in client.peer_health())
        session.close()
        wait_until(lambda: all(map(is_idle, nodes)))


def test_what_one_server_never_fits_another_takes(llama: TinyLlama) -> None:
    """However many are too small, as long as one is not; none of them has failed."""
    with InProcessSwarm(llama.folder, [], limits=SessionLimits(detach_grace_s=5.0)) as swarm:
        for _ in range(2):
            add_small(swarm, 0, 6)
        client = swarm.connect(ban_s=60.0)
        session = client.open_session(max_length=200)
        append(session, 20)
        large = [swarm.add_server(0, 3), swarm.add_server(3, 6)]
        assert_right(llama, append(session, 100), 120)
        assert [hop.peer_id for hop in session.route] == [node.info.peer_id for node in large]
        assert all(peer.num_failures == 0 for peer in client.peer_health())
        session.close()


def test_a_compressed_prompt_that_can_never_be_read_ends_at_once(llama: TinyLlama) -> None:
    """The server announces room for many more tokens, so the sentence says why these do not fit."""
    with InProcessSwarm(llama.folder, [], limits=SessionLimits(detach_grace_s=5.0), kv_policy="smallest") as swarm:
        node = add_small(swarm, 0, 6, num_tokens=128)
        assert node.info.kv_policy == "smallest"
        session = swarm.connect(request_timeout_s=60.0).open_session(max_length=256)
        with pytest.raises(
            LengthLimitError, match=r"until it has been read it stands uncompressed, and \d+ tokens fit"
        ):
            append(session, 130)
        assert node._engine is not None and node._engine.counters.num_failed_steps == 1
        append(session, 20)
        session.close()
        wait_until(lambda: is_idle(node))


def test_who_recovers_waits_in_the_queue_of_the_only_replacement(llama: TinyLlama) -> None:
    """Without holding on to places further on, or two who recover could wait for each other."""
    with servers_of(llama, (0, 3), (3, 6)) as doors:
        client = doors.swarm.connect()
        session, other = client.open_session(max_length=64), client.open_session(max_length=64)
        append(session, 20)
        full = SessionLimits(admission=AdmissionConfig(max_sessions=1), detach_grace_s=5.0)
        doors.servers[0].die()
        doors.servers[0].withdraw()
        doors.servers.append(TamperingServer.of_span(doors.swarm, 0, 3, limits=full))
        append(other, 20)
        outputs: list[torch.Tensor] = []
        waiting = threading.Thread(target=lambda: outputs.append(append(session, 1)))
        waiting.start()
        wait_until(lambda: session._driver.queue_position == 1)
        wait_until(lambda: doors.servers[1].node.info.num_sessions == 1)
        other.close()
        waiting.join(20.0)
        assert_right(llama, outputs[0], 21)
        session.close()


def _random_inputs(rng: random.Random, lengths: Sequence[int], num_sequences: int) -> list[SequenceInput]:
    inputs = []
    for sequence in rng.sample(range(num_sequences), rng.randint(1, num_sequences)):
        parent = rng.choice([sequence, rng.randrange(num_sequences)])
        held = lengths[parent] if parent < len(lengths) else 0
        start = rng.choice([held, rng.randint(0, held)])
        count = min(rng.choice([0, 1, 1, 2, 11]), 60 - start)
        hidden = rows(count, seed=rng.randrange(10_000))
        inputs.append(SequenceInput(sequence=sequence, parent=parent, start=start, hidden=hidden))
    return inputs


@pytest.mark.parametrize(("seed", "use_push"), [(0, True), (1, True), (2, False)])
def test_losses_amid_forks_and_rewinds(llama: TinyLlama, seed: int, use_push: bool) -> None:
    """Streams break and servers fail at random answers: between parts of a step, in replays, amid forks and rewinds."""
    rng = random.Random(seed)
    cutting: list[asyncio.Task[None]] = []
    with servers_of(llama, *THIRDS, (0, 3), (3, 6)) as doors:
        proxies = [TcpProxy(doors.swarm, server.info.addresses[0]) for server in doors.servers]
        for server, proxy in zip(doors.servers, proxies, strict=True):
            server.announce_also(proxy.address)
            server.edit_reply = _fail_now_and_then(rng, proxy, cutting)
        client = doors.swarm.connect(max_step_tokens=8, use_push=use_push, ban_s=0.2)
        session = client.open_session(max_length=60, num_sequences=3)
        yardstick = llama.blocks.open_session(max_length=60, num_sequences=3)
        for _ in range(40):
            inputs = _random_inputs(rng, session.lengths, 3)
            last_only = rng.random() < 0.3
            outputs = session.step(inputs, last_only=last_only)
            for output, expected in zip(outputs, yardstick.step(inputs, last_only=last_only), strict=True):
                assert output.shape == expected.shape
                assert not output.numel() or (output - expected).abs().max() < 1e-4
        assert cutting
        session.close()
        client.close()
        for proxy in proxies:
            proxy.close()


def _fail_now_and_then(rng: random.Random, proxy: TcpProxy, cutting: list[asyncio.Task[None]]) -> Edit:
    def edit(method: str, body: bytes) -> bytes:
        chance = rng.random() if method in ("Session", "Push") else 1.0
        if chance < 0.03:
            cutting.append(asyncio.get_running_loop().create_task(proxy._cut()))
        elif method == "Session" and chance < 0.04:
            return encode_frame(pb.SessionReply(failure=pb.Failure(code=pb.FAILURE_INTERNAL)))
        return body

    return edit


# -- cut off -----------------------------------------------------------------------------------------------


@pytest.fixture
def proxied(llama: TinyLlama) -> Iterator[tuple[Doors, TcpProxy]]:
    """Two servers, the second reached through a network that can break, and a third that could replace it."""
    with servers_of(llama, (0, 3), (3, 6)) as doors:
        proxy = TcpProxy(doors.swarm, doors.servers[1].info.addresses[0])
        doors.servers[1].announce_also(proxy.address)
        doors.add(3, 6)
        yield doors, proxy
        for client in doors.swarm._clients:
            client.close()
        proxy.close()


def session_through(doors: Doors, proxy: TcpProxy, **options: Any) -> tuple[SwarmBlocks, Any]:
    """A session whose second hop is the one behind the proxy."""
    client = doors.swarm.connect(blocked_peers=[doors.servers[2].peer_id], **options)
    session = client.open_session(max_length=128)
    append(session, 20)
    assert proxy.num_connections > 0
    return client, session


@pytest.mark.parametrize("use_push", [True, False], ids=["push", "relay"])
def test_a_lost_connection_costs_no_recomputation(
    llama: TinyLlama, proxied: tuple[Doors, TcpProxy], use_push: bool
) -> None:
    """A router that restarts is no dead server: the session goes on where it stood, and nobody is avoided."""
    doors, proxy = proxied
    client, session = session_through(doors, proxy, use_push=use_push)
    before = [tokens_run(server.node) for server in doors.servers]
    for length in (21, 22):
        proxy.cut()
        assert_right(llama, append(session, 1), length)
    for server, tokens_before in zip(doors.servers[:2], before, strict=False):
        # A token may be on its way when the client hears of the cut, and is run once more; what is held never is.
        assert 2 <= tokens_run(server.node) - tokens_before <= 4
    assert session.num_failovers == 0, "no server was replaced"
    assert avoided(client) == set()


def test_a_connection_cut_amid_a_long_prompt_costs_only_what_was_under_way(
    llama: TinyLlama, proxied: tuple[Doors, TcpProxy]
) -> None:
    """Parts that are done stay done, or a long prompt over a shaky line would never end."""
    doors, proxy = proxied
    client, session = session_through(doors, proxy, max_step_tokens=8, max_steps_in_flight=2)
    before = [tokens_run(server.node) for server in doors.servers]
    num_results = 0

    def cut_at_the_sixth(result: pb.StepResult, frame: Frame) -> bytes:
        nonlocal num_results
        num_results += 1
        if num_results == 6:
            asyncio.get_running_loop().create_task(proxy._cut())
        return frame.body

    doors.servers[1].edit_reply = edit_result(cut_at_the_sixth)
    assert_right(llama, append(session, 80), 100)
    assert num_results > 6
    again = [tokens_run(server.node) - ran - 80 for server, ran in zip(doors.servers[:2], before[:2], strict=True)]
    assert max(again) <= 4 * 8
    assert avoided(client) == set()


def test_a_network_that_is_away_for_a_while(llama: TinyLlama, proxied: tuple[Doors, TcpProxy]) -> None:
    """Where nobody else serves the blocks, the session waits, and then goes on where it stood."""
    doors, proxy = proxied
    client, session = session_through(doors, proxy, allowed_peers=[server.peer_id for server in doors.servers[:2]])
    before = tokens_run(doors.servers[1].node)
    proxy.go_down()
    doors.servers[1].edit_request = lambda method, body: body
    timer = threading.Timer(1.0, proxy.come_back)
    timer.start()
    assert_right(llama, append(session, 1), 21)
    timer.join()
    assert tokens_run(doors.servers[1].node) == before + 1
    assert session.num_failovers == 0
    assert avoided(client) == set(), "who is back is welcome"


def test_a_connection_that_swallows_everything_is_replaced_by_a_new_one(
    llama: TinyLlama, proxied: tuple[Doors, TcpProxy]
) -> None:
    """A router that has forgotten a connection tells nobody; the server behind it is as well as ever."""
    doors, proxy = proxied
    client, session = session_through(doors, proxy, use_push=False)
    before = tokens_run(doors.servers[1].node)
    num_connections = proxy.num_connections
    proxy.forget()
    assert_right(llama, append(session, 1), 21)
    assert proxy.num_connections > num_connections
    assert tokens_run(doors.servers[1].node) == before + 1
    assert avoided(client) == set()


# -- silent ------------------------------------------------------------------------------------------------


def hang(server: TamperingServer) -> None:
    """From now on it takes everything and answers nothing, as a process that was stopped."""
    server.edit_request = lambda method, body: None
    server.edit_reply = lambda method, body: None


@pytest.mark.parametrize("index", [0, 2])
def test_a_hung_server_is_found_in_seconds(llama: TinyLlama, index: int) -> None:
    """A stopped process keeps its connections: only asking shows that nobody is there."""
    with servers_of(llama, *THIRDS, *THIRDS) as doors:
        client = doors.swarm.connect(request_timeout_s=60.0)
        session = client.open_session(max_length=64)
        append(session, 20)
        hung = doors.of(session, index)
        hang(hung)
        started_s = time.monotonic()
        assert_right(llama, append(session, 1), 21)
        assert time.monotonic() - started_s < 15.0, "long before the step's own timeout of 30 s"
        assert session.num_failovers == 1
        assert avoided(client) == {hung.peer_id}
        session.close()
        hung.die()


def test_a_replacement_that_hangs_is_passed_by_in_seconds(llama: TinyLlama) -> None:
    """Opening has a deadline for slow servers, which must not be spent on dead ones."""
    with servers_of(llama, (0, 6)) as doors:
        client = doors.swarm.connect(request_timeout_s=60.0, connect_timeout_s=40.0)
        session = client.open_session(max_length=64)
        append(session, 20)
        hung = doors.add(0, 6)
        hang(hung)
        doors.servers[0].die()
        threading.Timer(0.5, doors.add, (0, 6)).start()
        started_s = time.monotonic()
        assert_right(llama, append(session, 1), 21)
        assert time.monotonic() - started_s < 20.0
        session.close()
        hung.die()
        wait_until(lambda: len(doors.servers) == 3)


def test_a_hung_server_holds_no_stateless_run_up(llama: TinyLlama) -> None:
    """Runs have a timeout for slow servers, which must not be spent on dead ones."""
    with servers_of(llama, (0, 6), (0, 6)) as doors:
        client = doors.swarm.connect(request_timeout_s=60.0)
        client.run_stateless([rows(9)])
        (used,) = (peer.peer_id for peer in client.peer_health() if peer.num_successes)
        (hung,) = (server for server in doors.servers if server.peer_id == used)
        hang(hung)
        others = set()
        for _ in range(4):  # until the hung one has been chosen, which a coin decides
            started_s = time.monotonic()
            (output,) = client.run_stateless([rows(9)])
            assert_right(llama, output, 9)
            assert time.monotonic() - started_s < 20.0
            others |= avoided(client)
        assert others <= {hung.peer_id}
        hung.die()


def _delay_results(server: TamperingServer, delay_s: float) -> None:
    """Its results arrive late; everything else is as quick as ever."""

    def delay(method: str, body: bytes) -> bytes | None:
        if method == "Session" and decode_frame(body, pb.SessionReply)[0].HasField("result"):
            loop = asyncio.get_running_loop()
            context = server._sessions[-1]
            loop.call_later(delay_s, lambda: loop.create_task(context.write(body)))
            return None
        return body

    server.edit_reply = delay


def test_a_slow_server_is_not_left(llama: TinyLlama) -> None:
    """A loaded machine takes its time; leaving it would begin its work again elsewhere."""
    with servers_of(llama, (0, 6), (0, 6)) as doors:
        client = doors.swarm.connect()
        session = client.open_session(max_length=64)
        append(session, 20)
        slow = doors.of(session, 0)
        _delay_results(slow, 2.5)
        assert_right(llama, append(session, 1), 21)
        assert doors.of(session, 0) is slow
        assert (session.num_failovers, avoided(client)) == (0, set())
        session.close()


@pytest.mark.parametrize("has_another", [True, False])
def test_a_stuck_engine_is_left_where_somebody_else_can_do_its_work(llama: TinyLlama, has_another: bool) -> None:
    """A GPU that hangs leaves its server in good health otherwise; it says how long nothing was finished."""
    with servers_of(llama, *[(0, 6)] * (1 + has_another)) as doors:
        client = doors.swarm.connect()
        session = client.open_session(max_length=64)
        append(session, 20)
        stuck = doors.of(session, 0)
        _delay_results(stuck, 4.0)
        delay = stuck.edit_reply

        def confess(method: str, body: bytes) -> bytes | None:
            if method == "Health":
                return node_pb2.HealthReply(state="online", engine_silent_ms=3_600_000).SerializeToString()
            return delay(method, body)

        stuck.edit_reply = confess
        assert_right(llama, append(session, 1), 21)
        assert (doors.of(session, 0) is stuck) is not has_another
        session.close()


# -- leaving -----------------------------------------------------------------------------------------------


def _say(server: TamperingServer, **failure: Any) -> None:
    server.repeat(encode_frame(pb.SessionReply(failure=pb.Failure(code=pb.FAILURE_DRAINING, **failure))), 1)


@pytest.mark.parametrize("kind", ["nobody", "unknown", "blocked", "of other blocks", "already a hop", "empty-handed"])
def test_a_farewell_is_checked_before_it_is_followed(llama: TinyLlama, kind: str) -> None:
    """A leaving server's word moves no session to servers we would not have chosen, and is no failure."""
    with servers_of(llama, (0, 3), (3, 6), (3, 6), (1, 5)) as doors:
        blocked, other = doors.servers[2], doors.servers[3]
        client = doors.swarm.connect(blocked_peers=[blocked.peer_id])
        session = client.open_session(max_length=64)
        append(session, 20)
        spare = doors.add(3, 6)
        successor = {
            "nobody": "",
            "unknown": "12D3KooWnobodyhaseverheardofthisone",
            "blocked": blocked.peer_id,
            "of other blocks": other.peer_id,
            "already a hop": doors.servers[0].peer_id,
            "empty-handed": spare.peer_id,
        }[kind]
        leaving = doors.of(session, 1)
        _say(leaving, successor=successor)
        time.sleep(0.2)
        assert_right(llama, append(session, 1), 21)
        assert doors.of(session, 1) is spare
        assert avoided(client) == {leaving.peer_id}
        assert [peer.num_failures for peer in client.peer_health() if peer.peer_id == leaving.peer_id] == [0]
        session.close()


# -- afterwards --------------------------------------------------------------------------------------------


def test_nothing_is_left_behind(llama: TinyLlama) -> None:
    """After kills, hung servers and steps given up: no task, no session, no page."""
    with servers_of(llama, *THIRDS, *THIRDS, grace_s=1.0) as doors:
        client = doors.swarm.connect(request_timeout_s=1.0)
        sessions = [client.open_session(max_length=64) for _ in range(2)]
        for session in sessions:
            append(session, 20)
        doors.of(sessions[0], 1).die()
        hang(doors.of(sessions[0], 0))
        for session in sessions:
            try:
                append(session, 1)
            except (DeadlineError, NoRouteError):
                assert session.lengths == (20,)
        for session in sessions:
            session.close()

        async def other_tasks() -> list[str]:
            await asyncio.sleep(0.1)
            mine = asyncio.current_task()
            return [repr(task) for task in asyncio.all_tasks() if task is not mine and not task.done()]

        assert [task for task in client._loop.run(other_tasks()) if "swarm" in task or "client" in task] == []
        for server in doors.servers:
            server.edit_request = server.edit_reply = lambda method, body: body
        wait_until(lambda: all(is_idle(server.node) for server in doors.servers), timeout_s=30.0)


def test_experience_is_shared_by_all_sessions_and_runs_of_a_connection(llama: TinyLlama) -> None:
    """What one session has suffered from, the next need not find out again."""
    with servers_of(llama, (0, 6), (0, 6)) as doors:
        client = doors.swarm.connect(ban_s=60.0)
        session = client.open_session(max_length=64)
        append(session, 20)
        dead, spare = doors.of(session, 0), None
        dead.die()
        append(session, 1)
        spare = doors.of(session, 0)
        session.close()
        client.run_stateless([rows(9)])
        by_peer = {peer.peer_id: peer for peer in client.peer_health()}
        assert (by_peer[dead.peer_id].num_failures, by_peer[spare.peer_id].num_failures) == (1, 0)
        assert by_peer[spare.peer_id].num_successes == 2
        assert by_peer[dead.peer_id].reliability < by_peer[spare.peer_id].reliability == 1.0
        assert 0 < (by_peer[spare.peer_id].answer_s or 0.0) < 60.0
        assert by_peer[dead.peer_id].avoided_for_s > 0 == by_peer[spare.peer_id].avoided_for_s
