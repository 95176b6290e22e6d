"""What a compressed session gets does not depend on its company, nor on how its steps are cut: not by a bit, on CPUs.

Else a restored session would keep other tokens than the lost one did: half a bit decides which code a number gets.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from swarm.datatypes import Span
from swarm.kvpolicy.streaming import cut_step
from swarm.models import SpanModel, load_span, resolve_model
from swarm.server.engine.ragged import RaggedBackend, probe_layers
from swarm.server.engine.rowwise import make_rows_independent
from swarm.server.engine.work import StepWork
from swarm.server.policy_layers import PolicyLayers, PolicyWish
from swarm.server.session_mirror import SequenceStep
from tests.small_policies import small_policy
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

SPAN = Span(start=0, end=NUM_BLOCKS)
INPUTS = [200, *[1] * 40, 90, *[1] * 20, 5, 1, 1, 150, 1]
"""Tokens of a client's inputs: prompts and what follows them, with many events."""


class Server:
    """A span that compresses, anew for every run."""

    def __init__(self, folder: Path, preset: str, dtype: torch.dtype = torch.float32) -> None:
        self.model: SpanModel = load_span(resolve_model(str(folder)), SPAN, dtype=dtype)
        if not make_rows_independent(self.model, max_bytes=1 << 30):
            pytest.skip("products here depend on the number of rows")
        RaggedBackend(self.model, memory_bytes=1 << 20)  # sets the attention that is probed
        wish = PolicyWish(policy=small_policy(preset), num_layers=NUM_BLOCKS, first_layer=0, max_positions=1024)
        layers = probe_layers(self.model)
        self.layers: PolicyLayers = wish.build(
            [layer.shape for layer in layers],
            [layer.window for layer in layers],
            page_tokens=16,
            itemsize=dtype.itemsize,
        )
        generator = torch.Generator().manual_seed(7)
        self.hidden = torch.randn(sum(INPUTS), self.model.hidden_size, generator=generator).to(dtype)
        self.others = torch.randn(sum(INPUTS), self.model.hidden_size, generator=generator).to(dtype)

    def answer(self, inputs: Sequence[Sequence[int]], *, num_others: int = 0) -> torch.Tensor:
        """Outputs of all tokens, [T, H], of a session whose inputs come in such parts, beside others that decode."""
        backend = RaggedBackend(self.model, memory_bytes=1 << 24, policy_layers=self.layers)
        others = [b"other%d" % number for number in range(num_others)]
        for number, name in enumerate(others):
            run(backend, [work(name, self.others[: 100 + 7 * number], 0)])
        outputs, position, turn = [], 0, 0
        for wanted in inputs:
            parts: list[int] = []
            for count in wanted:  # the engine lets no part cross a multiple of the chunk
                parts += cut_step(self.layers.policy, position + sum(parts), count)
            for index, count in enumerate(parts):
                own = work(b"own", self.hidden[position : position + count], position, goes_on=index < len(parts) - 1)
                works = [
                    work(name, self.others[turn : turn + 1], 100 + 7 * number + turn)
                    for number, name in enumerate(others)
                ]
                works.insert(len(works) // 2, own)
                outputs.append(run(backend, works)[works.index(own)])
                position, turn = position + count, turn + 1
        return torch.cat(outputs)


def work(name: bytes, hidden: torch.Tensor, start: int, *, goes_on: bool = False) -> StepWork:
    item = SequenceStep(0, 0, start, len(hidden), goes_on)
    return StepWork((name, 1), SPAN, [item], hidden, lambda output, error: None, compresses=True)


def run(backend: RaggedBackend, works: list[StepWork]) -> list[torch.Tensor]:
    outputs = []
    for result in backend.run_steps(works):
        assert isinstance(result, torch.Tensor), result
        outputs.append(result)
    return outputs


def cut(count: int, chooser: random.Random) -> Iterator[int]:
    while count:
        part = min(count, chooser.choice((3, 16, 31, 32, 64, 100)))
        yield part
        count -= part


FAMILIES = {
    "llama": {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128},
    "gemma2": {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128, "query_pre_attn_scalar": 32},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 128},
}
"""Grouped heads; capped scores and windows; as many KV heads as query heads. Sizes are multiples of 32 as those of
real models are: torch takes what is left over another way."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder, **FAMILIES[request.param])
    return folder


@pytest.mark.parametrize("preset", ["pyramid+gear", "pyramid", "gear"])
def test_parts_and_company_change_no_bit(folder: Path, preset: str) -> None:
    server = Server(folder, preset)
    expected = server.answer([[count] for count in INPUTS])
    for seed in range(3):
        chooser = random.Random(seed)
        # What fits the ring is never cut.
        parts = [list(cut(count, chooser)) if count > 16 else [count] for count in INPUTS]
        assert torch.equal(server.answer(parts, num_others=seed * 3), expected)


@pytest.mark.parametrize("preset", ["pyramid+gear", "pyramid", "gear"])
def test_a_replay_of_sixteen_tokens_at_once_changes_no_bit(folder: Path, preset: str) -> None:
    """A replacement is sent an answer's tokens in groups that end where events fall."""
    server = Server(folder, preset)
    expected = server.answer([[count] for count in INPUTS])
    replayed: list[list[int]] = []
    position = 0
    for count in INPUTS:
        # Events come after sinks and whole blocks; see streaming.py.
        begins_block = (position - server.layers.policy.num_sinks) % server.layers.policy.block_tokens == 0
        if count == 1 and replayed and replayed[-1][0] < 16 and not begins_block:
            replayed[-1][0] += 1
        else:
            replayed.append([count])
        position += count
    assert len(replayed) < len(INPUTS) / 3
    assert torch.equal(server.answer(replayed), expected)


def test_it_holds_for_bf16(folder: Path) -> None:
    server = Server(folder, "pyramid+gear", torch.bfloat16)
    expected = server.answer([[count] for count in INPUTS])
    assert torch.equal(server.answer([[103, 97], *[[count] for count in INPUTS[1:]]], num_others=4), expected)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_it_holds_for_other_numbers_of_threads(folder: Path, num_threads: int) -> None:
    """Three share out numbers in the middle of a row, where torch goes another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        server = Server(folder, "pyramid+gear")
        expected = server.answer([[count] for count in INPUTS])
        assert torch.equal(server.answer([[count] for count in INPUTS], num_others=4), expected)
        assert torch.equal(server.answer([[103, 97], *[[count] for count in INPUTS[1:]]]), expected)
    finally:
        torch.set_num_threads(before)
