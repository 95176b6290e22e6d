"""The published methods that our policies are compared with: that they are what they say, at honest bytes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from swarm.cli.bench.kv_methods import COMPARISONS, Method, build_methods, keep_full, read
from swarm.errors import BadInputError, UnsupportedModelError
from swarm.kvpolicy.published_gear import GearCache, GearSettings
from swarm.kvpolicy.published_pyramidinfer import PyramidInferCache
from swarm.kvpolicy.reference_model import FullCache, ReferenceModel, wrap_model
from swarm.models.progress import SilentProgress
from tests.tiny_models import NUM_BLOCKS, VOCAB_SIZE, build_tiny_model

NUM_TOKENS = 192


def tokens(count: int, seed: int = 0) -> list[int]:
    numbers = torch.randint(3, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed))
    return [int(number) for number in numbers]


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    torch.set_num_threads(1)
    return wrap_model(build_tiny_model("llama"))


def prompt(seed: int = 0, num_tokens: int = NUM_TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [2, n, 64] of which some channels are large, as keys' are."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, num_tokens, 64, generator=generator) for _ in range(2))
    keys[:, :, :4] *= 10
    return keys, values


def keep(settings: GearSettings, keys: torch.Tensor, values: torch.Tensor) -> tuple[GearCache, float]:
    """The cache, and the mean squared error of its keys."""
    cache = GearCache(settings)
    cache.take_prompt(0, keys, values)
    errors = [(cache.keys_of(0, head)[0] - keys[head]).square().mean() for head in range(2)]
    return cache, float(sum(errors) / 2)


def test_groups_are_coded_in_the_bytes_of_the_paper() -> None:
    """KIVI at 4 bit and groups of 64 is 4.5 bit a number; a wrong count would make every comparison unfair."""
    cache, error = keep(GearSettings(bits=4), *prompt())
    codes = 2 * 2 * NUM_TOKENS * 64 // 2
    scales = 2 * 2 * NUM_TOKENS * 64 // 64 * 4
    tables = NUM_TOKENS // 64 * 2 * 4
    assert cache.count_bytes() == codes + scales + tables
    assert error < 0.1


def test_low_rank_and_sparse_terms_help_and_are_paid_for() -> None:
    """They must do here what they do in the paper, or beating them means nothing."""
    keys, values = prompt()
    keys[:, 7, 3] = 100.0
    plain, error = keep(GearSettings(bits=2), keys, values)
    low, low_error = keep(GearSettings(bits=2, prefill_rank=4), keys, values)
    both, both_error = keep(GearSettings(bits=2, prefill_rank=4, outlier_share=0.02), keys, values)
    assert both_error < low_error < error
    assert low.count_bytes() - plain.count_bytes() == 2 * 2 * 4 * 2 * (NUM_TOKENS + 64)
    assert both.count_bytes() > low.count_bytes()


def test_a_block_is_compressed_when_the_buffer_is_full(model: ReferenceModel) -> None:
    """The buffer is 16 bit and costs it; what leaves it is never touched again."""
    cache = GearCache(GearSettings(bits=4, group_size=8, buffer_tokens=64))
    full = FullCache()
    token_ids = tokens(140)
    with torch.no_grad():
        model.run_hidden(token_ids[:100], 0, full.attend)
        for layer in range(NUM_BLOCKS):
            cache.take_prompt(layer, full.keys[layer], full.values[layer])
        sizes = []
        for index in range(100, 140):
            model.run_hidden([token_ids[index]], index, cache.attend)
            sizes.append(cache.count_bytes())
    full_token = 2 * 2 * (8 + 8) * NUM_BLOCKS
    assert sizes[1] - sizes[0] == full_token
    drops = [index for index in range(1, 40) if sizes[index] < sizes[index - 1]]
    assert drops == [27]
    assert len(cache.keys_of(0, 0)[0]) == 140


def test_tokens_leave_the_hidden_stream_and_never_return(model: ReferenceModel) -> None:
    """What makes PyramidInfer cheap to read with, and what it pays for that: deeper layers never see them."""
    cache = PyramidInferCache(model)
    with torch.no_grad():
        cache.read_prompt(tokens(300))
    lengths = cache.stream_lengths
    assert lengths[0] == 300 and len(lengths) == NUM_BLOCKS
    assert all(after <= before for before, after in itertools.pairwise(lengths)) and lengths[-1] < 300
    kept = [set(cache.keys_of(layer, 0)[2].tolist()) for layer in range(NUM_BLOCKS)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(kept))
    # Sinks and the recent fifth are always there.
    assert {0, 1, 2, 3, *range(240, 300)} <= kept[-1]
    assert cache.count_bytes() == sum(lengths) * (2 * 2 * (8 + 8) + 2)


def test_a_prompt_that_is_too_short_to_prune_is_read_as_it_is(model: ReferenceModel) -> None:
    """Below 64 tokens of context the published code stops; then its outputs must be the model's own."""
    cache, full = PyramidInferCache(model), FullCache()
    token_ids = tokens(60)
    with torch.no_grad():
        cache.read_prompt(token_ids)
        model.run_hidden(token_ids, 0, full.attend)
        seen = model.run([9], 60, cache.attend)
        expected = model.run([9], 60, full.attend)
    torch.testing.assert_close(seen, expected, atol=3e-2, rtol=0)


def test_old_tokens_of_an_answer_are_pruned_in_blocks(model: ReferenceModel) -> None:
    """The published rule for generation: sixteen leave the window, a share of them stays."""
    cache = PyramidInferCache(model)
    with torch.no_grad():
        cache.read_prompt(tokens(300))
        before = [len(cache.keys_of(layer, 0)[0]) for layer in range(NUM_BLOCKS)]
        for index in range(32):
            model.run_hidden([5], 300 + index, cache.attend)
        after = [len(cache.keys_of(layer, 0)[0]) for layer in range(NUM_BLOCKS)]
    grown = [late - early for early, late in zip(before, after, strict=True)]
    assert grown[0] == 28 and grown[-1] < grown[0]


def test_models_without_a_list_of_layers_are_refused() -> None:
    """An attribute error would tell nobody what to do."""
    wrapped: Any = wrap_model(build_tiny_model("gpt_neox"))
    del wrapped.model.base_model.layers
    with pytest.raises(UnsupportedModelError, match="gpt_neox"):
        PyramidInferCache(wrapped).read_prompt([1, 2])


@pytest.mark.parametrize("name", [*COMPARISONS, "pyramid+gear", "gear"])
def test_every_method_goes_on_from_a_reading_without_changing_it(model: ReferenceModel, name: str) -> None:
    """All methods share one reading; one that changed it would spoil the others' figures."""
    with torch.no_grad():
        reading = read(model, tokens(200), SilentProgress())
        before = keep_full(reading).keys_of(2, 1)[0].clone()
        method: Method = build_methods(model, [name], None, num_controls=0)[1]
        kept = method.keep(reading)
        size = kept.count_bytes()
        other = method.copy(kept)
        model.run_hidden([5, 6, 7], 200, other.attend)
        assert kept.count_bytes() == size and size > 0
        assert torch.equal(keep_full(reading).keys_of(2, 1)[0], before)


def test_an_unknown_method_is_answered_with_the_known_ones(model: ReferenceModel) -> None:
    """Policies of servers, and what there is to compare with."""
    with pytest.raises(BadInputError, match=r"pyramid\+gear.*gear-published"):
        build_methods(model, ["gear-publishd"], None, num_controls=0)
