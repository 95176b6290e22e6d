"""Where the steps of compressed sessions may be cut into parts. Pure: a part means something else than a whole step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from swarm.kvpolicy.streaming import TailState, cut_step, is_staged, tail_start

if TYPE_CHECKING:
    from swarm.kvpolicy.settings import KVPolicy
    from swarm.server.session_mirror import SequenceStep

__all__ = ["Stretch", "count_allowed", "find_stretches", "least_part_tokens"]

_LEAST_TOKENS_AFTER_STORED: Final = 32
"""With so many, a part's own tokens take longer than decoding what 4,000 tokens left, which each part does anew."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive tokens of one sequence in a step."""

    num_tokens: int
    is_whole: bool
    """Whether all of it runs in one part: what goes into the tail's ring at once does."""
    ends_part: bool
    """Whether a part ends with it: there an input is compressed even though it goes on."""
    is_after_stored: bool = False
    """Whether its tokens, staged, attend over stored rows, which are decoded anew for each part."""


def find_stretches(
    policy: KVPolicy, items: Sequence[SequenceStep], goes_on: Callable[[int, int], bool]
) -> list[Stretch]:
    """The stretches of a step, in order.

    Args:
        goes_on: whether a sequence, by its number, stands inside an input that goes on at a position.
    """
    stretches: list[Stretch] = []
    for item in items:
        is_staging = item.start > 0 and goes_on(item.parent, item.start)
        # Between inputs, what is stored depends on the length alone.
        tail = TailState(tail_start(policy, item.start), is_staging=is_staging)
        if not is_staged(policy, tail, item.start, item.count, is_unfinished=item.is_unfinished):
            stretches.append(Stretch(item.count, True, False))
            continue
        cuts = cut_step(policy, item.start, item.count)
        # Within an input nobody here knows where that began; a first one stores nothing before the first cut.
        has_stored = item.start >= policy.chunk_tokens if is_staging else tail.stored_end > policy.num_sinks
        stretches += [
            Stretch(count, False, index < len(cuts) - 1, has_stored or index > 0) for index, count in enumerate(cuts)
        ]
    return stretches


def least_part_tokens(stretches: Sequence[Stretch], num_done: int) -> int:
    """Tokens that the next part should have at least: many where all stored rows are decoded for it alone."""
    for stretch in stretches:
        if num_done < stretch.num_tokens:
            return _LEAST_TOKENS_AFTER_STORED if stretch.is_after_stored else 1
        num_done -= stretch.num_tokens
    return 1


def count_allowed(stretches: Sequence[Stretch], num_done: int, wanted: int) -> int:
    """Tokens of the next part: `wanted` or fewer, or more where the first stretch is whole and longer."""
    taken = 0
    for stretch in stretches:
        if num_done >= stretch.num_tokens:
            num_done -= stretch.num_tokens
            continue
        left = stretch.num_tokens - num_done
        num_done = 0
        if stretch.is_whole and taken + left > wanted:
            return taken or left
        taken += min(left, wanted - taken)
        if taken == wanted or stretch.ends_part:
            return taken
    return taken
