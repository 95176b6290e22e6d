"""A conversation over several generate calls: the ids of a fresh run over the whole history, at the cost of the new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from swarm.client.generation_session import GenerationSession
from swarm.errors import BadInputError, LengthLimitError, SessionClosedError
from tests.local_blocks import LocalSession
from tests.model_pair import GREEDY, Pair, prompt
from tests.tiny_models import build_tiny_model

SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.9,
    "top_k": 30,
    "repetition_penalty": 1.4,
    "pad_token_id": 0,
}


def _fresh(pair: Pair, *parts: torch.Tensor, **settings: Any) -> torch.Tensor:
    """New ids that the local model gives for the whole history."""
    history = torch.cat(parts, dim=1)
    result: torch.Tensor = pair.local.generate(history, **settings)[:, history.shape[1] :]
    return result


def _sent(pair: Pair) -> LocalSession:
    return pair.blocks.sessions[-1]


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_three_calls_send_only_new_tokens(pair: Pair, settings: dict[str, Any]) -> None:
    """Sending the history again with every turn is what makes long chats slow."""
    settings = {"eos_token_id": None, **settings}
    history = torch.empty((1, 0), dtype=torch.long)
    with pair.remote.session(max_length=256) as session:
        for turn, (num_given, num_new) in enumerate([(12, 20), (5, 20), (7, 10)]):
            given = prompt(num_given, seed=turn)
            torch.manual_seed(turn)
            expected = _fresh(pair, history, given, max_new_tokens=num_new, **settings)
            sent_before = _sent(pair).num_tokens_sent
            torch.manual_seed(turn)
            result = pair.remote.generate(given, session=session, max_new_tokens=num_new, **settings)
            assert torch.equal(result, torch.cat([given, expected], dim=1))
            # The last token of the turn before was not sent yet, nor is the last of this one.
            assert _sent(pair).num_tokens_sent - sent_before == num_given + num_new - 1 + (turn > 0)
            history = torch.cat([history, result], dim=1)
            assert session.token_ids == history.tolist()
            assert session.position == history.shape[1]
        assert [(hop.start, hop.end) for hop in session.route] == [(0, 1), (1, 4), (4, 6)]
        assert session.num_failovers == 0
    assert len(pair.blocks.sessions) == 1
    assert _sent(pair).is_closed


def test_the_whole_history_may_be_given_instead(pair: Pair) -> None:
    """Chat templates render the whole conversation each time."""
    with pair.remote.session() as session:
        first = pair.remote.generate(prompt(), session=session, max_new_tokens=10, **GREEDY)
        whole = torch.cat([first, prompt(4, seed=2)], dim=1)
        expected = pair.local.generate(whole, max_new_tokens=10, **GREEDY)
        assert torch.equal(pair.remote.generate(whole, session=session, max_new_tokens=10, **GREEDY), expected)
        assert _sent(pair).steps[first.shape[1] - 12].num_tokens == 5
        assert session.token_ids == expected.tolist()


def test_without_new_tokens_the_answer_goes_on(pair: Pair) -> None:
    """After an answer that was cut short, or to read it in portions."""
    settings = {"eos_token_id": None, **GREEDY}
    expected = pair.local.generate(prompt(), max_new_tokens=20, **settings)
    with pair.remote.session() as session:
        first = pair.remote.generate(prompt(), session=session, max_new_tokens=8, **settings)
        rest = pair.remote.generate(session=session, max_new_tokens=12, **settings)
        assert torch.equal(torch.cat([first, rest], dim=1), expected)
        assert _sent(pair).num_tokens_sent == 12 + 19


@pytest.mark.parametrize("position", [0, 5, 12, 17, 22])
def test_rewinding_equals_a_fresh_run(pair: Pair, position: int) -> None:
    """To ask again differently, from any point, without beginning anew."""
    settings = {"max_new_tokens": 10, "eos_token_id": None, **GREEDY}
    with pair.remote.session(max_length=64) as session:
        first = pair.remote.generate(prompt(), session=session, **settings)
        session.position = position
        assert session.position == position
        sent_before = _sent(pair).num_tokens_sent
        other = prompt(6, seed=9)
        result = pair.remote.generate(other, session=session, **settings)
        assert torch.equal(result[:, 6:], _fresh(pair, first[:, :position], other, **settings))
        pending = position == 22
        assert _sent(pair).num_tokens_sent - sent_before == 6 + 9 + pending


def test_the_same_question_can_be_answered_again(pair: Pair) -> None:
    """Nothing new to send then, but the last position's output is needed once more."""
    with pair.remote.session() as session:
        first = pair.remote.generate(prompt(), session=session, max_new_tokens=10, **GREEDY)
        session.position = 12
        again = pair.remote.generate(session=session, max_new_tokens=10, **GREEDY)
        assert torch.equal(first[:, 12:], again)
        torch.manual_seed(4)
        session.position = 12
        sampled = pair.remote.generate(session=session, max_new_tokens=10, **SAMPLED)
        torch.manual_seed(4)
        assert torch.equal(sampled, _fresh(pair, prompt(), max_new_tokens=10, **SAMPLED))


