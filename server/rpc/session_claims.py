"""What sessions are expected to take of a server's KV memory, in bytes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from swarm.kvcache.admission import Claim
from swarm.kvpolicy.streaming import tail_capacity

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.kvcache.footprint import Footprint

__all__ = ["KVSizes"]


@dataclass(frozen=True, kw_only=True)
class KVSizes:
    """The KV memory of one span, and what tokens take of it."""

    total_bytes: int
    exact_bytes_per_token: int
    """Of a token in all blocks of the span, in a session that is not compressed."""
    num_blocks: int
    footprint: Footprint | None = None
    """Of a compressed sequence in all blocks of the span; None where none is compressed."""

    @classmethod
    def of_tokens(cls, num_tokens_total: int) -> KVSizes:
        """For a server of which no more is known than how many tokens it holds: a token counts as one byte."""
        return cls(total_bytes=num_tokens_total, exact_bytes_per_token=1, num_blocks=1)

    def claim(self, num_tokens: int, *, max_sequences: int, span: Span, compresses: bool) -> Claim:
        """What a session takes that expects to use `num_tokens` positions of all its sequences together.

        A compressed session is counted at rest, as sequences of equal length that are long enough to fill the room
        for 16-bit tokens which each of them has. While an input is read, up to `chunk_tokens` of its tokens stand in
        uncompressed pages as well: that is claimed as passing, for one sequence, because steps wait for one another.

        Args:
            span: blocks that the session runs, of those that the server holds.
        """
        if not compresses or self.footprint is None:
            share = min(len(span), self.num_blocks) / self.num_blocks
            return Claim(round(num_tokens * self.exact_bytes_per_token * share))
        footprint = _narrow(self.footprint, span)
        num_sequences = max(1, min(max_sequences, num_tokens // tail_capacity(footprint.policy)))
        num_each = -(-num_tokens // num_sequences)
        return Claim(num_sequences * footprint.sequence_bytes(num_each), footprint.staging_bytes(num_each))

    def convert_tokens(self, num_tokens_free: int, *, compresses: bool) -> int:
        """Announced free tokens, which are those of the server's policy, as tokens of a session."""
        if compresses or self.footprint is None:
            return num_tokens_free
        return num_tokens_free * self.footprint.bytes_per_token // self.exact_bytes_per_token


def _narrow(footprint: Footprint, span: Span) -> Footprint:
    layers = tuple(layer for layer in footprint.layers if span.start <= layer < span.end)
    return footprint if layers == footprint.layers else replace(footprint, layers=layers)
