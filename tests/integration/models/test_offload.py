"""Blocks whose weights stream in give the same bits as blocks that stay, in bounded memory."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from swarm.datatypes import Span
from swarm.errors import BadInputError, PeerFaultError
from swarm.models import SpanModel, check_span, load_span, resolve_model
from swarm.models.flat_blocks import BlockFile
from swarm.models.offload import BlockStreamer, offload_layers
from swarm.models.offload_memory import BufferedMemory, _Buffer
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.sequential import SequentialBackend
from swarm.server.engine.work import BackwardWork, ForwardWork, StepWork
from swarm.server.session_mirror import SequenceStep
from swarm.weights import Precision
from tests.engine_sessions import run_mixed_sessions
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

ALL = tuple(range(NUM_BLOCKS))
MEMORY_BYTES = 2**21


def load(folder: Path, family: str = "llama", *, weights: Precision | None = None) -> SpanModel:
    if not folder.exists():
        save_tiny_model(family, folder)
    return load_span(resolve_model(str(folder)), Span(start=0, end=NUM_BLOCKS), weights=weights)


def stream(model: SpanModel, which: Sequence[int], folder: Path, *, in_buffers: bool = False) -> BlockStreamer:
    """`in_buffers` takes the way of GPUs, on the CPU."""
    streamer = BlockStreamer("cpu", where="disk", folder=folder)
    if in_buffers:
        streamer.close()
        streamer._memory = BufferedMemory(torch.device("cpu"), None)
    for index in reversed(which):  # loading finds blocks in any order
        streamer.take(index, model.blocks[index])
    streamer.start()
    return streamer


@pytest.mark.parametrize("in_buffers", [False, True])
@pytest.mark.parametrize("which", [(2,), (1, 4), (0, 2, 4), ALL[:5], ALL], ids=str)
def test_sessions_give_the_same_bits(which: tuple[int, ...], in_buffers: bool, tmp_path: Path) -> None:
    """Whoever asks a server must not notice where it keeps its weights, except by the time it takes."""
    expected = run_mixed_sessions(
        RaggedBackend(load(tmp_path / "m"), memory_bytes=MEMORY_BYTES), model := load(tmp_path / "m")
    )
    streamer = stream(model, which, tmp_path, in_buffers=in_buffers)
    assert streamer.layers == which
    found = run_mixed_sessions(RaggedBackend(model, memory_bytes=MEMORY_BYTES), model)
    for left, right in zip(expected, found, strict=True):
        assert torch.equal(left, right)
    streamer.close()


@pytest.mark.parametrize("weights", [Precision.NF4, Precision.INT8, Precision.BF16])
def test_weights_in_few_bits_stream_too(weights: Precision, tmp_path: Path) -> None:
    """Large models are served in 4 bit, and it is the large ones that do not fit."""
    whole, model = load(tmp_path / "m", weights=weights), load(tmp_path / "m", weights=weights)
    expected = run_mixed_sessions(RaggedBackend(whole, memory_bytes=MEMORY_BYTES), whole)
    streamer = offload_layers(model, ALL[1:], where="disk", folder=tmp_path)
    assert streamer is not None
    for left, right in zip(
        expected, run_mixed_sessions(RaggedBackend(model, memory_bytes=MEMORY_BYTES), model), strict=True
    ):
        assert torch.equal(left, right)
    streamer.close()


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text", "bloom"])
def test_other_families_stream(family: str, tmp_path: Path) -> None:
    """Experts, alternating windows, attention of its own: a block is a block."""
    whole, model = load(tmp_path / "m", family), load(tmp_path / "m", family)
    streamer = stream(model, ALL, tmp_path)
    assert check_span(model).ok
    hidden, positions = torch.randn(1, 9, model.hidden_size), torch.arange(9).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(whole(hidden, positions), model(hidden, positions))
    streamer.close()


@pytest.mark.parametrize("in_buffers", [False, True])
@pytest.mark.parametrize("which", [(3,), (0, 2, 4), ALL], ids=str)
def test_gradients_are_the_same(which: tuple[int, ...], in_buffers: bool, tmp_path: Path) -> None:
    """A block's memory holds another block's weights when its backward pass comes: it must be run again first."""
    whole, model = load(tmp_path / "m"), load(tmp_path / "m")
    streamer = stream(model, which, tmp_path, in_buffers=in_buffers)
    hidden, gradient = torch.randn(2, 12, whole.hidden_size).unbind()
    for span in (whole.span, Span(start=1, end=4), whole.span):
        work = BackwardWork(span, [5, 7], hidden, gradient, lambda output, error: None)
        expected = SequentialBackend(whole, memory_bytes=MEMORY_BYTES).run_stateless(work)
        assert torch.equal(SequentialBackend(model, memory_bytes=MEMORY_BYTES).run_stateless(work), expected)
    streamer.close()


@pytest.mark.parametrize("in_buffers", [False, True])
def test_parts_of_the_span_in_any_order(in_buffers: bool, tmp_path: Path) -> None:
    """Routes use parts of spans, so the block that was read ahead is not always the one that comes."""
    whole, model = load(tmp_path / "m"), load(tmp_path / "m")
    streamer = stream(model, ALL, tmp_path, in_buffers=in_buffers)
    ends = [(0, 6), (2, 3), (3, 6), (0, 1), (4, 6), (1, 5), (0, 6), (5, 6)]
    for number, (start, end) in enumerate(ends):
        hidden = torch.randn(7, whole.hidden_size)
        work = ForwardWork(Span(start=start, end=end), [7], hidden, lambda output, error: None)
        step = StepWork((bytes([number]), 1), work.span, [SequenceStep(0, 0, 0, 7)], hidden, lambda output, error: None)
        backends = [SequentialBackend(loaded, memory_bytes=MEMORY_BYTES) for loaded in (whole, model)]
        assert torch.equal(*[backend.run_stateless(work) for backend in backends])
        left, right = [backend.run_steps([step])[0] for backend in backends]
        assert isinstance(left, torch.Tensor)
        assert isinstance(right, torch.Tensor)
        assert torch.equal(left, right)
    streamer.close()


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    """Each with what was wrong, before anything has moved."""
    model = load(tmp_path / "m")
    assert offload_layers(model, [], where="disk") is None
    with pytest.raises(BadInputError, match=r"layers \[2, 6\] are not all among the 6 layers"):
        offload_layers(model, [2, 6], where="disk", folder=tmp_path)
    with pytest.raises(BadInputError, match="offload them to disk"):
        offload_layers(model, [2], where="host")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="can not be kept at"):
        offload_layers(model, [2], where="disk", folder=tmp_path / "file")


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that do not fit memory often do not fit the system's disk either."""
    file = BlockFile(tmp_path)

    file.close()

    class Full:
        def seek(self, offset: int) -> None: ...

        def write(self, data: memoryview) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(BadInputError, match="No space left on device after 0 MiB; free some space"):
        file.append(torch.zeros(100, dtype=torch.uint8))


