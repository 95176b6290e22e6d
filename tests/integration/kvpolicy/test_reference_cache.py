"""The reference cache against transformers' own attention, on tiny models of several families."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.errors import BadInputError
from swarm.kvpolicy.calibration import calibrate, choose_stretches
from swarm.kvpolicy.calibration_file import Calibration, find_curve, read_calibration, read_curve, write_calibration
from swarm.kvpolicy.layers import build_layers
from swarm.kvpolicy.reference_cache import ReferenceCache
from swarm.kvpolicy.reference_model import FullCache, ReferenceModel, cache_attention, wrap_model
from swarm.kvpolicy.settings import PRESETS, KVPolicy, PruningSettings, QuantisationSettings
from swarm.models.progress import SilentProgress
from tests.tiny_models import NUM_BLOCKS, VOCAB_SIZE, build_tiny_model

KEEP_ALL = KVPolicy(
    name="pyramid", preset="all", pruning=PruningSettings(keep_ratio=1.0), block_tokens=8, chunk_tokens=64
)
SMALL = KVPolicy(
    name="pyramid+gear",
    preset="small",
    pruning=PruningSettings(keep_ratio=0.3, recent_tokens=16, extra_tokens=8),
    quantisation=QuantisationSettings(),
    block_tokens=8,
    tail_tokens=8,
    chunk_tokens=64,
)


def tokens(count: int, seed: int = 0) -> list[int]:
    numbers = torch.randint(3, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed))
    return [int(number) for number in numbers]


def build(family: str) -> tuple[Any, ReferenceModel]:
    torch.set_num_threads(1)
    plain = build_tiny_model(family)
    wrapped = build_tiny_model(family)
    wrapped.load_state_dict(plain.state_dict())
    return plain, wrap_model(wrapped)


def new_cache(model: ReferenceModel, policy: KVPolicy, calibration: Calibration | None = None) -> ReferenceCache:
    return ReferenceCache(build_layers(policy, model.shape, calibration, range(model.shape.num_layers)))


@pytest.fixture(scope="module")
def llama() -> ReferenceModel:
    return build("llama")[1]


@pytest.fixture(scope="module")
def calibration(llama: ReferenceModel) -> Calibration:
    stretches = choose_stretches(tokens(1200, seed=3), num_stretches=3, stretch_tokens=300)
    return calibrate(llama, stretches, again=[5, 6], model_hash="a" * 64, report=SilentProgress())


def run_in_steps(model: ReferenceModel, policy: KVPolicy, token_ids: list[int]) -> torch.Tensor:
    cache = new_cache(model, policy)
    parts = [model.step(cache, policy, token_ids[:70], 0)]
    parts += [model.step(cache, policy, [token], 70 + index) for index, token in enumerate(token_ids[70:])]
    return model.head(torch.cat(parts))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_an_uncompressed_cache_gives_the_models_own_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped heads, sliding windows, capped scores and learned sinks: the oracle must be right itself."""
    monkeypatch.setattr("swarm.kvpolicy.reference_cache._STORED_DTYPE", torch.float32)
    plain, model = build(family)
    policy = replace(KEEP_ALL, tail_tokens=1000, pruning=PruningSettings(keep_ratio=1.0, recent_tokens=1000))
    token_ids = tokens(90)
    with torch.no_grad():
        seen, expected = run_in_steps(model, policy, token_ids), plain(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)


