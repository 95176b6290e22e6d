"""The bookkeeping between transformers' padded columns and each sequence's positions."""

from __future__ import annotations

import pytest
import torch

from swarm.client.block_pass import SessionPass, StatelessPass
from swarm.client.generation_cache import GenerationCache
from swarm.client.generation_hooks import bounded_candidates
from swarm.errors import BadInputError, LengthLimitError, SessionClosedError
from tests.cumulative_blocks import CumulativeBlocks, CumulativeSession


class Driver:
    """Plays transformers: shows values column by column and reads sums back."""

    def __init__(self, max_length: int = 64) -> None:
        self.blocks = CumulativeBlocks()
        self.cache = GenerationCache(self.blocks, max_length=max_length)

    @property
    def session(self) -> CumulativeSession:
        (session,) = self.blocks.sessions
        return session

    def show(
        self, values: list[list[int]], *, mask: list[list[int]] | None = None, num_outputs: int = 0
    ) -> list[list[int]]:
        """Values [B, T] as hidden states of size 1, sums [B, T] back."""
        hidden = torch.tensor(values, dtype=torch.float32).unsqueeze(-1)
        plan = self.cache.plan(
            num_rows=len(values),
            num_columns=len(values[0]),
            mask=None if mask is None else torch.tensor(mask),
            num_outputs=num_outputs,
        )
        block_pass = SessionPass(self.cache, plan, token_ids=None, num_outputs=num_outputs)
        sums: list[list[int]] = block_pass.run(hidden).squeeze(-1).long().tolist()
        return sums

    def num_sent(self, step: int = -1) -> int:
        return sum(len(item.hidden) for item in self.session.steps[step])


def test_new_columns_continue_each_row() -> None:
    """The plain case: a prompt, then a token at a time."""
    driver = Driver()
    assert driver.show([[1, 2, 3]]) == [[1, 3, 6]]
    assert driver.show([[4]]) == [[10]]
    assert driver.cache.get_seq_length() == 4
    assert driver.cache.lengths == (4,)


def test_padding_is_never_sent_and_takes_no_position() -> None:
    """Servers hold only real tokens, so a padded batch costs no more than its tokens."""
    driver = Driver()
    assert driver.show([[1, 2, 3], [0, 0, 5]], mask=[[1, 1, 1], [0, 0, 1]]) == [[1, 3, 6], [0, 0, 5]]
    assert driver.num_sent() == 4
    assert driver.show([[4], [6]], mask=[[1, 1, 1, 1], [0, 0, 1, 1]]) == [[10], [11]]
    assert driver.cache.lengths == (4, 2)
    assert driver.cache.get_seq_length() == 4


def test_only_outputs_that_are_needed_come_back() -> None:
    """A long prompt's hidden states would otherwise travel for nothing; the rest reads as zeros."""
    driver = Driver()
    assert driver.show([[1, 2, 3]], num_outputs=1) == [[0, 0, 6]]


def test_a_long_prompt_with_candidates_is_split_so_only_their_outputs_travel() -> None:
    """Assisted decoding needs a few outputs of a prompt that may be thousands of tokens long."""
    driver = Driver(max_length=256)
    values = list(range(1, 101))
    sums = driver.show([values], num_outputs=3)[0]
    assert sums[:97] == [0] * 97
    assert sums[97:] == [sum(values[:98]), sum(values[:99]), sum(values)]
    assert [driver.num_sent(0), driver.num_sent(1)] == [97, 3]


def test_cropped_columns_are_rewound_with_the_next_step() -> None:
    """Assisted decoding drops rejected candidates after every step; a message just for that would cost a trip."""
    driver = Driver()
    driver.show([[1, 2, 3, 4]])
    driver.cache.crop(-2)
    driver.cache.crop(0)
    assert driver.cache.get_seq_length() == 2
    assert len(driver.session.steps) == 1
    assert driver.show([[10]]) == [[13]]
    assert driver.session.steps[-1][0].start == 2


def test_cropping_counts_only_the_tokens_among_the_columns() -> None:
    """A row whose dropped columns are padding keeps all its tokens."""
    driver = Driver()
    driver.show([[1, 2, 3], [0, 0, 5]], mask=[[1, 1, 1], [0, 0, 1]])
    driver.cache.crop(-1)
    assert driver.cache.lengths == (2, 0)
    driver.cache.crop(-1)
    assert driver.cache.lengths == (1, 0)


def test_cropping_more_than_there_is_is_refused() -> None:
    """It would leave the books and the servers apart."""
    driver = Driver()
    driver.show([[1, 2]])
    for wrong in (1, -3):
        with pytest.raises(BadInputError, match="on a cache of 2 columns"):
            driver.cache.crop(wrong)


def test_reordered_beams_fork_with_the_next_step() -> None:
    """Beams swap parents after every token, and all parents must be read before any is overwritten."""
    driver = Driver()
    driver.show([[1, 2], [3, 4], [5, 6]])
    driver.cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert driver.show([[10], [20], [30]]) == [[17], [27], [33]]
    driver.cache.reorder_cache(torch.tensor([2, 0, 0]))
    driver.cache.reorder_cache(torch.tensor([1, 2, 0]))
    assert driver.show([[100], [200], [300]]) == [[117], [217], [333]]


def test_equal_prompts_travel_once() -> None:
    """Five beams begin as five copies of one prompt."""
    driver = Driver()
    assert driver.show([[1, 2], [1, 2], [3, 4], [3, 4]]) == [[1, 3], [1, 3], [3, 7], [3, 7]]
    assert driver.num_sent() == 4
    assert driver.show([[10], [20], [30], [40]]) == [[13], [23], [37], [47]]
    assert driver.session.lengths == (3, 3, 3, 3)


