"""A server with a KV policy keeps sessions by it, and exactly for those who want that, over the real protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swarm.kvcache.admission import AdmissionConfig
from swarm.kvpolicy.layers import build_layers
from swarm.kvpolicy.reference_cache import ReferenceCache
from swarm.kvpolicy.reference_model import ReferenceModel, load_reference_model
from swarm.pb import session_pb2 as pb
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.node import Node
from swarm.server.rpc.sessions import SessionLimits
from swarm.wire.frames import encode_frame
from tests.raw_client import RawClient, step_frame, step_message
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until
from tests.tiny_models import save_tiny_model

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

POLICY = "pyramid+gear"
LIMITS = SessionLimits(admission=AdmissionConfig(max_sessions=8), detach_grace_s=5.0, yield_after_s=0.3)
MAX_LENGTH = 500


@pytest.fixture(scope="module")
def swarm(llama: TinyLlama) -> Iterator[InProcessSwarm]:
    with InProcessSwarm(llama.folder, [(0, 6)], limits=LIMITS, kv_policy=POLICY) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def node(swarm: InProcessSwarm) -> Node:
    return swarm.nodes[0]


@pytest.fixture
def raw(node: Node) -> Iterator[RawClient]:
    with RawClient(node.info) as client:
        yield client
    wait_until(lambda: is_idle(node))


@pytest.fixture(scope="module")
def reference(llama: TinyLlama) -> ReferenceModel:
    return load_reference_model(llama.source)


def token_ids(count: int) -> list[int]:
    """Longer ones begin with the shorter ones."""
    found: list[int] = torch.randint(3, 128, (MAX_LENGTH,), generator=torch.Generator().manual_seed(7)).tolist()
    return found[:count]


class Asking:
    """A session that feeds the same tokens to the server, and answers with logits of each."""

    def __init__(self, llama: TinyLlama, raw: RawClient, **fields: Any) -> None:
        self._llama = llama
        self.stream, self.message = raw.open(**({"max_length": MAX_LENGTH} | fields))
        self.epoch, self.last_step = 1, 0

    def send(self, start: int, end: int, *, unfinished: bool = False, sequence: int = 0, parent: int = 0) -> None:
        self.last_step += 1
        step = step_message(
            self.last_step, epoch=self.epoch, start=start, count=end - start, sequence=sequence, parent=parent
        )
        step.sequences[0].unfinished = unfinished
        embed = self._llama.local.get_input_embeddings()
        with torch.no_grad():
            self.stream.send(step_frame(step, embed(torch.tensor(token_ids(end)[start:]))))

    def run(self, start: int, end: int, **how: Any) -> torch.Tensor:
        """Logits [end - start, V]."""
        self.send(start, end, **how)
        reply = self.stream.receive()
        assert reply is not None and reply[0].HasField("result"), reply
        with torch.no_grad():
            hidden = self._llama.local.model.norm(reply[1].tensor(0))
            logits: torch.Tensor = self._llama.local.lm_head(hidden).float()
        return logits

    def reopened(self, raw: RawClient, *, epoch: int, keep: tuple[int, int]) -> pb.Opened:
        self.stream, opened = raw.reopen(self.message, epoch=epoch, keep=keep)
        self.epoch = epoch
        return opened


class Expecting:
    """The same tokens through the oracle."""

    def __init__(self, reference: ReferenceModel, policy_node: Node) -> None:
        backend = backend_of(policy_node)
        assert backend.policy_layers is not None
        self.policy = backend.policy_layers.policy
        layers = build_layers(self.policy, reference.shape, None, range(reference.shape.num_layers))
        self._reference = reference
        self.cache = ReferenceCache(layers)

    @torch.no_grad()
    def run(self, start: int, end: int, *, unfinished: bool = False) -> torch.Tensor:
        """Logits [end - start, V]."""
        tokens = token_ids(end)[start:]
        hidden = self._reference.step(self.cache, self.policy, tokens, start, is_unfinished=unfinished)
        return self._reference.head(hidden)


def backend_of(node: Node) -> RaggedBackend:
    assert node._engine is not None
    backend = node._engine._backend
    assert isinstance(backend, RaggedBackend)
    return backend


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_policy_is_announced_with_what_fits_under_it(llama: TinyLlama, node: Node) -> None:
    """Clients choose by the policy, and servers are compared by how many tokens they hold."""
    assert node.info.kv_policy == POLICY
    with InProcessSwarm(llama.folder, [(0, 6)]) as plain:
        exact = plain.nodes[0].info
        assert exact.kv_policy == "none" and plain.nodes[0].kv_note == ""
        assert node.info.kv_tokens_total > 4 * exact.kv_tokens_total
    assert "swarm calibrate" in node.kv_note and f"({node.info.kv_tokens_total:,} tokens)" in node.plan


def test_answers_are_those_of_the_oracle(
    llama: TinyLlama, raw: RawClient, node: Node, reference: ReferenceModel
) -> None:
    """A prompt in parts, an answer over several events, a second turn: the whole of it goes by the policy."""
    asking, expecting = Asking(llama, raw), Expecting(reference, node)
    for start, end, unfinished in ((0, 90, True), (90, 200, True), (200, 230, False)):
        found = asking.run(start, end, unfinished=unfinished)
        assert_close(found, expecting.run(start, end, unfinished=unfinished))
    for start in range(230, 290):
        assert_close(asking.run(start, start + 1), expecting.run(start, start + 1))
    assert_close(asking.run(290, 350), expecting.run(290, 350))
    assert_close(asking.run(350, 351), expecting.run(350, 351))


def test_exact_sessions_stand_beside_compressed_ones(llama: TinyLlama, raw: RawClient) -> None:
    """Scoring and fine-tuning need every token, whatever the server's operator chose."""
    exact, packed = Asking(llama, raw, kv_policy="none"), Asking(llama, raw, kv_policy=POLICY)
    exact.send(0, 300)
    packed.send(0, 300)
    with torch.no_grad():
        expected = llama.local(torch.tensor([token_ids(310)])).logits[0]
    for asking in (exact, packed):
        reply = asking.stream.receive()
        assert reply is not None and reply[0].HasField("result"), reply
    found = torch.cat([exact.run(start, start + 1) for start in range(300, 310)])
    assert (found - expected[300:310]).abs().max() < 1e-3
    with_less = torch.cat([packed.run(start, start + 1) for start in range(300, 310)])
    assert (with_less - expected[300:310]).abs().max() > 1e-3, "nothing was compressed at all"
    # A rewind is always possible for an exact session.
    assert (exact.run(5, 6) - expected[5]).abs().max() < 1e-3


