"""Attention over what a compressed sequence keeps, without the kernel: with torch, and staged tokens beside it."""

# Letters: Hq, Hk query and KV heads, G = Hq / Hk, D, Dv key and value dimensions, b positions of a block, n keys.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from swarm.server.engine.attention_kind import AttentionKind
    from swarm.server.engine.compressed_layers import CodedLayer
    from swarm.server.engine.kept_entries import KeptEntries

__all__ = ["Block", "StagedKeys", "attend_kept"]

_MAX_SCORES: Final = 1 << 24
"""Scores of one KV head at a time, so that a long part over many tokens takes 64 MB for them."""


@dataclass(frozen=True, slots=True)
class Block:
    """Positions whose tokens are attended together."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class StagedKeys:
    """Tokens of an input that are not compressed yet."""

    keys: torch.Tensor
    """[Hk, n, D]"""
    values: torch.Tensor
    """[Hk, n, Dv]"""
    is_hidden: torch.Tensor
    """[b, n] bool: which of them each position of the block does not see."""


def attend_kept(
    kind: AttentionKind,
    coded: CodedLayer,
    block: Block,
    kept: KeptEntries,
    query: torch.Tensor,
    staged: StagedKeys | None = None,
) -> torch.Tensor:
    """Queries [Hq, b, D] of a block's positions over summary, sinks, stored rows and ring, then staged keys: outputs
    [Hq, b, Dv] float32.

    Stored rows are attended in the codec's coordinates, which queries and outputs are turned to and from: so all
    heads' rows are decoded at once, and none is turned.
    """
    raw, num_new = kept.raw, block.end - block.start
    num_heads, value_dim = len(raw.values), raw.values.shape[-1]
    plain_keys, plain_values = raw.keys.float(), raw.values.float()
    is_hidden = _hide(raw.positions, block, kind.window)
    biases = raw.biases
    if staged is not None:
        plain_keys = torch.cat((plain_keys, staged.keys.float()), dim=1)
        plain_values = torch.cat((plain_values, staged.values.float()), dim=1)
        is_hidden = torch.cat((is_hidden, staged.is_hidden), dim=1)
        biases = torch.cat((biases, biases.new_zeros(num_heads, staged.keys.shape[1])), dim=1)
    num_plain = plain_keys.shape[1]
    queries = query.float().reshape(num_heads, -1, num_new, query.shape[-1]) * kind.scale(query.shape[-1])
    group = queries.shape[1]
    turned = torch.bmm(queries.flatten(1, 2), coded.query_turn).unflatten(1, (group, num_new))
    outputs = query.new_empty(num_heads, group, num_new, value_dim, dtype=torch.float32)
    for head, rows in enumerate(kept.stored):
        num_keys = num_plain + len(rows.keys)
        for part_rows in torch.arange(num_new).split(max(1, _MAX_SCORES // (group * max(num_keys, 1)))):
            new = slice(int(part_rows[0]), int(part_rows[-1]) + 1)
            scores = query.new_empty(group, new.stop - new.start, num_keys, dtype=torch.float32)
            scores[..., :num_plain] = queries[head, :, new] @ plain_keys[head].T
            own = turned[head, :, new]
            scores[..., num_plain:] = own[..., :-1] @ rows.keys.T + own[..., -1:]
            if kind.softcap is not None:
                scores = torch.tanh(scores / kind.softcap) * kind.softcap
            scores[..., :num_plain] += biases[head]
            scores[..., :num_plain].masked_fill_(is_hidden[new], -torch.inf)
            if rows.positions is not None:
                scores[..., num_plain:].masked_fill_(_hide(rows.positions, block, kind.window)[new], -torch.inf)
            if kind.sinks is not None:
                sinks = kind.sinks[head * group : (head + 1) * group].float()
                scores = torch.cat((scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)), dim=-1)
            weights = scores.softmax(dim=-1)
            plain, over_rows = weights[..., :num_plain], weights[..., num_plain:num_keys]
            turn_back = coded.output_turn[head]
            outputs[head, :, new] = (
                plain @ plain_values[head]
                + (over_rows @ rows.values) @ turn_back[:-1]
                + over_rows.sum(dim=-1, keepdim=True) * turn_back[-1]
            )
    return outputs.flatten(0, 1)


def _hide(positions: torch.Tensor, block: Block, window: int) -> torch.Tensor:
    """[b, n] booleans: which keys at positions [n] each position of a block does not see."""
    new = torch.arange(block.start, block.end, device=positions.device)[:, None]
    is_hidden = positions > new
    if window:
        is_hidden |= positions <= new - window
    return is_hidden
