"""Attention for a packed batch: every sequence over its own pages, whatever stands beside it.

Registered with transformers' AttentionInterface under ATTENTION_NAME and without a mask function of that
name, so families build no masks and hand over rotated queries, keys and values of all sequences as one row.
The step plan comes by context variable, because some families drop unknown keyword arguments on the way.
"""

# Letters: T tokens of all sequences, t of one; Hq query heads, Hk KV heads, G = Hq / Hk; n keys; D head dimension.

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from swarm.kvcache.page_table import PageTable
from swarm.server.engine.attention_kind import AttentionKind, causal_mask
from swarm.server.engine.batched_decode import DecodeGroup
from swarm.server.engine.compressed_attention import CompressedStep
from swarm.server.engine.page_store import KVShape, PageStore

__all__ = ["ATTENTION_NAME", "SequenceSlice", "ShapeProbe", "StepPlan", "current_plan", "register"]

ATTENTION_NAME: Final = "swarm_ragged"


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One sequence's new tokens within a packed batch."""

    first_row: int
    end_row: int
    start: int
    """Absolute position of the first new token; the table holds this many positions before it."""
    table: PageTable


@dataclass
class StepPlan:
    """Where the keys and values of one step go and come from."""

    store: PageStore
    slices: list[SequenceSlice]
    slots: torch.Tensor
    """[layers, T] token slots of the new tokens."""
    first_layer: int = 0
    """Layer of the loaded span that the tables' first row belongs to."""
    groups: list[DecodeGroup] = field(default_factory=list)
    """Slices of one token that attend in shared calls; the others attend one by one."""
    masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """Masks by slice and window, shared by the layers of a step."""
    paged_rows: torch.Tensor | None = None
    """Rows whose tokens stand at `slots`; None for all."""
    compressed: CompressedStep | None = None
    """Compressed sequences among the packed ones."""
    positions: torch.Tensor | None = None
    """[T] int64, of the packed tokens."""
    scores: dict[int, torch.Tensor] | None = None
    """[Hk, T] float32 by layer, how much new tokens seem to matter; None where nobody wants to know."""


@dataclass
class ShapeProbe:
    """Learns what each layer stores, from one pass without pages."""

    shapes: dict[int, KVShape] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)
    """Positions each layer's queries see; 0 for all."""
    scalings: dict[int, float] = field(default_factory=dict)
    """What each layer multiplies scores with."""
    query_values: dict[int, int] = field(default_factory=dict)
    """Of a token's queries in each layer, all heads."""


current_plan: ContextVar[StepPlan | ShapeProbe | None] = ContextVar("swarm_step_plan", default=None)


def register() -> None:
    """Make the function known to transformers; harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, ragged_attention)


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query [1, Hq, T, D], key and value [1, Hk, T, D] to [1, T, Hq, Dv].

    Without a plan the row is one whole sequence from position 0, differentiable.
    """
    plan = current_plan.get()
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    kernel = AttentionKind(scaling=scaling, softcap=softcap, sinks=s_aux, window=window or 0)
    if not isinstance(plan, StepPlan):
        if plan is not None:
            plan.shapes[_layer_of(module)] = KVShape(key.shape[1], key.shape[-1], value.shape[-1])
            plan.windows[_layer_of(module)] = kernel.window
            plan.query_values[_layer_of(module)] = query.shape[1] * query.shape[-1]
            plan.scalings[_layer_of(module)] = kernel.scale(query.shape[-1])
        return kernel.attend(query, key, value, start=0).transpose(1, 2), None
    layer = _layer_of(module)
    if plan.compressed is not None:
        return _attend_mixed(plan, plan.compressed, layer, kernel, query, key, value).transpose(1, 2), None
    plan.store.write(layer, plan.slots[layer - plan.first_layer], key[0].transpose(0, 1), value[0].transpose(0, 1))
    if plan.groups:
        return _attend_with_groups(plan, layer, kernel, query, key, value).transpose(1, 2), None
    outputs = [_attend_slice(plan, index, layer, kernel, query, key, value) for index in range(len(plan.slices))]
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return packed.transpose(1, 2), None


def _layer_of(module: torch.nn.Module) -> int:
    layer: int = module.layer_idx  # type: ignore[assignment]
    return layer


def _attend_mixed(
    plan: StepPlan,
    compressed: CompressedStep,
    layer: int,
    kernel: AttentionKind,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Outputs [1, Hq, T, Dv] of compressed sequences and exact ones."""
    row = layer - plan.first_layer
    key, value = compressed.round(key), compressed.round(value)
    rows = plan.paged_rows
    if rows is None or len(rows):
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        if rows is not None:
            keys, values = keys.index_select(0, rows), values.index_select(0, rows)
        plan.store.write(layer, plan.slots[row], keys, values)
    if plan.slices:
        packed = _attend_with_groups(plan, layer, kernel, query, key, value)
    else:
        packed = query.new_empty(1, query.shape[1], query.shape[2], value.shape[-1])
    compressed.attend(layer, row, kernel, query[0], key[0], value[0], packed[0])
    return packed


def _attend_with_groups(
    plan: StepPlan, layer: int, kernel: AttentionKind, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Outputs [1, Hq, T, Dv]: slices of one token in shared calls, the others one by one."""
    packed = query.new_empty(1, query.shape[1], query.shape[2], value.shape[-1])
    row = layer - plan.first_layer
    for group in plan.groups:
        keys, values = plan.store.gather(layer, group.slots(row, kernel.window))
        newest = query[0].index_select(1, group.rows).transpose(0, 1).unsqueeze(2)
        mask = group.visible(kernel.window)[:, None, None]
        outputs = kernel.attend_masked(newest, keys, values, mask)
        packed[0].index_copy_(1, group.rows, outputs.squeeze(2).transpose(0, 1))
    for index, part in enumerate(plan.slices):
        if not plan.groups or part.end_row - part.first_row > 1 or part.start == 0:
            outputs = _attend_slice(plan, index, layer, kernel, query, key, value)
            packed[:, :, part.first_row : part.end_row] = outputs
    return packed


def _attend_slice(
    plan: StepPlan,
    index: int,
    layer: int,
    kernel: AttentionKind,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """One sequence's outputs [1, Hq, t, Dv]."""
    part = plan.slices[index]
    rows = slice(part.first_row, part.end_row)
    num_new = part.end_row - part.first_row
    if part.start == 0 and num_new > 1:
        return kernel.attend(query[:, :, rows], key[:, :, rows], value[:, :, rows], start=0)
    end = part.start + num_new
    first_key = max(part.start - kernel.window + 1, 0) if kernel.window else 0
    row = layer - plan.first_layer
    keys, values = plan.store.read(layer, part.table.pages[row], int(part.table.first_breaks[row]), first_key, end)
    mask = None
    if num_new > 1:
        mask = plan.masks.get((index, kernel.window))
        if mask is None:
            mask = causal_mask(part.start, num_new, first_key, kernel.window, query.device)
            plan.masks[index, kernel.window] = mask
    return kernel.attend_masked(query[:, :, rows], keys, values, mask)