def test_a_position_ahead_is_refused(pair: Pair) -> None:
    """There is nothing there."""
    with pair.remote.session() as session:
        pair.remote.generate(prompt(), session=session, max_new_tokens=4, eos_token_id=None, **GREEDY)
        with pytest.raises(BadInputError, match="at position 16 and can only be set back, not to 17"):
            session.position = 17


def test_a_batch_of_conversations(pair: Pair) -> None:
    """Rows of different lengths, that end at different times, each with its own history."""
    first_ids = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])
    settings = {"max_new_tokens": 12, **GREEDY}
    free = pair.local.generate(first_ids, attention_mask=first_ids != 0, eos_token_id=None, **settings)
    end_token = int(free[0, 5 + 3])
    settings["eos_token_id"] = end_token
    histories = [[5, 6, 7, 8, 9], [11, 12, 13]]
    second_ids = torch.tensor([[21, 22], [0, 23]])
    with pair.remote.session(max_length=64, batch_size=2) as session:
        for ids in (first_ids, second_ids):
            new = [[token_id for token_id in row if token_id] for row in ids.tolist()]
            if ids is second_ids:
                histories = [history + row for history, row in zip(histories, new, strict=True)]
            result = pair.remote.generate(ids, attention_mask=(ids != 0).long(), session=session, **settings)
            for row, history in enumerate(histories):
                answer = _fresh(pair, torch.tensor([history]), **settings)[0].tolist()
                returned = result[row, ids.shape[1] :].tolist()
                assert returned[: len(answer)] == answer
                assert not any(returned[len(answer) :])
                history += answer
            assert session.token_ids == histories
        assert len(histories[0]) != len(histories[1])


def test_assisted_decoding_in_a_session(pair: Pair) -> None:
    """Rejected candidates must leave no trace in the history."""
    settings = {"max_new_tokens": 20, "assistant_model": build_tiny_model("llama", seed=3), "eos_token_id": None}
    with pair.remote.session(max_length=256) as session:
        first = pair.remote.generate(prompt(40), session=session, **settings, **GREEDY)
        second = pair.remote.generate(prompt(5, seed=2), session=session, **settings, **GREEDY)
        expected = _fresh(pair, first, prompt(5, seed=2), max_new_tokens=20, eos_token_id=None, **GREEDY)
        assert torch.equal(second[:, 5:], expected)
        assert session.token_ids == torch.cat([first, second], dim=1).tolist()


def test_streamers_hear_the_turn_not_the_history(pair: Pair) -> None:
    """A terminal chat would otherwise print everything again with every turn."""

    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.values: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.values += value.flatten().tolist()

        def end(self) -> None:
            self.values.append(-1)

    with pair.remote.session() as session:
        for turn in range(2):
            recorder = Recorder()
            result = pair.remote.generate(
                prompt(4, seed=turn), session=session, streamer=recorder, max_new_tokens=6, **GREEDY
            )
            assert recorder.values == [*result[0].tolist(), -1]