def test_nothing_is_left_on_disk(tmp_path: Path) -> None:
    """The file has no name, so it is gone with the process, however that ends."""
    streamer = stream(load(tmp_path / "m"), ALL, tmp_path / "offload")
    assert [path for path in (tmp_path / "offload").rglob("*") if path.is_file()] == []
    streamer.close()


def test_a_block_that_does_not_arrive_fails_the_step_and_the_next_one_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hiccup of the disk costs a step, not the server; and nobody computes with another block's weights."""
    whole, model = load(tmp_path / "m"), load(tmp_path / "m")
    streamer = stream(model, ALL, tmp_path, in_buffers=True)
    memory = streamer._memory
    assert isinstance(memory, BufferedMemory)
    copy, broken = memory._copy, {3}

    def fail_once(place: int, buffer: _Buffer) -> None:
        if place in broken:
            broken.remove(place)
            raise OSError(errno.EIO, "Input/output error")
        copy(place, buffer)

    monkeypatch.setattr(memory, "_copy", fail_once)
    hidden, positions = torch.randn(1, 5, model.hidden_size), torch.arange(5).unsqueeze(0)
    with torch.inference_mode():
        with pytest.raises(PeerFaultError, match=r"weights of layer 3 did not arrive .*Input/output error"):
            model(hidden, positions)
        assert torch.equal(model(hidden, positions), whole(hidden, positions))
    streamer.close()


_MEASURE = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from swarm.datatypes import Span
from swarm.models import load_span, resolve_model
from swarm.models.offload import offload_layers

folder, num_blocks = Path(sys.argv[1]), 8
config = LlamaConfig(hidden_size=512, intermediate_size=5120, num_hidden_layers=num_blocks, num_attention_heads=8,
                     num_key_value_heads=2, vocab_size=64, tie_word_embeddings=True)
LlamaForCausalLM(config).save_pretrained(folder / "m")

def resident_bytes():
    kinds = ("RssAnon", "RssFile")
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))

model = load_span(resolve_model(str(folder / "m"), cache_dir=folder / "cache"), Span(start=0, end=num_blocks))
block_bytes = sum(parameter.numel() * 4 for parameter in model.blocks[0].parameters())
before = resident_bytes()
streamer = offload_layers(model, range(num_blocks), where="disk", folder=folder)
idle = resident_bytes()
seen = []
for block in model.blocks:
    block.register_forward_hook(lambda *_: seen.append(resident_bytes()))
hidden, positions = torch.randn(1, 4, 512), torch.arange(4).unsqueeze(0)
with torch.inference_mode():
    for _ in range(2):
        model(hidden, positions)
forward = max(seen)
seen.clear()
inputs = hidden.requires_grad_()
model(inputs, positions).sum().backward()
seen.append(resident_bytes())
print(json.dumps({"block": block_bytes, "before": before, "idle": idle, "forward": forward, "backward": max(seen)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_two_blocks(tmp_path: Path) -> None:
    """The whole point: eight blocks of 34 MB run in the memory of two, gradients included."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    block_bytes = figures["block"]
    assert block_bytes > 30e6
    margin_bytes = 25e6  # kernels that are used for the first time, activations
    # "before" counts nothing of the weights: a checkpoint in fp32 is mapped and nobody has read it yet.
    assert figures["idle"] < figures["before"] + margin_bytes, figures
    assert figures["forward"] < figures["idle"] + 2 * block_bytes + margin_bytes, figures
    assert figures["backward"] < figures["idle"] + 2 * block_bytes + margin_bytes, figures
