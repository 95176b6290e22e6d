"""What one layer's attention does, whatever memory its keys and values come from."""

# Letters: B sequences, t new tokens, n keys; Hq query heads, Hk KV heads; D, Dv head dimensions.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["AttentionKind", "causal_mask"]


def causal_mask(start: int, num_new: int, first_key: int, window: int, device: torch.device) -> torch.Tensor:
    """[t, n] booleans: which keys from position `first_key` on each of the new positions sees."""
    queries = torch.arange(start, start + num_new, device=device).unsqueeze(1)
    keys = torch.arange(first_key, start + num_new, device=device).unsqueeze(0)
    mask = keys <= queries
    if window:
        mask &= keys > queries - window
    return mask


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """What one layer's attention does besides softmax(QK)V."""

    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None
    window: int
    """Positions a query sees, itself included; 0 for all."""

    def scale(self, head_dim: int) -> float:
        """What scores are multiplied with."""
        return self.scaling if self.scaling is not None else head_dim**-0.5

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
        scores = torch.matmul(grouped, key.transpose(-1, -2)) * self.scale(head_dim)
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
