"""Swarms whose servers compress: one policy answers alike however blocks are cut, and whoever is lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from swarm.client.blocks import BlockSession, SequenceInput
from swarm.client.connection import SwarmBlocks
from swarm.client.remote_model import SwarmModelForCausalLM
from swarm.errors import BadInputError, NoRouteError
from swarm.server.rpc.sessions import SessionLimits
from tests.at_token import AtToken
from tests.integration.conftest import TinyLlama
from tests.integration.swarm.test_failover import Doors, rows
from tests.model_pair import GREEDY, prompt
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until
from tests.tampering_server import TamperingServer
from tests.tiny_models import build_tiny_model

POLICY = "smallest"
THIRDS = ((0, 2), (2, 4), (4, 6))
LENGTH = 400
RETURN = 41
"""Step of the script that goes back, and says something else from there on."""
NUM_PROMPT, NUM_NEW = 200, 56
SETTINGS: dict[str, Any] = {"max_new_tokens": NUM_NEW, "eos_token_id": None, **GREEDY}


@contextmanager
def compressing(llama: TinyLlama, *spans: tuple[int, int], policy: str = POLICY) -> Iterator[Doors]:
    """Servers of a policy; at the end nothing of any session may be left on those that live."""
    limits = SessionLimits(detach_grace_s=5.0)
    with InProcessSwarm(llama.folder, [], limits=limits, kv_policy=policy) as swarm:
        doors = Doors(swarm, spans)
        assert {server.info.kv_policy for server in doors.servers} == {policy}
        yield doors
        for client in swarm._clients:
            client.close()
        alive = [server.node for server in doors.servers if not server.is_dead]
        wait_until(lambda: all(map(is_idle, alive)), timeout_s=20.0)


def client_of(doors: Doors, servers: Sequence[TamperingServer], **options: Any) -> SwarmBlocks:
    """A client that uses these servers only."""
    return doors.swarm.connect(allowed_peers={server.peer_id for server in servers}, **options)


def model_of(doors: Doors, client: SwarmBlocks) -> Any:
    return SwarmModelForCausalLM.from_blocks(doors.swarm.source, client)


def assert_alike(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to rounding, which may turn a stored number into its neighbour."""
    assert output.shape == expected.shape
    assert not output.numel() or (output - expected).abs().max() < 0.05 * expected.abs().max()


def run_script(session: BlockSession, *, before_step: Callable[[int], None] = lambda number: None) -> torch.Tensor:
    """A conversation of hidden states: a long prompt, an answer, a second turn, a rewind, another answer."""
    outputs: list[torch.Tensor] = []
    script = [(0, 160)] + [(160 + index, 1) for index in range(36)] + [(196, 40), (236, 1), (237, 4), (238, 1)]
    script += [(130, 30)] + [(160 + index, 1) for index in range(20)]
    for number, (start, count) in enumerate(script):
        before_step(number)
        hidden = rows(256, seed=int(number >= RETURN))[start : start + count]
        (output,) = session.step([SequenceInput(sequence=0, parent=0, start=start, hidden=hidden)])
        outputs.append(output)
    return torch.cat(outputs)


# -- cuts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["pyramid", "gear", "pyramid+gear"])
def test_any_cut_of_the_blocks_answers_alike(llama: TinyLlama, policy: str) -> None:
    """What is kept follows from positions and from the model, not from who holds which layers."""
    with compressing(llama, (0, 6), (0, 1), (1, 4), (4, 6), policy=policy) as doors:
        whole = client_of(doors, doors.servers[:1], kv_policy=policy)
        cut = client_of(doors, doors.servers[1:], kv_policy=policy, max_step_tokens=64)
        expected = model_of(doors, whole).generate(prompt(NUM_PROMPT), **SETTINGS)
        assert torch.equal(model_of(doors, cut).generate(prompt(NUM_PROMPT), **SETTINGS), expected)
        sessions = [client.open_session(max_length=LENGTH) for client in (whole, cut)]
        outputs = [run_script(session) for session in sessions]
        assert_alike(outputs[1], outputs[0])
        (exact,) = llama.blocks.run_stateless([rows(160)])
        assert (outputs[0][:160] - exact).abs().max() < 0.05 * exact.abs().max(), "a prompt is compressed at its end"


