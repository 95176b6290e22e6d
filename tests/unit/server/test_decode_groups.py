"""Which decoding sequences share a padded attention call."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarm.server.engine.decode_groups import group_by_length


@given(
    lengths=st.lists(st.integers(min_value=1, max_value=5000), max_size=60),
    max_padded_tokens=st.integers(min_value=1, max_value=20_000),
)
def test_every_sequence_attends_once_within_the_bounds(lengths: list[int], max_padded_tokens: int) -> None:
    """A sequence left out or run twice gives wrong tokens; too much padding or copying costs what grouping gains."""
    groups = group_by_length(lengths, max_padded_tokens=max_padded_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        members = [lengths[index] for index in group]
        assert max(members) <= 2 * min(members)
        assert len(group) == 1 or max(members) * len(group) <= max_padded_tokens


def test_equal_sequences_share_one_call() -> None:
    """The common case of many chats of like length must not be cut up."""
    assert group_by_length([100] * 8, max_padded_tokens=65_536) == [list(range(8))]
