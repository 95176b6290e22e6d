"""Sessions over the network: what travels, what is held, what is freed, and what a loss changes (nothing)."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from swarm.client.blocks import BlockSession, SequenceInput
from swarm.client.connection import SwarmBlocks
from swarm.client.remote_model import SwarmModelForCausalLM
from swarm.errors import DeadlineError, LengthLimitError, NoRouteError, SessionClosedError
from swarm.kvcache.admission import AdmissionConfig
from swarm.pb import session_pb2 as pb
from swarm.server.rpc.sessions import SessionLimits
from swarm.wire.frames import encode_frame
from tests.at_token import AtToken
from tests.model_pair import GREEDY, prompt
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until
from tests.tampering_server import TamperingServer, let_one_die

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

HIDDEN_SIZE = 32
LIMITS = SessionLimits(detach_grace_s=0.2)
ONE_AT_A_TIME = SessionLimits(admission=AdmissionConfig(max_sessions=1), detach_grace_s=0.2)


@pytest.fixture(scope="module")
def swarm(llama: TinyLlama) -> Iterator[InProcessSwarm]:
    """Three hops."""
    with InProcessSwarm(llama.folder, [(0, 1), (1, 4), (4, 6)], limits=LIMITS) as swarm:
        yield swarm


@pytest.fixture(autouse=True)
def _nothing_is_left(swarm: InProcessSwarm) -> Iterator[None]:
    yield
    wait_until(lambda: all(map(is_idle, swarm.nodes)))


def rows(count: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(256, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))[:count].clone()


def append(session: BlockSession, hidden: torch.Tensor, *, sequence: int = 0) -> torch.Tensor:
    """Continue a sequence where it stands."""
    held = session.lengths[sequence] if sequence < len(session.lengths) else 0
    (output,) = session.step([SequenceInput(sequence=sequence, parent=sequence, start=held, hidden=hidden)])
    return output


def whole(llama: TinyLlama, hidden: torch.Tensor) -> torch.Tensor:
    (output,) = llama.blocks.run_stateless([hidden])
    return output


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert not found.numel() or (found - expected).abs().max() < 1e-4


def remote_model(swarm: InProcessSwarm, client: SwarmBlocks) -> Any:
    return SwarmModelForCausalLM.from_blocks(swarm.source, client)


# -- what travels and what is held -------------------------------------------------------------------------


def test_three_turns_send_only_new_tokens(llama: TinyLlama) -> None:
    """Counted at the server's door: the history of a conversation travels once."""
    with InProcessSwarm(llama.folder, [], limits=LIMITS) as swarm:
        door = TamperingServer.of_span(swarm, 0, 6)
        model = remote_model(swarm, swarm.connect())
        history = torch.empty((1, 0), dtype=torch.long)
        with model.session(max_length=128) as session:
            for turn, (num_given, num_new) in enumerate([(12, 10), (5, 8), (7, 6)]):
                given = prompt(num_given, seed=turn)
                before = sum(item.num_rows for item in door.passed if item.is_request)
                history = torch.cat([history, given], dim=1)
                expected = llama.local.generate(history, max_new_tokens=num_new, eos_token_id=None, **GREEDY)
                answer = model.generate(given, session=session, max_new_tokens=num_new, eos_token_id=None, **GREEDY)
                history = torch.cat([history, answer[:, num_given:]], dim=1)
                assert torch.equal(history, expected)
                sent = sum(item.num_rows for item in door.passed if item.is_request) - before
                assert sent == num_given + num_new - 1 + (turn > 0)  # the last token of the turn before, too
        assert door.count("Session", "open") == 1