def test_an_exact_session_on_servers_that_compress(llama: TinyLlama) -> None:
    """kv_policy="none" is transformers' own answer everywhere."""
    expected = llama.local.generate(prompt(NUM_PROMPT), **SETTINGS)
    with compressing(llama, *THIRDS) as doors:
        exact = model_of(doors, doors.swarm.connect(kv_policy="none"))
        lossy = model_of(doors, doors.swarm.connect())
        assert torch.equal(exact.generate(prompt(NUM_PROMPT), **SETTINGS), expected)
        with lossy.session(max_length=LENGTH) as session:
            lossy.generate(prompt(NUM_PROMPT), session=session, **SETTINGS)
            policies = session._session._driver._policies
            assert [policy.preset for policy in policies] == [POLICY]


def test_policies_that_nobody_serves_are_named(llama: TinyLlama) -> None:
    """A typing mistake at once, a policy of others after looking for it."""
    with compressing(llama, (0, 6)) as doors:
        with pytest.raises(BadInputError, match="there is no KV policy 'piramid'"):
            doors.swarm.connect(kv_policy="piramid")
        session = doors.swarm.connect(kv_policy="gear", no_route_wait_s=0.1).open_session(max_length=64)
        with pytest.raises(NoRouteError, match=r"under the KV policy gear .*--kv gear"):
            session.step([SequenceInput(sequence=0, parent=0, start=0, hidden=rows(3))])


# -- losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [0, 15, 16, 37, NUM_NEW - 2])
def test_any_server_can_die_at_any_token(llama: TinyLlama, token: int) -> None:
    """After the prompt, at an event, between events: the tokens of the undisturbed run of the same policy."""
    with compressing(llama, *THIRDS, *THIRDS) as doors:
        client = doors.swarm.connect(ban_s=60.0, max_step_tokens=64)
        model = model_of(doors, client)
        expected = model.generate(prompt(NUM_PROMPT), **SETTINGS)
        for index in range(3):
            with model.session(max_length=LENGTH) as session:

                def kill(session: Any = session, index: int = index) -> None:
                    doors.of(session, index).die()

                ids = model.generate(prompt(NUM_PROMPT), session=session, streamer=AtToken(token, kill), **SETTINGS)
                assert torch.equal(ids, expected)
                assert session.num_failovers == 1
            doors.add(*THIRDS[index])


@pytest.mark.parametrize("seed", range(3))
def test_losses_amid_a_conversation(llama: TinyLlama, seed: int) -> None:
    """Prompts, second turns and rewinds: the replay meets the events where they were."""
    rng = random.Random(seed)
    with compressing(llama, *THIRDS, *THIRDS, (0, 6)) as doors:
        expected = run_script(client_of(doors, doors.servers[-1:]).open_session(max_length=LENGTH))
        client = doors.swarm.connect(blocked_peers={doors.servers[-1].peer_id}, max_step_tokens=48)
        session = client.open_session(max_length=LENGTH)
        losses = {1, *rng.sample(range(2, 60), 2)}

        def lose(number: int) -> None:
            if number not in losses:
                return
            server = doors.of(session, rng.randrange(3))
            server.die()
            doors.add(server.node.info.span.start, server.node.info.span.end)

        assert_alike(run_script(session, before_step=lose), expected)
        assert session.num_failovers >= 2
        session.close()


def test_the_part_of_a_prompt_that_was_done_is_not_compressed_twice(llama: TinyLlama) -> None:
    """A loss between the parts of a long prompt: its end is still the only place where it is compressed."""
    with compressing(llama, *THIRDS, *THIRDS) as doors:
        client = doors.swarm.connect(max_step_tokens=32, max_steps_in_flight=2, ban_s=60.0)
        model = model_of(doors, client)
        expected = model.generate(prompt(NUM_PROMPT), **SETTINGS)
        num_pushed = 0

        def die_amid(method: str, body: bytes, server: TamperingServer) -> bytes:
            nonlocal num_pushed
            num_pushed += method == "Push"
            if method == "Push" and num_pushed == 4:
                server.die_soon()
            return body

        for server in doors.servers:
            if server.info.span.start == 2:
                server.edit_request = partial(_edit_of, die_amid, server)
        with model.session(max_length=LENGTH) as session:
            ids = model.generate(prompt(NUM_PROMPT), session=session, **SETTINGS)
            assert torch.equal(ids, expected)
            assert session.num_failovers == 1