@pytest.mark.parametrize(("wanted", "given"), [("", POLICY), (POLICY, POLICY), ("none", "none")])
def test_a_session_learns_what_it_got(wanted: str, given: str, raw: RawClient) -> None:
    """A client replays differently to hops that compress."""
    stream = raw.stream()
    stream.send(encode_frame(pb.SessionRequest(open=raw.open_message(kv_policy=wanted))))
    reply = stream.receive()
    assert reply is not None and reply[0].opened.kv_policy == given


@pytest.mark.parametrize("wanted", ["gear", "smallest", "psychic"])
def test_another_policy_is_refused_with_those_that_are_offered(wanted: str, raw: RawClient) -> None:
    """One server keeps caches in one form beside the exact one; mixing more is refused by name."""
    failure = raw.refused_open(kv_policy=wanted)
    assert failure.code == pb.FAILURE_NOT_SERVED
    assert f"'{wanted}' is not offered here, only 'pyramid+gear' and 'none'" in failure.message


def test_going_back_too_far_is_refused_and_the_session_goes_on(
    llama: TinyLlama, raw: RawClient, node: Node, reference: ReferenceModel
) -> None:
    """The client replays then; until it does, what is held stays right."""
    asking, expecting = Asking(llama, raw), Expecting(reference, node)
    asking.run(0, 200)
    expecting.run(0, 200)
    asking.send(100, 101)
    failure = asking.stream.failure()
    assert (failure.code, list(failure.positions)) == (pb.FAILURE_STATE, [200])
    assert "it has been compressed since" in failure.message
    asking.last_step -= 1
    assert_close(asking.run(200, 201), expecting.run(200, 201))
    # A rejected draft.
    asking.run(201, 205)
    asking.run(202, 204)
    assert_close(asking.run(202, 203), _after(expecting, 201, 202, 203))


def _after(expecting: Expecting, *bounds: int) -> torch.Tensor:
    for start, end in pairwise(bounds):
        found = expecting.run(start, end)
    return found


def test_a_kept_session_goes_on_exactly(
    llama: TinyLlama, raw: RawClient, node: Node, reference: ReferenceModel
) -> None:
    """After another hop was lost, this one goes on from what it holds, also where a prompt had begun."""
    asking, expecting = Asking(llama, raw), Expecting(reference, node)
    asking.run(0, 150)
    asking.run(150, 151)
    asking.run(151, 300, unfinished=True)
    opened = asking.reopened(raw, epoch=2, keep=(1, 2))
    assert (opened.kept, list(opened.positions), opened.kv_policy) == (True, [151], POLICY)
    expecting.run(0, 150)
    expecting.run(150, 151)
    for start in range(151, 190):
        assert_close(asking.run(start, start + 1), expecting.run(start, start + 1))
    opened = asking.reopened(raw, epoch=3, keep=(1, 2))
    assert not opened.kept, "it was compressed since"
    asking.last_step = 0
    assert_close(asking.run(0, 150), Expecting(reference, node).run(0, 150))


def test_forks_go_their_own_ways(llama: TinyLlama, raw: RawClient, node: Node, reference: ReferenceModel) -> None:
    """Beams share what their parents compressed and compress on their own after that."""
    asking = Asking(llama, raw, max_sequences=3)
    asking.run(0, 200)
    asking.run(200, 201, sequence=1, parent=0)
    asking.run(200, 201, sequence=2, parent=0)
    expecting = Expecting(reference, node)
    expecting.run(0, 200)
    for start in range(200, 260):
        expected = expecting.run(start, start + 1)
        assert_close(asking.run(start, start + 1), expected)
        if start > 200:
            assert_close(asking.run(start, start + 1, sequence=2, parent=2), expected)