def test_rewinding_equals_a_fresh_run(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """To take another turn at any point of a conversation."""
    session = swarm.connect().open_session(max_length=64)
    append(session, rows(20))
    other = rows(6, seed=9)
    for kept in (13, 5, 0):
        (output,) = session.step([SequenceInput(sequence=0, parent=0, start=kept, hidden=other)])
        assert_close(output, whole(llama, torch.cat([rows(20)[:kept], other]))[kept:])
        assert session.lengths == (kept + 6,)
    session.close()


def test_one_by_one_in_chunks_and_at_once_are_the_same(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """How a prompt is cut is nobody's business but the network's."""
    expected = whole(llama, rows(40))
    for max_step_tokens, cuts in [(512, [40]), (7, [40]), (512, [1] * 40), (3, [5, 17, 1, 1, 16])]:
        session = swarm.connect(max_step_tokens=max_step_tokens).open_session(max_length=64)
        outputs, start = [], 0
        for count in cuts:
            outputs.append(append(session, rows(40)[start : start + count]))
            start += count
        assert_close(torch.cat(outputs), expected)
        session.close()


def test_sessions_do_not_see_each_other(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Steps of several sessions share a batch on the server, and nothing else."""
    client = swarm.connect()
    sessions = [client.open_session(max_length=64) for _ in range(4)]
    outputs: list[list[torch.Tensor]] = [[] for _ in sessions]

    def chat(index: int) -> None:
        for start, end in [(0, 9), (9, 10), (10, 14), (14, 15)]:
            outputs[index].append(append(sessions[index], rows(15, seed=index)[start:end]))

    threads = [threading.Thread(target=chat, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for index, pieces in enumerate(outputs):
        assert_close(torch.cat(pieces), whole(llama, rows(15, seed=index)))
        sessions[index].close()


def _random_inputs(rng: random.Random, lengths: Sequence[int], num_sequences: int) -> list[SequenceInput]:
    """Any mixture of appends, rewinds and forks."""
    inputs = []
    for sequence in rng.sample(range(num_sequences), rng.randint(1, num_sequences)):
        parent = rng.choice([sequence, rng.randrange(num_sequences)])
        held = lengths[parent] if parent < len(lengths) else 0
        start = rng.choice([held, rng.randint(0, held)])
        count = min(rng.choice([0, 1, 1, 2, 11]), 60 - start)
        hidden = rows(count, seed=rng.randrange(10_000))
        inputs.append(SequenceInput(sequence=sequence, parent=parent, start=start, hidden=hidden))
    return inputs


@pytest.mark.parametrize("max_step_tokens", [512, 4])
@pytest.mark.parametrize("seed", range(3))
def test_forks_and_rewinds_of_several_sequences(
    llama: TinyLlama, swarm: InProcessSwarm, max_step_tokens: int, seed: int
) -> None:
    """Beams, several answers and speculation are all mixtures of these three moves."""
    rng = random.Random(seed)
    session = swarm.connect(max_step_tokens=max_step_tokens).open_session(max_length=60, num_sequences=4)
    yardstick = llama.blocks.open_session(max_length=60, num_sequences=4)
    for index in range(30):
        inputs = _random_inputs(rng, session.lengths, 4)
        last_only = rng.random() < 0.3
        outputs = session.step(inputs, last_only=last_only)
        for output, expected in zip(outputs, yardstick.step(inputs, last_only=last_only), strict=True):
            assert_close(output, expected)
        assert all(held == of for held, of in zip(session.lengths, yardstick.lengths, strict=False)), index
    session.close()


def test_an_empty_step_changes_nothing(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Nothing new is an answer too, at the beginning as much as later."""
    session = swarm.connect().open_session(max_length=32, num_sequences=2)
    assert session.step([]) == []
    assert append(session, rows(0)).shape == (0, HIDDEN_SIZE)
    first = append(session, rows(5))
    assert append(session, rows(0)).shape == (0, HIDDEN_SIZE)
    assert session.step([]) == []
    assert_close(torch.cat([first, append(session, rows(9)[5:])]), whole(llama, rows(9)))
    session.close()


def test_a_step_beyond_the_limit_reaches_no_server(llama: TinyLlama) -> None:
    """An error that could have been known at home must not cost others any work."""
    with InProcessSwarm(llama.folder, [], limits=LIMITS) as swarm:
        door = TamperingServer.of_span(swarm, 0, 6)
        session = swarm.connect().open_session(max_length=16)
        with pytest.raises(LengthLimitError, match="would hold 17 positions, its max_length is 16"):
            append(session, rows(17))
        assert door.passed == []
        append(session, rows(16))
        num_messages = len(door.passed)
        with pytest.raises(LengthLimitError):
            append(session, rows(1))
        assert len(door.passed) == num_messages
        assert session.lengths == (16,)
        model = remote_model(swarm, swarm.connect())
        with pytest.raises(LengthLimitError, match="512"):
            model.generate(prompt(500), max_new_tokens=13)
        assert len(door.passed) == num_messages


def test_memory_and_sessions_are_counted_exactly(swarm: InProcessSwarm) -> None:
    """Others decide by what a server announces whether to come; a leak would turn them away for ever."""
    total = [node.info.kv_tokens_total for node in swarm.nodes]
    client = swarm.connect()
    sessions = [client.open_session(max_length=64, num_sequences=2) for _ in range(3)]
    for index, session in enumerate(sessions):
        append(session, rows(32, seed=index))
        append(session, rows(16, seed=10 + index), sequence=1)
    assert [node.info.num_sessions for node in swarm.nodes] == [3, 3, 3]
    assert [node.info.kv_tokens_free for node in swarm.nodes] == [tokens - 3 * 48 for tokens in total]
    sessions[0].step([SequenceInput(sequence=0, parent=0, start=16, hidden=rows(0))])
    wait_until(lambda: [node.info.kv_tokens_free for node in swarm.nodes] == [tokens - 128 for tokens in total])
    sessions.pop().close()
    wait_until(lambda: [node.info.kv_tokens_free for node in swarm.nodes] == [tokens - 80 for tokens in total])
    assert [node.info.num_sessions for node in swarm.nodes] == [2, 2, 2]
    for session in sessions:
        session.close()
        session.close()
    wait_until(lambda: [node.info.kv_tokens_free for node in swarm.nodes] == total)
    with pytest.raises(SessionClosedError):
        append(sessions[0], rows(1))


def test_a_vanished_client_is_cleared_away_after_the_grace(swarm: InProcessSwarm) -> None:
    """A killed process says no goodbye, and its memory must not be held for longer than it could come back."""
    client = swarm.connect()
    session = client.open_session(max_length=64)
    append(session, rows(40))
    client._loop.run(client._channels.close())
    assert [node.info.num_sessions for node in swarm.nodes] == [1, 1, 1]
    wait_until(lambda: all(map(is_idle, swarm.nodes)))


def test_a_forgotten_session_is_closed(swarm: InProcessSwarm) -> None:
    """Without `with`, without close(): when nobody can use it any more its memory goes back."""
    session = swarm.connect().open_session(max_length=64)
    append(session, rows(40))
    del session
    gc.collect()
    wait_until(lambda: all(map(is_idle, swarm.nodes)))


def test_closing_the_client_closes_its_sessions(swarm: InProcessSwarm) -> None:
    """One close at the end of a program is enough."""
    client = swarm.connect()
    sessions = [client.open_session(max_length=64) for _ in range(3)]
    for session in sessions:
        append(session, rows(4))
    client.close()
    wait_until(lambda: all(map(is_idle, swarm.nodes)))
    with pytest.raises(SessionClosedError):
        append(sessions[0], rows(1))
    with pytest.raises(SessionClosedError):
        client.open_session(max_length=8)


# -- full servers ------------------------------------------------------------------------------------------


def test_a_full_server_is_passed_by(llama: TinyLlama) -> None:
    """Busy is no failure: the next session goes elsewhere, even if that makes more hops."""
    with InProcessSwarm(llama.folder, [(0, 6)], limits=ONE_AT_A_TIME) as swarm:
        swarm.add_server(0, 3, limits=LIMITS)
        swarm.add_server(3, 6, limits=LIMITS)
        client = swarm.connect()
        first, second = client.open_session(max_length=32), client.open_session(max_length=32)
        assert_close(append(first, rows(9)), whole(llama, rows(9)))
        assert_close(append(second, rows(9)), whole(llama, rows(9)))
        assert (len(first.route), len(second.route)) == (1, 2)
        assert second.num_failovers == 0
        first.close()
        second.close()


def test_who_waits_for_a_full_server_gets_in_when_it_can(llama: TinyLlama) -> None:
    """Where there is no other server, a place in the queue is worth more than an error."""
    with InProcessSwarm(llama.folder, [(0, 6)], limits=ONE_AT_A_TIME) as swarm:
        client = swarm.connect()
        first, second = client.open_session(max_length=32), client.open_session(max_length=32)
        append(first, rows(9))
        timer = threading.Timer(0.7, first.close)
        timer.start()
        assert_close(append(second, rows(9)), whole(llama, rows(9)))
        timer.join()
        second.close()


def test_who_waits_in_vain_hears_so_in_time(llama: TinyLlama) -> None:
    """Every wait has an end, and its message says what was waited for."""
    with InProcessSwarm(llama.folder, [(0, 6)], limits=ONE_AT_A_TIME) as swarm:
        client = swarm.connect(queue_timeout_s=1.0, request_timeout_s=3.0)
        first, second = client.open_session(max_length=32), client.open_session(max_length=32)
        append(first, rows(9))
        started_s = time.monotonic()
        with pytest.raises(DeadlineError, match="full"):
            append(second, rows(9))
        assert time.monotonic() - started_s < 4.0
        first.close()
        assert_close(append(second, rows(9)), whole(llama, rows(9)))
        second.close()


# -- lost servers ------------------------------------------------------------------------------------------


class Doors:
    """A swarm in which every server can be killed."""

    def __init__(self, swarm: InProcessSwarm, spans: Sequence[tuple[int, int]]) -> None:
        self.swarm = swarm
        self.servers = [TamperingServer.of_span(swarm, start, end) for start, end in spans]

    def of_hop(self, route: Sequence[Any], index: int) -> TamperingServer:
        (server,) = [server for server in self.servers if server.peer_id == route[index].peer_id]
        return server


@contextmanager
def killable(llama: TinyLlama, *spans: tuple[int, int]) -> Iterator[Doors]:
    with InProcessSwarm(llama.folder, [], limits=LIMITS) as swarm:
        yield Doors(swarm, spans)


TWICE = ((0, 2), (0, 2), (2, 4), (2, 4), (4, 6), (4, 6))


@pytest.mark.parametrize("use_push", [True, False], ids=["push", "relay"])
@pytest.mark.parametrize("token", [0, 1, 7])
def test_losing_each_server_while_decoding_changes_no_token(llama: TinyLlama, token: int, use_push: bool) -> None:
    """The promise PETALS never kept: whichever server dies at whichever token, the answer is the same."""
    expected = llama.local.generate(prompt(), max_new_tokens=12, eos_token_id=None, **GREEDY)
    with killable(llama, *TWICE) as doors:
        client = doors.swarm.connect(use_push=use_push, ban_s=60.0)
        model = remote_model(doors.swarm, client)
        killed = []
        for index in range(3):
            with model.session(max_length=64) as session:

                def kill(session: Any = session, index: int = index) -> None:
                    server = doors.of_hop(session.route, index)
                    killed.append(server.peer_id)
                    server.die()

                streamer = AtToken(token, kill)
                ids = model.generate(
                    prompt(), session=session, max_new_tokens=12, eos_token_id=None, streamer=streamer, **GREEDY
                )
                assert torch.equal(ids, expected)
                assert session.num_failovers == 1
                assert len(killed) == index + 1
                assert client._health.avoided() == set(killed), "the healthy are not avoided"


@pytest.mark.parametrize("use_push", [True, False], ids=["push", "relay"])
@pytest.mark.parametrize("index", range(3))
def test_losing_a_server_amid_a_prompt_changes_no_token(llama: TinyLlama, index: int, use_push: bool) -> None:
    """Chunks of the prompt are then under way at all hops at once."""
    long_prompt = prompt(40)
    expected = llama.local.generate(long_prompt, max_new_tokens=8, eos_token_id=None, **GREEDY)
    with killable(llama, *TWICE) as doors:
        client = doors.swarm.connect(use_push=use_push, max_step_tokens=4)
        model = remote_model(doors.swarm, client)
        let_one_die(5, *doors.servers[2 * index : 2 * index + 2])
        with model.session(max_length=64) as session:
            ids = model.generate(long_prompt, session=session, max_new_tokens=8, eos_token_id=None, **GREEDY)
            assert torch.equal(ids, expected)
            assert session.num_failovers == 1


def test_two_smaller_servers_replace_one(llama: TinyLlama) -> None:
    """Home machines are of all sizes; what one held, two can take over."""
    expected = llama.local.generate(prompt(), max_new_tokens=12, eos_token_id=None, **GREEDY)
    with killable(llama, (0, 2), (2, 5), (5, 6), (2, 3), (3, 5)) as doors:
        model = remote_model(doors.swarm, doors.swarm.connect())
        with model.session(max_length=64) as session:
            streamer = AtToken(4, lambda: doors.servers[1].die())
            ids = model.generate(
                prompt(), session=session, max_new_tokens=12, eos_token_id=None, streamer=streamer, **GREEDY
            )
            assert torch.equal(ids, expected)
            assert [(hop.start, hop.end) for hop in session.route] == [(0, 2), (2, 3), (3, 5), (5, 6)]
            assert session.num_failovers == 1


def test_losing_one_server_after_the_other(llama: TinyLlama) -> None:
    """Recovery must leave a session that can be recovered again, sampling included."""
    settings: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 20, "pad_token_id": 0}
    torch.manual_seed(3)
    expected = llama.local.generate(prompt(), max_new_tokens=16, eos_token_id=None, **settings)
    with killable(llama, *TWICE, (0, 3), (3, 6)) as doors:
        model = remote_model(doors.swarm, doors.swarm.connect())
        num_put = 0

        class KillEveryFifth(BaseStreamer):
            def put(self, value: torch.Tensor) -> None:
                nonlocal num_put
                num_put += 1
                if num_put % 5 == 0:
                    doors.of_hop(session.route, num_put // 5 % len(session.route)).die()

            def end(self) -> None:
                pass

        with model.session(max_length=64) as session:
            torch.manual_seed(3)
            ids = model.generate(
                prompt(), session=session, max_new_tokens=16, eos_token_id=None, streamer=KillEveryFifth(), **settings
            )
            assert torch.equal(ids, expected)
            assert session.num_failovers == 3


def test_a_session_with_forks_survives_a_loss(llama: TinyLlama) -> None:
    """Replay must rebuild every sequence, whatever it was forked from."""
    rng = random.Random(1)
    with killable(llama, (0, 3), (0, 3), (3, 6)) as doors:
        session = doors.swarm.connect(max_step_tokens=16).open_session(max_length=60, num_sequences=3)
        yardstick = llama.blocks.open_session(max_length=60, num_sequences=3)
        for index in range(24):
            if index == 12:
                doors.of_hop(session.route, 0).die()
            inputs = _random_inputs(rng, session.lengths, 3)
            for output, expected in zip(session.step(inputs), yardstick.step(inputs), strict=True):
                assert_close(output, expected)
        assert session.num_failovers == 1
        session.close()


def test_beams_survive_a_loss(llama: TinyLlama) -> None:
    """All of them, from their common prompt on."""
    expected = llama.local.generate(prompt(), max_new_tokens=10, num_beams=4, **GREEDY)
    with killable(llama, (0, 3), (0, 3), (3, 6)) as doors:
        model = remote_model(doors.swarm, doors.swarm.connect())
        let_one_die(6, *doors.servers[:2])
        assert torch.equal(model.generate(prompt(), max_new_tokens=10, num_beams=4, **GREEDY), expected)
        assert any(server.is_dead for server in doors.servers)


@pytest.mark.parametrize("code", [pb.FAILURE_INTERNAL, pb.FAILURE_UNREACHABLE])
def test_one_sessions_trouble_does_not_hang_up_on_others(llama: TinyLlama, code: pb.FailureCode) -> None:
    """All sessions of a client share a connection; the failure of one is no reason to lose the rest."""
    with killable(llama, (0, 6)) as doors:
        client = doors.swarm.connect()
        troubled, calm = client.open_session(max_length=32), client.open_session(max_length=32)
        for session in (troubled, calm):
            append(session, rows(9))
        (door,) = doors.servers

        def fail_once(method: str, body: bytes) -> bytes:
            door.edit_reply = lambda method, body: body
            return encode_frame(pb.SessionReply(failure=pb.Failure(code=code)))

        door.edit_reply = fail_once
        append(troubled, rows(12)[9:])
        append(calm, rows(12)[9:])
        assert (troubled.num_failovers, calm.num_failovers) == (1, 0)
        troubled.close()
        calm.close()


def test_a_servers_next_address_is_tried_when_the_first_fails(llama: TinyLlama) -> None:
    """A machine at home has an address for neighbours and one for the world; which works depends on who asks."""
    with killable(llama, (0, 6)) as doors:
        (door,) = doors.servers
        door.announce_also("127.0.0.1:1")
        session = doors.swarm.connect().open_session(max_length=32)
        assert_close(append(session, rows(9)), whole(llama, rows(9)))
        session.close()


# -- missing servers ---------------------------------------------------------------------------------------


def test_missing_blocks_are_named_within_the_wait(llama: TinyLlama) -> None:
    """A newcomer must learn what is missing, when, and how to mend it."""
    with InProcessSwarm(llama.folder, [(0, 2), (5, 6)], limits=LIMITS) as swarm:
        session = swarm.connect(no_route_wait_s=0.5).open_session(max_length=32)
        started_s = time.monotonic()
        with pytest.raises(NoRouteError, match=r"nobody serves blocks 2-4 of .* --blocks 2:5") as raised:
            append(session, rows(4))
        assert 0.5 <= time.monotonic() - started_s < 2.0
        assert raised.value.missing_blocks == (2, 3, 4)
        swarm.add_server(2, 5)
        assert_close(append(session, rows(4)), whole(llama, rows(4)))
        session.close()


def test_the_overall_deadline_bounds_the_wait_for_servers(llama: TinyLlama) -> None:
    """A long patience for servers does not outlive the request itself."""
    with InProcessSwarm(llama.folder, [(0, 2)], limits=LIMITS) as swarm:
        session = swarm.connect(no_route_wait_s=60.0, request_timeout_s=0.5).open_session(max_length=32)
        started_s = time.monotonic()
        with pytest.raises(NoRouteError, match="blocks 2-5"):
            append(session, rows(4))
        assert time.monotonic() - started_s < 2.0
        session.close()


def test_a_server_that_joins_meanwhile_is_used(llama: TinyLlama) -> None:
    """A gap that is repaired within the wait costs nothing but the wait."""
    with killable(llama, (0, 3), (3, 6)) as doors:
        client = doors.swarm.connect(no_route_wait_s=15.0)
        session = client.open_session(max_length=32)
        first = append(session, rows(9))
        doors.servers[1].die()
        doors.servers[1].withdraw()
        timer = threading.Timer(0.7, doors.swarm.add_server, (3, 6))
        timer.start()
        second = append(session, rows(12)[9:])
        timer.join()
        assert_close(torch.cat([first, second]), whole(llama, rows(12)))
        assert session.num_failovers == 1
        session.close()


# -- interruptions -----------------------------------------------------------------------------------------


def test_an_interrupt_within_a_step_leaves_a_usable_session(llama: TinyLlama) -> None:
    """Ctrl-C on a slow answer is no reason to lose the conversation, or to leave memory behind on servers."""
    with killable(llama, (0, 3), (3, 6)) as doors:
        session = doors.swarm.connect().open_session(max_length=32)
        first = append(session, rows(9))
        doors.servers[1].edit_request = lambda method, body: None
        main_thread = threading.main_thread().ident
        assert main_thread is not None

        def interrupt(number: int, frame: object) -> None:
            raise KeyboardInterrupt

        previous = signal.signal(signal.SIGUSR1, interrupt)
        timer = threading.Timer(0.3, signal.pthread_kill, (main_thread, signal.SIGUSR1))
        try:
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                append(session, rows(12)[9:])
        finally:
            timer.join()
            signal.signal(signal.SIGUSR1, previous)
        assert session.lengths == (9,)
        doors.servers[1].edit_request = lambda method, body: body
        assert_close(torch.cat([first, append(session, rows(12)[9:])]), whole(llama, rows(12)))
        session.close()
        wait_until(lambda: all(map(is_idle, doors.swarm.nodes)))


def test_closing_during_a_step_ends_both(llama: TinyLlama) -> None:
    """Another thread may close a client whose answer nobody wants any more."""
    with killable(llama, (0, 6)) as doors:
        session = doors.swarm.connect().open_session(max_length=32)
        append(session, rows(9))
        doors.servers[0].edit_request = lambda method, body: None
        problems: list[BaseException] = []

        def work() -> None:
            try:
                append(session, rows(12)[9:])
            except SessionClosedError as error:
                problems.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.2)
        doors.servers[0].edit_request = lambda method, body: body
        session.close()
        thread.join(10)
        assert len(problems) == 1
        wait_until(lambda: all(map(is_idle, doors.swarm.nodes)))