# Where there are experts, 16 bit now and then send a token to another one.
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text"])
def test_rows_of_16_bit_change_next_to_nothing(family: str) -> None:
    """A policy that drops nothing yet must not be felt, behind sliding windows either."""
    plain, model = build(family)
    token_ids = tokens(90)
    with torch.no_grad():
        seen, expected = run_in_steps(model, KEEP_ALL, token_ids), plain(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(seen, expected, atol=3e-2, rtol=0)


def test_a_compressed_cache_follows_chunks_turns_and_long_answers(
    llama: ReferenceModel, calibration: Calibration
) -> None:
    """Published code breaks on chunked prompts and on second turns; here budgets hold at every moment."""
    cache = new_cache(llama, SMALL, calibration)
    position = 0
    with torch.no_grad():
        for turn, count in enumerate([150, 1, 1, 1, 40, *[1] * 60]):
            llama.step(cache, SMALL, tokens(count, seed=turn), position)
            position += count
    for layer in cache.layers.values():
        assert layer.length == position
        assert SMALL.tail_tokens <= position - layer.stored_end < SMALL.tail_tokens + SMALL.block_tokens
        for rows in layer.heads:
            positions = rows.positions
            assert len(positions) % SMALL.block_tokens == 0 and len(rows.rows) == len(positions)
            assert bool((positions[1:] > positions[:-1]).all())
            assert int(positions[0]) >= SMALL.num_sinks and int(positions[-1]) < layer.stored_end
            assert len(positions) + rows.num_dropped == layer.stored_end - SMALL.num_sinks
    share = cache.count_bytes() / (position * 2 * NUM_BLOCKS * 2 * 16)
    assert share < 0.75


def test_cutting_the_model_elsewhere_keeps_the_same_tokens(llama: ReferenceModel, calibration: Calibration) -> None:
    """A server of [a, b) must do what a server of the whole model does, or a replacement answers differently."""
    whole = new_cache(llama, SMALL, calibration)
    parts = [
        ReferenceCache(build_layers(SMALL, llama.shape, calibration, layers)) for layers in (range(2), range(2, 6))
    ]
    joined = ReferenceCache({})
    joined.layers = parts[0].layers | parts[1].layers
    with torch.no_grad():
        for cache in (whole, joined):
            llama.step(cache, SMALL, tokens(200), 0)
    assert whole.kept_positions() == joined.kept_positions()
    assert whole.count_bytes() == joined.count_bytes()


def test_the_same_steps_give_the_same_bytes(llama: ReferenceModel, calibration: Calibration) -> None:
    """Replay after a failure repeats the recorded steps, and must end with the same rows."""
    caches = [new_cache(llama, SMALL, calibration) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            llama.step(cache, SMALL, tokens(130), 0)
            for index in range(20):
                llama.step(cache, SMALL, [7], 130 + index)
    for first, second in zip(caches[0].layers.values(), caches[1].layers.values(), strict=True):
        for one, other in zip(first.heads, second.heads, strict=True):
            assert torch.equal(one.rows, other.rows) and torch.equal(one.scores, other.scores)


def test_an_input_in_parts_is_compressed_as_a_whole(llama: ReferenceModel, calibration: Calibration) -> None:
    """Clients cut prompts into steps, engines into parts: the same tokens must be judged by the same queries."""
    policy = replace(SMALL, chunk_tokens=128)
    caches = [new_cache(llama, policy, calibration) for _ in range(2)]
    token_ids = tokens(190)
    with torch.no_grad():
        llama.step(caches[0], policy, token_ids, 0)
        for start, end in ((0, 50), (50, 64), (64, 130), (130, 187), (187, 190)):
            llama.step(caches[1], policy, token_ids[start:end], start, is_unfinished=end < 190)
    assert caches[0].kept_positions() == caches[1].kept_positions()
    for one, other in zip(caches[0].layers.values(), caches[1].layers.values(), strict=True):
        assert one.tail == other.tail
        assert all(left.num_dropped == right.num_dropped for left, right in zip(one.heads, other.heads, strict=True))


def test_a_token_taken_back_leaves_no_trace(llama: ReferenceModel, calibration: Calibration) -> None:
    """Stop sequences and rejected guesses take a token back; what follows must not know of it."""
    caches = [new_cache(llama, SMALL, calibration) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            llama.step(cache, SMALL, tokens(100), 0)
        for index in range(30):
            start = 100 + index
            llama.step(caches[0], SMALL, [5 + index], start)
            llama.step(caches[1], SMALL, [90], start)
            caches[1].rewind(start)
            llama.step(caches[1], SMALL, [5 + index], start)
    assert caches[0].kept_positions() == caches[1].kept_positions()
    for one, other in zip(caches[0].layers.values(), caches[1].layers.values(), strict=True):
        assert one.tail == other.tail and one.length == other.length
    with pytest.raises(ValueError, match="go back"):
        caches[0].rewind(50)


def test_sliding_window_layers_forget_by_position_alone() -> None:
    """Inside its window a layer may want any token; behind it, none."""
    _, model = build("gemma2")
    cache = new_cache(model, SMALL)
    with torch.no_grad():
        model.step(cache, SMALL, tokens(120), 0)
    assert model.shape.windows
    for index, window in model.shape.windows.items():
        layer = cache.layers[index]
        for rows in layer.heads:
            assert rows.num_dropped == 0
            assert rows.positions.tolist() == list(range(max(layer.length - window + 1, 4), layer.stored_end))


def test_a_summary_stands_for_what_was_dropped() -> None:
    """Heads that look at everything a little lose most by dropping; one entry of that weight keeps the mean."""
    _, model = build("llama")
    without = replace(SMALL, pruning=replace(SMALL.pruning or PruningSettings(keep_ratio=0.3), has_summary=False))
    token_ids = tokens(260)
    errors = []
    with torch.no_grad():
        full = FullCache()
        model.run_hidden(token_ids, 0, full.attend)
        expected = model.run([9], 260, full.attend)
        for policy in (SMALL, without):
            cache = new_cache(model, policy)
            model.step(cache, policy, token_ids, 0)
            errors.append(float((model.run([9], 260, cache_attention(cache)) - expected).square().mean()))
    assert errors[0] < errors[1]


def test_a_calibration_survives_its_file_and_names_its_model(tmp_path: Path, calibration: Calibration) -> None:
    """Files are handed around; one of another model would silently ruin answers."""
    path = tmp_path / "kv" / ("a" * 32 + ".safetensors")
    write_calibration(path, calibration)
    back = read_calibration(path, model_hash="a" * 64)
    assert torch.equal(back.key_axes, calibration.key_axes)
    assert find_curve("a" * 64, cache_dir=tmp_path) == read_curve(path)
    for layer in range(NUM_BLOCKS):
        for head in range(2):
            assert back.curve.share(layer, head, 0.25) == pytest.approx(
                calibration.curve.share(layer, head, 0.25), abs=1e-3
            )
    with pytest.raises(BadInputError, match="not on bbbb"):
        read_calibration(path, model_hash="b" * 64)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(BadInputError, match="calibrate"):
        read_curve(path)


def test_a_calibrated_curve_keeps_its_mean(calibration: Calibration) -> None:
    """The ratio is what was promised to whoever sized the memory."""
    for ratio in (0.1, 0.25, 0.5):
        shares = [calibration.curve.share(layer, head, ratio) for layer in range(NUM_BLOCKS) for head in range(2)]
        assert sum(shares) / len(shares) == pytest.approx(ratio, abs=0.01)


def test_a_calibration_of_another_shape_is_refused(calibration: Calibration) -> None:
    """Better than an index error in the middle of a session."""
    _, model = build("gemma2")
    shape = replace(model.shape, num_layers=4)
    with pytest.raises(BadInputError, match="6 layers"):
        build_layers(SMALL, shape, calibration, range(4))


def test_every_preset_runs(llama: ReferenceModel, calibration: Calibration) -> None:
    """A preset that fails would be found by users."""
    for policy in PRESETS.values():
        if policy.compresses:
            cache = new_cache(llama, policy, calibration)
            with torch.no_grad():
                llama.step(cache, policy, tokens(150), 0)
            assert cache.count_bytes() > 0
