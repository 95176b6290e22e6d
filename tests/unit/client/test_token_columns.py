"""Which columns of a padded batch are sent."""

from __future__ import annotations

import pytest
import torch

from swarm.client.token_columns import check_consecutive, count_tokens, pad_left, real_columns, skip_tokens
from swarm.errors import BadInputError


def test_without_a_mask_every_column_is_a_token() -> None:
    """The common case must need no look at any tensor."""
    assert real_columns(None, 2, 3) == [slice(0, 3), slice(0, 3)]
    assert real_columns(torch.ones(2, 3), 2, 3) == [slice(0, 3), slice(0, 3)]


def test_padding_at_either_end_leaves_a_slice_of_tokens() -> None:
    """Slices are views: rows then travel without being copied."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    columns = real_columns(mask, 4, 4)
    assert columns == [slice(2, 4), slice(0, 3), slice(1, 3), slice(0, 0)]
    assert [count_tokens(of_row) for of_row in columns] == [2, 3, 2, 0]


def test_padding_between_tokens_is_left_out_too() -> None:
    """Batches of a conversation may hold padding after a short first answer."""
    (columns,) = real_columns(torch.tensor([[1, 0, 1, 1]]), 1, 4)
    assert isinstance(columns, torch.Tensor)
    assert columns.tolist() == [0, 2, 3]
    rest = skip_tokens(columns, 1)
    assert isinstance(rest, torch.Tensor)
    assert rest.tolist() == [2, 3]


def test_skipping_tokens_never_passes_the_end() -> None:
    """A row with nothing new is an empty slice, not a reversed one."""
    assert skip_tokens(slice(2, 5), 1) == slice(3, 5)
    assert skip_tokens(slice(2, 5), 9) == slice(5, 5)


def test_positions_that_servers_can_not_count_are_refused() -> None:
    """A server places the n-th token at position n; packed or spread-out positions would be run wrongly."""
    check_consecutive([slice(1, 4)], torch.tensor([[0, 0, 1, 2]]))
    check_consecutive([slice(0, 2), slice(0, 2)], torch.tensor([[7, 8]]))
    with pytest.raises(BadInputError, match="row 0 are not at consecutive positions"):
        check_consecutive([slice(0, 4)], torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(BadInputError, match="padding at the ends"):
        check_consecutive([torch.tensor([0, 2])], None)


def test_rows_are_padded_on_the_left() -> None:
    """New tokens are taken from the last column, so all rows must end there."""
    ids, mask = pad_left([[5, 6, 7], [8]], pad_token_id=0, device=torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask is not None
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad_left([[5], [8]], pad_token_id=0, device=torch.device("cpu"))[1] is None
