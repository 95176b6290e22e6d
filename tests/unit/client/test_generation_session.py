"""A conversation's history, apart from any model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swarm.client.block_pass import SessionPass
from swarm.client.generation_session import GenerationSession
from swarm.errors import BadInputError, LengthLimitError, SessionClosedError
from tests.cumulative_blocks import CumulativeBlocks


def _send(session: GenerationSession, ids: list[list[int]], sampled: list[int]) -> None:
    """One forward pass over `ids`, after which `sampled` follow."""
    tensor = torch.tensor(ids)
    cache = session.cache
    plan = cache.plan(num_rows=tensor.shape[0], num_columns=tensor.shape[1], mask=None, num_outputs=0)
    SessionPass(cache, plan, token_ids=tensor, num_outputs=0).run(tensor.float().unsqueeze(-1))
    after = torch.cat([tensor, torch.tensor(sampled)[:, None]], dim=1)
    cache.note_sampled(after, torch.zeros(len(sampled), dtype=torch.bool))


def _session(batch_size: int = 1, max_length: int = 16) -> GenerationSession:
    return GenerationSession(CumulativeBlocks(), max_length=max_length, batch_size=batch_size)


def _extend(session: GenerationSession, *rows: list[int], mask: list[list[int]] | None = None) -> list[list[int]]:
    return session.extend_history(torch.tensor(rows), None if mask is None else torch.tensor(mask))


def test_the_last_sampled_token_counts_although_it_was_not_sent() -> None:
    """It is part of what the user has read."""
    session = _session()
    _send(session, [[5, 6]], [7])
    assert session.token_ids == [[5, 6, 7]]
    assert session.position == 3
    assert session.cache.lengths == (2,)


def test_new_tokens_follow_the_history() -> None:
    """The plain use: only the user's next words are given."""
    session = _session()
    _send(session, [[5, 6]], [7])
    assert _extend(session, [8, 9]) == [[5, 6, 7, 8, 9]]


def test_what_begins_with_everything_sent_is_the_whole_history() -> None:
    """Chat templates render the whole conversation each turn; the last answer may have been edited at its end."""
    session = _session()
    _send(session, [[5, 6]], [7])
    assert _extend(session, [5, 6, 7, 8]) == [[5, 6, 7, 8]]
    assert _extend(session, [5, 6, 3]) == [[5, 6, 3]]
    assert _extend(session, [5, 9]) == [[5, 6, 7, 5, 9]]


def test_padding_is_no_history() -> None:
    """Batches pad the shorter row, and its next turn must not contain that."""
    session = _session(batch_size=2)
    assert _extend(session, [0, 5], [6, 7], mask=[[0, 1], [1, 1]]) == [[5], [6, 7]]


def test_setting_the_position_back_forgets_what_came_after() -> None:
    """To answer the same question again, or another one in its place."""
    session = _session()
    _send(session, [[5, 6, 8]], [7])
    session.position = 4
    assert session.token_ids == [[5, 6, 8, 7]]
    session.position = 3
    assert session.token_ids == [[5, 6, 8]]
    session.position = 1
    assert session.token_ids == [[5]]
    assert session.cache.lengths == (1,)
    assert _extend(session, [9]) == [[5, 9]]
    with pytest.raises(BadInputError, match="at position 1 and can only be set back, not to 2"):
        session.position = 2


@pytest.mark.parametrize("position", [1.5, "2", None])
def test_a_position_that_is_no_whole_number_changes_nothing(position: Any) -> None:
    """`len(text) / 2` is soon written; the conversation must survive it."""
    session = _session()
    _send(session, [[5, 6]], [7])
    with pytest.raises(BadInputError, match="whole number of tokens"):
        session.position = position
    session.position = 2
    assert session.token_ids == [[5, 6]]


def test_a_closed_session_says_so() -> None:
    """The servers' memory is gone; quietly starting anew would lose the history."""
    with _session() as session:
        _send(session, [[5]], [6])
    session.close()
    assert session.is_closed
    with pytest.raises(SessionClosedError, match="has been closed"):
        session.check_open()
    with pytest.raises(SessionClosedError):
        session.position = 0


def test_wrong_input_is_named() -> None:
    """Each mistake has its own sentence, before anything is sent."""
    session = _session(max_length=4)
    with pytest.raises(BadInputError, match="2 rows, the session 1 sequences"):
        _extend(session, [1], [2])
    with pytest.raises(BadInputError, match="sequence 0 of the session has no tokens yet"):
        session.extend_history(torch.empty((1, 0), dtype=torch.long), None)
    with pytest.raises(LengthLimitError, match="would have 5 tokens, and the session holds 4"):
        _extend(session, [1, 2, 3, 4, 5])
