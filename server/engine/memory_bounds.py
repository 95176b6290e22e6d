"""What one session can hold when all of a server's KV memory is its own, and what is said to one that wants more."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from swarm.errors import LengthLimitError

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.server.engine.compressed_sequence import Compression

__all__ = ["longest_input", "pages_for_input", "refuse_input", "refuse_session"]

_ADVICE = "use a shorter prompt or another server, or give this one more --kv-memory"


def pages_for_input(compression: Compression, span: Span, num_tokens: int) -> int:
    """Pages that a new compressed session takes to read an input of up to `chunk_tokens` in the blocks of `span`.

    All of it stands uncompressed, beside what is noted of it; at its end also beside what becomes of it.
    """
    held = compression.new_sequence(span)
    plan = held.table.plan(0, num_tokens, is_unfinished=False)
    return held.table.pages_wanted(plan, compression.events.max_new_tiles(held, num_tokens) if plan.ends_staging else 0)


def longest_input(compression: Compression, span: Span, *, num_pages: int) -> int:
    """Tokens of the longest input that a new compressed session can read, up to the policy's `chunk_tokens`."""
    lengths = range(1, compression.store.policy.chunk_tokens + 1)
    return bisect.bisect_right(lengths, num_pages, key=lambda length: pages_for_input(compression, span, length))


def refuse_session(num_tokens: int, *, is_exact: bool = True) -> LengthLimitError:
    """For a session that needs more than the whole memory, which holds `num_tokens`: waiting will not help."""
    held = f"{num_tokens} tokens in all" if is_exact else f"about {num_tokens} compressed tokens in all"
    return LengthLimitError(f"the session outgrows this server's whole KV memory, which holds {held}; {_ADVICE}")


def refuse_input(num_tokens: int) -> LengthLimitError:
    """For an input of which only `num_tokens` fit the whole memory uncompressed."""
    return LengthLimitError(
        "the input is too long for this server's whole KV memory: until it has been read it stands uncompressed, and "
        f"{num_tokens} tokens fit like this; {_ADVICE}"
    )