def test_announced_tokens_return_exactly(llama: TinyLlama, raw: RawClient, node: Node) -> None:
    """Capacity is counted in real pages: what sessions of known size take is what is announced as taken."""
    layers = backend_of(node).policy_layers
    assert layers is not None
    footprint = layers.footprint
    assert node._engine is not None
    total_bytes = node._engine.kv_usage.total_bytes
    wait_until(lambda: node.info.kv_tokens_free == node.info.kv_tokens_total)
    assert node.info.kv_tokens_total == total_bytes // footprint.bytes_per_token
    asked = [Asking(llama, raw), Asking(llama, raw), Asking(llama, raw, kv_policy="none")]
    for asking, length in zip(asked, (116, 420, 100), strict=True):
        asking.run(0, length)
    # Where the model was never measured, budgets are the same for everybody, so sizes are known to the byte.
    expected = footprint.sequence_bytes(116) + footprint.sequence_bytes(420) + footprint.full_bytes(100)
    wait_until(lambda: node._engine is not None and node._engine.kv_usage.used_bytes == expected)
    assert node.info.kv_tokens_free == (total_bytes - expected) // footprint.bytes_per_token
    asked.pop().stream.close()
    expected -= footprint.full_bytes(100)
    wait_until(lambda: node.info.kv_tokens_free == (total_bytes - expected) // footprint.bytes_per_token)
    for asking in asked:
        asking.stream.close()
    wait_until(lambda: node.info.kv_tokens_free == node.info.kv_tokens_total)


def test_memory_that_long_inputs_do_not_fit_is_told_of(llama: TinyLlama, node: Node) -> None:
    """The tokens announced are compressed ones; how long a prompt may be must not be found out by those who ask."""
    assert "do not fit" not in node.kv_note
    with InProcessSwarm(llama.folder, [(0, 6)], limits=LIMITS, kv_policy=POLICY, kv_memory_bytes=2**18) as small:
        note = small.nodes[0].kv_note
        told = re.search(r"more than (\d+) tokens of one do not fit 0.2 MiB of KV until then; give (\d+)MiB", note)
        assert told is not None, note
        assert small.nodes[0].info.kv_tokens_total > 2 * int(told[1])
        with RawClient(small.nodes[0].info) as raw:
            for too_many in (0, 1):
                asking = Asking(llama, raw)
                asking.send(0, int(told[1]) + too_many)
                reply = asking.stream.receive()
                assert reply is not None
                assert reply[0].HasField("result") == (not too_many)
                assert reply[0].failure.code == (pb.FAILURE_LENGTH if too_many else pb.FAILURE_UNSPECIFIED)
                asking.stream.close()
        enough = int(told[2]) * 2**20
    with InProcessSwarm(llama.folder, [(0, 6)], kv_policy=POLICY, kv_memory_bytes=enough) as large:
        assert "do not fit" not in large.nodes[0].kv_note


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_families_that_can_not_be_compressed_are_kept_exactly(family: str, tmp_path: Path) -> None:
    """They are served all the same; the operator hears why, and the swarm hears of no policy."""
    save_tiny_model(family, tmp_path / family)
    with InProcessSwarm(tmp_path / family, [(0, 6)], kv_policy=POLICY) as swarm:
        node = swarm.nodes[0]
        assert node.info.kv_policy == "none"
        assert "KV policy pyramid+gear can not be served, so caches are kept exactly (none): " in node.kv_note
        with RawClient(node.info) as raw:
            assert raw.refused_open(kv_policy=POLICY).code == pb.FAILURE_NOT_SERVED
            raw.open(kv_policy="none")


def test_more_sessions_are_let_in_than_exact_ones(llama: TinyLlama) -> None:
    """Admission counts bytes under each session's own policy: that is what the memory saved is for."""
    settings: dict[str, Any] = {"kv_memory_bytes": 2**20, "limits": SessionLimits(detach_grace_s=5.0)}
    counts = {}
    with InProcessSwarm(llama.folder, [(0, 6)], kv_policy=POLICY, **settings) as swarm:
        for policy in (POLICY, "none"):
            with RawClient(swarm.nodes[0].info) as raw:
                counts[policy] = 0
                while counts[policy] < 60:
                    stream = raw.stream()
                    message = raw.open_message(max_length=400, expected_tokens=400, kv_policy=policy)
                    stream.send(encode_frame(pb.SessionRequest(open=message)))
                    reply = stream.receive()
                    assert reply is not None
                    if reply[0].HasField("failure"):
                        assert reply[0].failure.code == pb.FAILURE_BUSY
                        break
                    counts[policy] += 1
            wait_until(lambda: is_idle(swarm.nodes[0]))
    assert counts["none"] == 3 and counts[POLICY] > 3 * counts["none"], counts