def test_output_objects_begin_with_what_was_given(pair: Pair) -> None:
    """The same rule as for plain ids."""
    with pair.remote.session() as session:
        pair.remote.generate(prompt(), session=session, max_new_tokens=5, **GREEDY)
        given = prompt(3, seed=2)
        result = pair.remote.generate(
            given, session=session, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, **GREEDY
        )
        assert torch.equal(result.sequences[:, :3], given)
        assert result.sequences.shape[1] == 3 + len(result.scores)


def test_an_interrupted_call_leaves_the_session_usable(pair: Pair) -> None:
    """Ctrl-C stops an answer, not the conversation."""
    settings = {"max_new_tokens": 10, "eos_token_id": None, **GREEDY}
    with pair.remote.session() as session:
        pair.blocks.fail_at_step = 4
        with pytest.raises(KeyboardInterrupt):
            pair.remote.generate(prompt(), session=session, **settings)
        pair.blocks.fail_at_step = None
        said = _fresh(pair, prompt(), max_new_tokens=4, eos_token_id=None, **GREEDY)
        history = torch.cat([prompt(), said], dim=1)
        assert session.token_ids == history.tolist()
        result = pair.remote.generate(prompt(3, seed=2), session=session, **settings)
        assert torch.equal(result[:, 3:], _fresh(pair, history, prompt(3, seed=2), **settings))
    assert _sent(pair).is_closed


def test_the_session_length_is_kept(pair: Pair) -> None:
    """Room was reserved for so many tokens; the limit is told before anything is computed."""
    with pair.remote.session(max_length=20) as session:
        with pytest.raises(LengthLimitError, match="12 tokens and 9 new ones make 21, and the session holds 20"):
            pair.remote.generate(prompt(), session=session, max_new_tokens=9, **GREEDY)
        assert not _sent(pair).steps
        pair.remote.generate(prompt(), session=session, max_new_tokens=4, eos_token_id=None, **GREEDY)
        assert pair.remote.generate(session=session, eos_token_id=None, **GREEDY).shape == (1, 4)
        with pytest.raises(LengthLimitError, match="the prompt has 20 tokens"):
            pair.remote.generate(session=session, **GREEDY)
    with pytest.raises(LengthLimitError, match=r"longer than .* context; ask for at most 512"):
        pair.remote.session(max_length=513)


def test_what_a_session_can_not_do_is_said(pair: Pair) -> None:
    """Each with its own sentence."""
    generate: Callable[..., Any] = pair.remote.generate
    with pair.remote.session() as session:
        with pytest.raises(BadInputError, match="num_beams is 2"):
            generate(prompt(), session=session, num_beams=2)
        with pytest.raises(BadInputError, match="num_return_sequences is 3"):
            generate(prompt(), session=session, num_return_sequences=3, do_sample=True)
        with pytest.raises(BadInputError, match="token ids"):
            generate(inputs_embeds=torch.zeros(1, 3, 32), session=session)
        with pytest.raises(BadInputError, match="2 rows, the session 1 sequences"):
            generate(prompt().repeat(2, 1), session=session)
        with pytest.raises(BadInputError, match="has no tokens yet"):
            generate(session=session)
        with pytest.raises(BadInputError, match="one number per token"):
            generate(prompt(), session=session, attention_mask=torch.ones(1, 3))
        assert not _sent(pair).steps
    with pytest.raises(SessionClosedError, match="has been closed"):
        generate(prompt(), session=session)
    with pytest.raises(BadInputError, match="holds nothing"):
        pair.remote.session(batch_size=0)


def test_tokens_fed_one_by_one_in_chunks_or_at_once_give_the_same_logits(pair: Pair) -> None:
    """Scoring programs feed tokens as they come; a session's cache takes them in any portion."""
    with torch.no_grad():
        expected = pair.local(prompt(20)).logits
        for sizes in ([20], [1] * 20, [7, 1, 5, 7]):
            with pair.remote.session() as session:
                assert isinstance(session, GenerationSession)
                parts = [
                    pair.remote(part, past_key_values=session.cache).logits for part in prompt(20).split(sizes, dim=1)
                ]
                torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=0)
                assert session.token_ids == prompt(20).tolist()
                pair.remote(prompt(20)[:, :0], past_key_values=session.cache)
                assert session.position == 20