def test_finished_rows_are_no_longer_sent() -> None:
    """In a batch short answers would otherwise cost as much as the longest."""
    driver = Driver()
    driver.show([[1, 2], [3, 4]])
    driver.cache.note_sampled(torch.tensor([[1, 2, 9], [3, 4, 9]]), torch.tensor([False, True]))
    assert driver.show([[10], [99]]) == [[13], [0]]
    assert driver.num_sent() == 1
    assert driver.cache.lengths == (3, 2)
    driver.cache.crop(-1)
    assert driver.cache.lengths == (2, 2)


def test_a_finished_copy_is_forked_before_its_source_moves_on() -> None:
    """Its history must stay reachable for the session's next call, whatever its source does later."""
    driver = Driver()
    driver.show([[1, 2], [1, 2]])
    driver.cache.note_sampled(torch.tensor([[1, 2, 9], [1, 2, 9]]), torch.tensor([False, True]))
    driver.show([[10], [99]])
    assert driver.session.inputs[1].squeeze(-1).tolist() == [1, 2]


def test_when_all_rows_have_finished_nothing_is_sent() -> None:
    """Some devices run one step more than needed."""
    driver = Driver()
    driver.show([[1], [2]])
    driver.cache.note_sampled(torch.tensor([[1, 9], [2, 9]]), torch.tensor([True, True]))
    assert driver.show([[5], [6]]) == [[0], [0]]
    assert len(driver.session.steps) == 1


def test_a_replay_sends_only_what_is_new() -> None:
    """A session's next call shows the whole history again."""
    driver = Driver()
    driver.show([[1, 2, 3], [4, 5, 6]])
    driver.cache.begin_call()
    assert driver.cache.get_seq_length() == 0
    shown = [[0, 1, 2, 3, 7], [4, 5, 6, 8, 9]]
    assert driver.show(shown, mask=[[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], num_outputs=1) == [
        [0, 0, 0, 0, 13],
        [0, 0, 0, 0, 32],
    ]
    assert driver.num_sent() == 3
    assert driver.cache.lengths == (4, 5)


def test_a_replay_with_nothing_new_computes_the_last_output_again() -> None:
    """After a rewind the next token follows from a position that was computed before."""
    driver = Driver()
    driver.show([[1, 2, 3]])
    driver.cache.begin_call()
    assert driver.show([[1, 2, 3]], num_outputs=1) == [[0, 0, 6]]
    assert driver.num_sent() == 1


def test_a_failed_step_changes_nothing() -> None:
    """The caller may free memory or shorten the input and try again."""
    driver = Driver(max_length=3)
    driver.show([[1, 2]])
    with pytest.raises(LengthLimitError):
        driver.show([[3, 4]])
    assert driver.cache.lengths == (2,)
    assert driver.show([[3]]) == [[6]]


def test_a_closed_cache_says_so() -> None:
    """What generate returns as past_key_values must not look usable."""
    driver = Driver()
    driver.show([[1]])
    driver.cache.close()
    driver.cache.close()
    assert driver.session.is_closed
    with pytest.raises(SessionClosedError, match=r"model\.session\(\)"):
        driver.show([[1]])


def test_another_number_of_rows_is_refused() -> None:
    """Rows are sequences of the session, fixed when it was opened."""
    driver = Driver()
    driver.show([[1], [2]])
    with pytest.raises(BadInputError, match="3 rows, the session 2 sequences"):
        driver.show([[1], [2], [3]])


def test_a_stateless_pass_sends_tokens_only_and_carries_gradients() -> None:
    """Training pads on the right; padding must neither travel nor receive gradients."""
    hidden = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]], requires_grad=True)
    output = StatelessPass(CumulativeBlocks(), [slice(0, 2), slice(0, 1)]).run(hidden)
    assert output.squeeze(-1).tolist() == [[1.0, 3.0], [3.0, 0.0]]
    output.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.squeeze(-1).tolist() == [[2.0, 1.0], [1.0, 0.0]]


def test_candidates_are_no_more_than_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking back what a server has compressed means sending everything again, at every wrong guess."""
    driver = Driver()
    assert driver.cache.num_candidates(3) is None
    monkeypatch.setattr(CumulativeBlocks, "may_compress", True)
    assert driver.cache.num_candidates(3) == 0, "the first step goes to servers that nobody knows yet"
    driver.show([[1, 2, 3]])
    assert driver.cache.num_candidates(4) is None
    asked: list[tuple[int, int]] = []

    def room(session: CumulativeSession, sequence: int, start: int) -> int | None:
        asked.append((sequence, start))
        return 6

    monkeypatch.setattr(CumulativeSession, "room_to_take_back", room)
    assert driver.cache.num_candidates(4) == 5, "one token has been chosen and not been sent"
    assert driver.cache.num_candidates(12) == 0
    driver.show([[4, 5, 6]])
    driver.cache.crop(-4)
    assert driver.cache.num_candidates(3) == 5
    assert asked == [(0, 3), (0, 3), (0, 2)]
    calls: list[torch.Tensor] = []

    def propose(input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(input_ids)
        return torch.arange(input_ids.shape[1] + 20)[None], torch.zeros(1, 20, 7)

    ids, logits = bounded_candidates(propose, 100, driver.cache.num_candidates, torch.arange(3)[None])
    assert logits is not None and ids.shape == (1, 8) and logits.shape == (1, 5, 7)