# -- what can not be undone ----------------------------------------------------------------------------


def test_going_back_is_as_if_one_had_never_gone_further(llama: TinyLlama) -> None:
    """An edited turn must not be answered from what a forgotten one left behind."""
    with compressing(llama, *THIRDS) as doors:
        client = doors.swarm.connect()
        session, straight = (client.open_session(max_length=LENGTH) for _ in range(2))

        def step(session: BlockSession, start: int, count: int, seed: int = 0) -> torch.Tensor:
            hidden = rows(256, seed=seed)[start : start + count]
            (output,) = session.step([SequenceInput(sequence=0, parent=0, start=start, hidden=hidden)])
            return output

        for each in (session, straight):
            step(each, 0, 150)
            for position in range(150, 190):
                step(each, position, 1)
        step(session, 190, 50, seed=7)
        for position in range(240, 250):
            step(session, position, 1, seed=7)
        assert_alike(step(session, 190, 30, seed=8), step(straight, 190, 30, seed=8))
        for position in range(220, 240):
            assert_alike(step(session, position, 1), step(straight, position, 1))
        assert session.num_failovers == 0


def test_a_session_set_back_answers_as_if_it_had_stopped_there(llama: TinyLlama) -> None:
    """The chat's way of asking again; the last token is computed anew, since the answer follows from it."""
    with compressing(llama, *THIRDS) as doors:
        model = model_of(doors, doors.swarm.connect())
        ids = prompt(NUM_PROMPT)
        with model.session(max_length=LENGTH) as session, model.session(max_length=LENGTH) as straight:
            model.generate(ids, session=session, **SETTINGS)
            session.position = NUM_PROMPT
            again = model.generate(session=session, **SETTINGS)
            model(ids[:, :-1], past_key_values=straight.cache)
            assert torch.equal(again, model.generate(ids[:, -1:], session=straight, **SETTINGS)[:, 1:])
            assert session.num_failovers == 0


@pytest.mark.parametrize("dies", [False, True])
def test_beams(llama: TinyLlama, dies: bool) -> None:
    """Beams fork what is compressed, at every token, and come back after a loss."""
    settings = SETTINGS | {"num_beams": 3, "max_new_tokens": 40}
    with compressing(llama, (0, 6), *THIRDS, *THIRDS) as doors:
        whole = model_of(doors, client_of(doors, doors.servers[:1]))
        expected = whole.generate(prompt(NUM_PROMPT), **settings)
        client = client_of(doors, doors.servers[1:], ban_s=60.0)
        model = model_of(doors, client)
        num_messages = 0

        def die_amid(method: str, body: bytes, server: TamperingServer) -> bytes:
            nonlocal num_messages
            num_messages += 1
            if dies and num_messages == 25:
                server.die_soon()
            return body

        for server in doors.servers:
            if server.info.span.start == 2:
                server.edit_request = partial(_edit_of, die_amid, server)
        assert torch.equal(model.generate(prompt(NUM_PROMPT), **settings), expected)


@pytest.mark.parametrize("do_sample", [False, True])
def test_rejected_candidates_cost_nothing(llama: TinyLlama, do_sample: bool) -> None:
    """A draft model that is often wrong: the servers are never sent the log again for it."""
    assistant = build_tiny_model("llama", seed=3)
    with compressing(llama, (0, 6)) as doors:
        (server,) = doors.servers
        model = model_of(doors, doors.swarm.connect())
        with model.session(max_length=LENGTH) as session:
            settings = {**SETTINGS, "do_sample": do_sample}
            ids = model.generate(prompt(NUM_PROMPT), session=session, assistant_model=assistant, **settings)
            assert ids.shape[1] == NUM_PROMPT + NUM_NEW
        assert server.count("Session", "open") == 1, "a replay would have opened the session again"


def _edit_of(
    edit: Callable[[str, bytes, TamperingServer], bytes], server: TamperingServer, method: str, body: bytes
) -> bytes:
    return edit(method, body, server)
