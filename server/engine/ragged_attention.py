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
from torch.nn.functional import scaled_dot_product_attention

from swarm.kvcache.page_table import PageTable
from swarm.server.engine.batched_decode import DecodeGroup
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


@dataclass
class ShapeProbe:
    """Learns what each layer stores, from one pass without pages."""

    shapes: dict[int, KVShape] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)
    """Positions each layer's queries see; 0 for all."""


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
    kernel = _Kernel(scaling=scaling, softcap=softcap, sinks=s_aux, window=window or 0)
    if not isinstance(plan, StepPlan):
        if plan is not None:
            plan.shapes[_layer_of(module)] = KVShape(key.shape[1], key.shape[-1], value.shape[-1])
            plan.windows[_layer_of(module)] = kernel.window
        return kernel.attend(query, key, value, start=0).transpose(1, 2), None
    layer = _layer_of(module)
    plan.store.write(layer, plan.slots[layer - plan.first_layer], key[0].transpose(0, 1), value[0].transpose(0, 1))
    if plan.groups:
        return _attend_with_groups(plan, layer, kernel, query, key, value).transpose(1, 2), None
    outputs = [_attend_slice(plan, index, layer, kernel, query, key, value) for index in range(len(plan.slices))]
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return packed.transpose(1, 2), None


def _layer_of(module: torch.nn.Module) -> int:
    layer: int = module.layer_idx  # type: ignore[assignment]
    return layer


def _attend_with_groups(
    plan: StepPlan, layer: int, kernel: _Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
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
        if part.end_row - part.first_row > 1 or part.start == 0:
            outputs = _attend_slice(plan, index, layer, kernel, query, key, value)
            packed[:, :, part.first_row : part.end_row] = outputs
    return packed


def _attend_slice(
    plan: StepPlan,
    index: int,
    layer: int,
    kernel: _Kernel,
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


def causal_mask(start: int, num_new: int, first_key: int, window: int, device: torch.device) -> torch.Tensor:
    """[t, n] booleans: which keys from position `first_key` on each of the new positions sees."""
    queries = torch.arange(start, start + num_new, device=device).unsqueeze(1)
    keys = torch.arange(first_key, start + num_new, device=device).unsqueeze(0)
    mask = keys <= queries
    if window:
        mask &= keys > queries - window
    return mask


@dataclass(frozen=True, slots=True)
class _Kernel:
    """What one layer's attention does besides softmax(QK)V."""

    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None
    window: int
    """Positions a query sees, itself included; 0 for all."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, start: int) -> torch.Tensor:
        """A whole sequence over itself, causal: [B, Hq, t, Dv]."""
        num_new = query.shape[2]
        is_plain = self.softcap is None and self.sinks is None and not (self.window and num_new > self.window)
        if is_plain:
            return scaled_dot_product_attention(
                query, key, value, is_causal=num_new > 1, scale=self.scaling, enable_gqa=key.shape[1] != query.shape[1]
            )
        mask = causal_mask(start, num_new, 0, self.window, query.device)
        return self.attend_masked(query, key, value, mask)

    def attend_masked(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Queries [B, Hq, t, D] over keys [B, Hk, n, D] under a mask [t, n] or [B, 1, 1, n]: [B, Hq, t, Dv]."""
        num_batch, num_heads, num_new, _ = query.shape
        num_kv_heads = key.shape[1]
        if self.softcap is None and self.sinks is None:
            if num_new == 1 and num_heads != num_kv_heads:
                # The heads of a group see the same keys, so they can pose as queries of one head: no
                # repeated keys, and about a third less time than enable_gqa on CPU.
                grouped = query.reshape(num_batch, num_kv_heads, -1, query.shape[-1])
                output = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=self.scaling)
                return output.reshape(num_batch, num_heads, 1, -1)
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.scaling, enable_gqa=num_heads != num_kv_heads
            )
        return self._attend_by_hand(query, key, value, mask)

    def _attend_by_hand(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores in the open, for what fused kernels lack: capped scores (gemma2), learned sinks (gpt_oss)."""
        num_batch, num_heads, num_new, head_dim = query.shape
        num_kv_heads = key.shape[1]
        grouped = query.reshape(num_batch, num_kv_heads, -1, head_dim)
        scaling = self.scaling if self.scaling is not None else head_dim**-0.5
        scores = torch.matmul(grouped, key.transpose(-1, -2)) * scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.reshape(num_batch, num_heads, num_new, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if self.sinks is not None:
            sinks = self.sinks.reshape(1, -1, 1, 1).expand(num_batch, -1, num_new, -1).to(scores.dtype)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        if self.sinks is not None:
            weights = weights[..., :-1]
        grouped_weights = weights.reshape(num_batch, num_kv_heads, -1, weights.shape[-1])
        return torch.matmul(grouped_weights, value).reshape(num_batch, num_heads, num_new, -1)
