"""The ways of keeping a context that `swarm bench kv` compares: our policies, and methods as they were published."""

# Letters: Hq, Hk query and KV heads, t new tokens, n keys, D, Dv head dimensions, L layers.

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

import torch

from swarm.errors import BadInputError
from swarm.kvpolicy.layers import build_codec, build_layers
from swarm.kvpolicy.published_gear import GearCache, GearSettings
from swarm.kvpolicy.published_pyramidinfer import PyramidInferCache
from swarm.kvpolicy.reference_cache import ReferenceCache
from swarm.kvpolicy.reference_model import AttentionCall, FullCache, ReferenceModel, cache_attention
from swarm.kvpolicy.settings import FULL_CACHE, KVPolicy, QuantisationSettings, find_policy
from swarm.kvpolicy.streaming import event_after

if TYPE_CHECKING:
    from swarm.kvpolicy.calibration_file import Calibration
    from swarm.models.progress import ProgressReporter

__all__ = [
    "COMPARISONS",
    "KeptContext",
    "Method",
    "Reading",
    "build_methods",
    "keep_full",
    "read",
    "with_random_scorer",
]

_PART_TOKENS: Final = 512
_QUERY_TOKENS: Final = 64

_GEAR: Final = GearSettings(bits=4, prefill_rank=4, block_rank=2, outlier_share=0.02)
_CODES: Final = GearSettings(bits=4, has_groups=False, num_sinks=4)
COMPARISONS: Final[dict[str, GearSettings | None]] = {
    "kivi-4": GearSettings(bits=4),
    "gear-published": _GEAR,
    "gear-published-2bit": replace(_GEAR, bits=2),
    "gear-l-published": replace(_GEAR, outlier_share=0.0),
    "gear-l-published-2bit": replace(_GEAR, bits=2, outlier_share=0.0),
    "pyramidinfer-hidden": None,
    # What low-rank and sparse terms add to our own codes, at about equal bytes.
    "codes-4": _CODES,
    "codes-3.5-rank-2": replace(_CODES, bits=3.5, prefill_rank=2, block_rank=2),
    "codes-3-rank-4": replace(_CODES, bits=3, prefill_rank=4, block_rank=2),
    "codes-3.375-sparse-2": replace(_CODES, bits=3.375, outlier_share=0.02),
}
"""Methods that no server offers, by the names that `--policies` takes; None reads the prompt in a way of its own."""


