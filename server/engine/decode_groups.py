"""Which decoding sequences attend together in one padded call. Pure.

On a GPU one attention call per sequence costs more in launches than in work, so sequences that add one
token share a call, padded to the longest of them. Sequences of like length go together, which keeps the
padding below half, and a call's padded keys stay within a limit, since they are copied for it.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["group_by_length"]


def group_by_length(lengths: Sequence[int], *, max_padded_tokens: int) -> list[list[int]]:
    """Groups of indices, longest first; within a group the longest is at most twice the shortest.

    `max_padded_tokens` bounds (longest of the group * members), except for a single sequence that is longer.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = groups and longest * (len(groups[-1]) + 1) <= max_padded_tokens and 2 * lengths[index] >= longest
        if fits:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = lengths[index]
    return groups
