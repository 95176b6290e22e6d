"""What `swarm doctor MODEL` finds out: how much of a model fits this machine, without loading any of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from swarm.cli.examination import Finding
from swarm.cli.failures import sentence_for
from swarm.errors import SwarmError
from swarm.kvpolicy.settings import FULL_CACHE, KVPolicy

if TYPE_CHECKING:
    from swarm.datatypes import ModelHash
    from swarm.models import ModelSource
    from swarm.models.block_sizes import BlockSizes, ModelShape
    from swarm.models.progress import ProgressReporter
    from swarm.server.capacity_plan import CapacityPlan, DeviceMemory
    from swarm.weights import Precision

__all__ = ["ModelReport", "PrecisionRow", "examine_model", "fit_precisions", "judge_fit"]


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """What one precision of the weights gives on this machine."""

    weights: str
    """As for `--weights`."""
    block_bytes: int | None
    """Of an average block; None when the precision can not be used here."""
    num_blocks: int
    """How many fit; 0 when none does."""
    kv_bytes: int
    kv_tokens: int
    sentence: str
    """The plan, or why there is none."""
    note: str = ""
    """What else to know of it, in one sentence; empty when there is nothing to say."""

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "block_bytes": self.block_bytes,
            "num_blocks": self.num_blocks,
            "kv_bytes": self.kv_bytes,
            "kv_tokens": self.kv_tokens,
            "explanation": self.sentence,
            "note": self.note,
        }


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """A model on this machine."""

    name: str
    num_blocks: int
    device: str
    kv_policy: str
    """As for `--kv`."""
    source: ModelSource | None
    """The model itself, where it was asked for."""
    rows: tuple[PrecisionRow, ...]
    """Most precise first."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_blocks": self.num_blocks,
            "device": self.device,
            "kv_policy": self.kv_policy,
            "fits": [row.to_json() for row in self.rows],
        }


def examine_model(
    name: str, report: ProgressReporter, *, wants_identity: bool = False, policy: KVPolicy = FULL_CACHE
) -> tuple[ModelReport | None, Finding]:
    """How much of a model fits here in each precision, from its config alone; None where it was not found.

    `wants_identity` looks at the weight files too, to know which servers have the same model, and how the model was
    calibrated.
    """
    from swarm.kvpolicy.calibration_file import find_curve
    from swarm.models import resolve_model, unsupported_reason
    from swarm.models.block_sizes import measure_model_shape
    from swarm.models.source import default_cache_dir, max_positions_of, read_config
    from swarm.server.device_memory import find_default_device, measure_device_memory

    try:
        source = resolve_model(name, report=report) if wants_identity else None
        config = source.config if source is not None else read_config(name, report=report)
        device = find_default_device()
        reason = unsupported_reason(config)
        if reason is not None:
            return None, Finding(subject="model", verdict="problem", seen=reason, advice="choose another model")
        shape = measure_model_shape(config)
        if source is not None and policy.compresses:
            # A damaged calibration is one problem with its own advice, not a lack of room in every precision.
            find_curve(source.model_hash, cache_dir=default_cache_dir())
        rows = fit_precisions(
            shape,
            device,
            measure_device_memory(device),
            policy=policy,
            model_hash=source.model_hash if source is not None else None,
            max_positions=max_positions_of(config),
        )
    except SwarmError as error:
        return None, Finding(subject="model", verdict="problem", seen=sentence_for(error))
    num_blocks = len(shape.blocks)
    fit = ModelReport(
        name=name, num_blocks=num_blocks, device=device, kv_policy=policy.preset, source=source, rows=tuple(rows)
    )
    return fit, judge_fit(name, num_blocks, rows, kv_policy=policy.preset)


def fit_precisions(
    shape: ModelShape,
    device: str,
    memory: DeviceMemory,
    *,
    policy: KVPolicy = FULL_CACHE,
    model_hash: ModelHash | None = None,
    max_positions: int | None = None,
) -> list[PrecisionRow]:
    """One row for each precision, most precise first.

    Args:
        device: "cpu" or "cuda:N".
        policy: by which KV tokens are counted.
        model_hash: by which the model's calibration is found; None goes by defaults.
        max_positions: context length of the model; None is a long one.
    """
    from swarm.server.planned_kv import sizes_under
    from swarm.server.preparing import CPU_KV_BYTES
    from swarm.weights import Precision

    def sizes_in(precision: Precision) -> BlockSizes:
        return sizes_under(policy, shape, precision, device, model_hash=model_hash, max_positions=max_positions)

    def note_in(precision: Precision, plan: CapacityPlan, sizes: BlockSizes) -> str:
        if not policy.compresses:
            return ""
        if memory.is_host:  # what a server takes by itself
            plan = replace(plan, kv_bytes=CPU_KV_BYTES)
        num_tokens = min(policy.chunk_tokens, max_positions or policy.chunk_tokens)
        return _note_on_inputs(policy, plan, sizes, shape.sizes(precision, device), num_tokens)

    return [
        _fit_precision(precision, partial(sizes_in, precision), memory, partial(note_in, precision))
        for precision in Precision
    ]


def _note_on_inputs(policy: KVPolicy, plan: CapacityPlan, sizes: BlockSizes, exact: BlockSizes, num_tokens: int) -> str:
    """That inputs of `num_tokens` do not fit while they are read, uncompressed beside what becomes of them."""
    from swarm.server.capacity_plan import check_room_to_read, note_on_inputs

    check_room_to_read(plan, exact)
    per_token = plan.num_blocks * (sizes.kv_bytes_per_token + exact.kv_bytes_per_token)
    longest = plan.kv_bytes // per_token
    if longest >= num_tokens:
        return ""
    return note_on_inputs(policy.preset, plan.kv_bytes, f"about {longest:,}", num_tokens * per_token)


def _fit_precision(
    precision: Precision,
    measure: Callable[[], BlockSizes],
    memory: DeviceMemory,
    find_note: Callable[[CapacityPlan, BlockSizes], str],
) -> PrecisionRow:
    from swarm.server.capacity_plan import plan_capacity

    block_bytes: int | None = None
    try:
        sizes = measure()
        block_bytes = sum(sizes.weight_bytes) // sizes.num_blocks
        plan = plan_capacity(sizes, memory)
        note = find_note(plan, sizes)
    except SwarmError as error:  # no room, or a package is missing for this precision
        return PrecisionRow(
            weights=precision.value,
            block_bytes=block_bytes,
            num_blocks=0,
            kv_bytes=0,
            kv_tokens=0,
            sentence=sentence_for(error),
        )
    return PrecisionRow(
        weights=precision.value,
        block_bytes=block_bytes,
        num_blocks=plan.num_blocks,
        kv_bytes=plan.kv_bytes,
        kv_tokens=plan.kv_tokens,
        sentence=plan.sentence,
        note=note,
    )


def judge_fit(name: str, num_blocks: int, rows: list[PrecisionRow], *, kv_policy: str = FULL_CACHE.preset) -> Finding:
    """The doctor's line: the most precise way to hold the whole model, else the one that holds most of it."""
    best = next((row for row in rows if row.num_blocks == num_blocks), None) or max(
        rows, key=lambda row: row.num_blocks
    )
    if best.num_blocks == 0:
        return Finding(
            subject="model",
            verdict="problem",
            seen=f"{name}: {rows[-1].sentence}",
            advice="free memory, or choose a smaller model",
        )
    command = f"swarm serve {name} --weights {best.weights}"
    if kv_policy != FULL_CACHE.preset:
        command = f"{command} --kv {kv_policy}"
    if best.num_blocks < num_blocks:
        command = f"{command} --num-blocks {best.num_blocks}"
    if best.note:
        return Finding(subject="model", verdict="warn", seen=f"{name}: {best.sentence}. {best.note}", advice=command)
    return Finding(subject="model", verdict="ok", seen=f"{name}: {best.sentence}", advice=command)
