"""What `swarm doctor MODEL` finds out: how much of a model fits this machine, without loading any of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swarm.cli.examination import Finding
from swarm.cli.failures import sentence_for
from swarm.errors import SwarmError

if TYPE_CHECKING:
    from swarm.models import ModelSource
    from swarm.models.block_sizes import ModelShape
    from swarm.models.progress import ProgressReporter
    from swarm.server.capacity_plan import DeviceMemory
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

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "block_bytes": self.block_bytes,
            "num_blocks": self.num_blocks,
            "kv_bytes": self.kv_bytes,
            "kv_tokens": self.kv_tokens,
            "explanation": self.sentence,
        }


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """A model on this machine."""

    name: str
    num_blocks: int
    device: str
    source: ModelSource | None
    """The model itself, where it was asked for."""
    rows: tuple[PrecisionRow, ...]
    """Most precise first."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_blocks": self.num_blocks,
            "device": self.device,
            "fits": [row.to_json() for row in self.rows],
        }


def examine_model(
    name: str, report: ProgressReporter, *, wants_identity: bool = False
) -> tuple[ModelReport | None, Finding]:
    """How much of a model fits here in each precision, from its config alone; None where it was not found.

    `wants_identity` looks at the weight files too, to know which servers have the same model.
    """
    from swarm.models import resolve_model, unsupported_reason
    from swarm.models.block_sizes import measure_model_shape
    from swarm.models.source import read_config
    from swarm.server.device_memory import find_default_device, measure_device_memory

    try:
        source = resolve_model(name, report=report) if wants_identity else None
        config = source.config if source is not None else read_config(name, report=report)
        device = find_default_device()
        reason = unsupported_reason(config)
        if reason is not None:
            return None, Finding(subject="model", verdict="problem", seen=reason, advice="choose another model")
        shape = measure_model_shape(config)
        rows = fit_precisions(shape, device, measure_device_memory(device))
    except SwarmError as error:
        return None, Finding(subject="model", verdict="problem", seen=sentence_for(error))
    num_blocks = len(shape.blocks)
    fit = ModelReport(name=name, num_blocks=num_blocks, device=device, source=source, rows=tuple(rows))
    return fit, judge_fit(name, num_blocks, rows)


def fit_precisions(shape: ModelShape, device: str, memory: DeviceMemory) -> list[PrecisionRow]:
    """One row for each precision, most precise first; `device` is "cpu" or "cuda:N"."""
    from swarm.weights import Precision

    return [_fit_precision(shape, precision, device, memory) for precision in Precision]


def _fit_precision(shape: ModelShape, precision: Precision, device: str, memory: DeviceMemory) -> PrecisionRow:
    from swarm.server.capacity_plan import plan_capacity

    block_bytes: int | None = None
    try:
        sizes = shape.sizes(precision, device)
        block_bytes = sum(sizes.weight_bytes) // sizes.num_blocks
        plan = plan_capacity(sizes, memory)
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
    )


def judge_fit(name: str, num_blocks: int, rows: list[PrecisionRow]) -> Finding:
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
    if best.num_blocks < num_blocks:
        command = f"{command} --num-blocks {best.num_blocks}"
    return Finding(subject="model", verdict="ok", seen=f"{name}: {best.sentence}", advice=command)