class KeptContext(Protocol):
    """A context as some method keeps it, able to go on."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Append new tokens and attend from them."""

    def keys_of(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys [n, D], values [n, Dv], positions [n] and score biases [n] of a KV head."""

    def count_bytes(self) -> int:
        """Bytes held."""

    @property
    def stream_lengths(self) -> Sequence[int]:
        """Tokens of the prompt that entered each layer; empty where all did."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A context as a full cache has read it."""

    token_ids: list[int]
    cache: FullCache
    hidden: dict[int, torch.Tensor]
    """[n, hidden size] by layer"""
    queries: dict[int, dict[int, torch.Tensor]]
    """[Hq, up to 64, D] by layer, the newest at every end of a part, by that position"""
    scaling: dict[int, float]


def read(model: ReferenceModel, token_ids: Sequence[int], report: ProgressReporter) -> Reading:
    """Run a context from its start, attending to everything."""
    cache = FullCache()
    hidden: dict[int, list[torch.Tensor]] = {}
    queries: dict[int, dict[int, torch.Tensor]] = {}
    scaling: dict[int, float] = {}

    def attend(call: AttentionCall) -> torch.Tensor:
        hidden.setdefault(call.layer, []).append(call.hidden)
        scaling[call.layer] = call.scaling
        output = cache.attend(call)
        end = cache.keys[call.layer].shape[1]
        # A copy, or the whole part would be held for its last few rows.
        queries.setdefault(call.layer, {})[end] = call.queries[:, -_QUERY_TOKENS:].clone()
        return output

    for start in range(0, len(token_ids), _PART_TOKENS):
        part = token_ids[start : start + _PART_TOKENS]
        model.run_hidden(part, start, attend)
        report.advance(len(part))
    joined = {layer: torch.cat(parts) for layer, parts in hidden.items()}
    return Reading(token_ids=list(token_ids), cache=cache, hidden=joined, queries=queries, scaling=scaling)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    name: str
    fingerprint: str
    """Of all settings, to know figures by that were measured before."""
    keep: Callable[[Reading], KeptContext]
    """The context as this method keeps it, from the full cache's reading of it where that is the same."""
    shared: tuple[object, ...] = ()
    """What kept contexts refer to and never change."""

    def copy(self, kept: KeptContext) -> KeptContext:
        """One that can go on another way."""
        return copy.deepcopy(kept, {id(each): each for each in self.shared})


def with_random_scorer(policy: KVPolicy) -> KVPolicy:
    """The control: the same budgets, any tokens."""
    assert policy.pruning is not None
    return replace(policy, preset=f"{policy.preset}, random tokens", pruning=replace(policy.pruning, scorer="random"))


def build_methods(
    model: ReferenceModel, names: Sequence[str], calibration: Calibration | None, *, num_controls: int
) -> list[Method]:
    """An 8-bit float cache, the named policies and methods, and random-token controls of the last pruning ones.

    Raises:
        BadInputError: a name is unknown; the message lists what there is.
    """
    methods = [Method(name="fp8", fingerprint="fp8", keep=lambda reading: _FullContext(_round_to_fp8(reading.cache)))]
    policies = []
    for name in names:
        if name in COMPARISONS:
            methods.append(_build_comparison(model, name, calibration))
            continue
        try:
            policy = find_policy(name)
        except BadInputError as error:
            raise BadInputError(f"{error}; to compare with: {', '.join(COMPARISONS)}") from error
        policies.append(policy)
        methods.append(_build_policy(model, policy, calibration))
    if num_controls:
        pruning = [policy for policy in policies if policy.pruning is not None][-num_controls:]
        methods += [_build_policy(model, with_random_scorer(policy), calibration) for policy in pruning]
    return methods


def _fingerprint(settings: object, calibration: Calibration | None) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    if calibration is not None:
        digest.update(repr(calibration.curve).encode())
        learned = calibration.scorer_weights, calibration.received_mean, calibration.received_weight
        for tensor in (*learned, calibration.key_axes, calibration.value_axes):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _build_policy(model: ReferenceModel, policy: KVPolicy, calibration: Calibration | None) -> Method:
    settings = build_layers(policy, model.shape, calibration, range(model.shape.num_layers))

    def keep(reading: Reading) -> KeptContext:
        """Up to the first cut of a long step attention is full under every policy; what follows is run again."""
        cache = ReferenceCache(settings)
        num_first = min(len(reading.token_ids), policy.chunk_tokens)
        for layer, part in cache.layers.items():
            part.append(
                reading.cache.keys[layer][:, :num_first],
                reading.cache.values[layer][:, :num_first],
                reading.hidden[layer][:num_first],
            )
            event = event_after(policy, part.stored_end, part.length)
            if event is not None:
                part.compress(event, reading.queries[layer][num_first], reading.scaling[layer])
        if num_first < len(reading.token_ids):
            model.step(cache, policy, reading.token_ids[num_first:], num_first)
        return _PolicyContext(cache)

    return Method(
        name=policy.preset, fingerprint=_fingerprint(policy, calibration), keep=keep, shared=tuple(settings.values())
    )


def _build_comparison(model: ReferenceModel, name: str, calibration: Calibration | None) -> Method:
    settings = COMPARISONS[name]
    if settings is None:

        def read_again(reading: Reading) -> KeptContext:
            cache = PyramidInferCache(model)
            cache.read_prompt(reading.token_ids)
            return cache

        return Method(name=name, fingerprint=name, keep=read_again, shared=(model,))
    codecs = {}
    if not settings.has_groups:
        policy = replace(
            FULL_CACHE, quantisation=QuantisationSettings(key_bits=settings.bits, value_bits=settings.bits)
        )
        codecs = {
            layer: build_codec(policy, model.shape, calibration, layer) for layer in range(model.shape.num_layers)
        }

    def keep(reading: Reading) -> KeptContext:
        cache = GearCache(settings, codecs)
        for layer in range(model.shape.num_layers):
            cache.take_prompt(layer, reading.cache.keys[layer], reading.cache.values[layer])
        return cache

    return Method(
        name=name,
        fingerprint=_fingerprint(settings, calibration if codecs else None),
        keep=keep,
        shared=tuple(codecs.values()),
    )


@dataclass(frozen=True)
class _PolicyContext:
    """The reference cache of one of our policies."""

    cache: ReferenceCache
    stream_lengths: Sequence[int] = ()

    def attend(self, call: AttentionCall) -> torch.Tensor:
        return cache_attention(self.cache)(call)

    def keys_of(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.cache.layers[layer].keys_of(head)

    def count_bytes(self) -> int:
        return self.cache.count_bytes()


@dataclass(frozen=True)
class _FullContext:
    """A full cache, counted as 8-bit numbers with a 16-bit scale for each head."""

    cache: FullCache
    stream_lengths: Sequence[int] = ()

    def attend(self, call: AttentionCall) -> torch.Tensor:
        return self.cache.attend(call)

    def keys_of(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, values = self.cache.keys[layer][head], self.cache.values[layer][head]
        return keys, values, torch.arange(len(keys)), torch.zeros(len(keys))

    def count_bytes(self) -> int:
        return sum(
            numbers.numel() + 2 * len(numbers)
            for kept in (self.cache.keys, self.cache.values)
            for numbers in kept.values()
        )


def keep_full(reading: Reading) -> KeptContext:
    """All of it, for questions; `attend` changes the reading."""
    return _FullContext(reading.cache)


def _round_to_fp8(cache: FullCache) -> FullCache:
    """The production default elsewhere: 8-bit floats, one scale per head."""
    rounded = FullCache()
    for layer in cache.keys:
        for source, target in ((cache.keys, rounded.keys), (cache.values, rounded.values)):
            scale = source[layer].abs().amax(dim=(1, 2), keepdim=True) / 448.0
            target[layer] = (source[layer] / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded
