"""generate() over remote blocks against plain transformers: the same token ids, whatever the decoding method."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from swarm.errors import BadInputError, LengthLimitError, SessionClosedError
from tests.model_pair import GREEDY, LENGTHS, Pair, padded_batch, prompt
from tests.tiny_models import FAMILIES, build_tiny_model

CUTS = pytest.mark.parametrize("cuts", [(), (2,), (1, 4)], ids=["one hop", "two hops", "three hops"])


@CUTS
def test_greedy_200_tokens(make_pair: Callable[..., Pair], cuts: tuple[int, ...]) -> None:
    """The promise of the project: a swarm answers as the model alone would, however it is cut."""
    pair = make_pair(cuts=cuts)
    ids = pair.generate(prompt(), max_new_tokens=200, eos_token_id=None, **GREEDY)
    assert ids.shape == (1, 212)
    assert len(set(ids[0, 12:].tolist())) > 10, "a model that repeats itself proves nothing"
    (session,) = pair.blocks.sessions
    assert session.num_tokens_sent == 12 + 199
    assert len(session.steps) == 200
    assert session.is_closed


@CUTS
def test_seeded_sampling_200_tokens(make_pair: Callable[..., Pair], cuts: tuple[int, ...]) -> None:
    """Samples depend on every bit of every logit, and on how often the random generator was asked."""
    pair = make_pair(cuts=cuts)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.3}
    ids = pair.generate(prompt(), seed=7, max_new_tokens=200, eos_token_id=None, pad_token_id=0, **settings)
    assert ids.shape == (1, 212)


@pytest.mark.parametrize("settings", [GREEDY, {"do_sample": True, "top_k": 20, "pad_token_id": 0}])
def test_padded_batch(pair: Pair, settings: dict[str, Any]) -> None:
    """Rows of different lengths in one call; padding costs neither traffic nor correctness."""
    ids, mask = padded_batch()
    pair.generate(ids, seed=3, attention_mask=mask, max_new_tokens=40, eos_token_id=None, **settings)
    (session,) = pair.blocks.sessions
    assert session.steps[0].num_tokens == sum(LENGTHS)
    assert session.steps[0].last_only
    assert session.num_tokens_sent == sum(LENGTHS) + 4 * 39


def test_each_row_of_a_batch_equals_its_solo_run(pair: Pair) -> None:
    """Sharing a call with others must not change anyone's answer."""
    ids, mask = padded_batch()
    together = pair.generate(ids, attention_mask=mask, max_new_tokens=30, eos_token_id=None, **GREEDY)
    for row, length in enumerate(LENGTHS):
        alone = pair.remote.generate(prompt(length, seed=row), max_new_tokens=30, eos_token_id=None, **GREEDY)
        assert torch.equal(together[row, 12:], alone[0, length:])


def test_rows_that_ended_are_no_longer_sent(pair: Pair) -> None:
    """A short answer beside a long one costs what it would cost alone."""
    ids, mask = padded_batch()
    free = pair.local.generate(ids, attention_mask=mask, max_new_tokens=20, eos_token_id=None, **GREEDY)
    end_token = int(free[1, 12 + 4])
    ended = pair.generate(ids, attention_mask=mask, max_new_tokens=20, eos_token_id=end_token, **GREEDY)
    new = ended[:, 12:].tolist()
    num_new = [row.index(end_token) + 1 if end_token in row else 20 for row in new]
    assert min(num_new) < 20
    (session,) = pair.blocks.sessions
    assert session.num_tokens_sent == sum(LENGTHS) + sum(count - 1 for count in num_new)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(make_pair: Callable[..., Pair], family: str) -> None:
    """Embedding scales, soft caps, windows, experts, alibi: no family needs code of its own."""
    pair = make_pair(family)
    with torch.no_grad():
        difference = pair.local(prompt()).logits - pair.remote(prompt()).logits
    assert difference.abs().max() < 1e-4
    pair.generate(prompt(), max_new_tokens=32, eos_token_id=None, **GREEDY)
    pair.generate(prompt(), max_new_tokens=12, num_beams=5, **GREEDY)
    ids, mask = padded_batch()
    pair.generate(ids, attention_mask=mask, max_new_tokens=16, **GREEDY)


def test_beams(pair: Pair) -> None:
    """Beams fork and drop sequences after every token; the prompt itself travels once."""
    pair.generate(prompt(), max_new_tokens=40, num_beams=5, **GREEDY)
    (session,) = pair.blocks.sessions
    assert session.steps[0].num_tokens == 12
    assert {step.num_tokens for step in session.steps[1:]} == {5}


def test_beams_in_a_padded_batch(pair: Pair) -> None:
    """Rows of the cache are then beams of several prompts."""
    ids, mask = padded_batch()
    settings = {"max_new_tokens": 20, "num_beams": 5, "num_return_sequences": 3, "length_penalty": 0.7, **GREEDY}
    assert pair.generate(ids, attention_mask=mask, **settings).shape[0] == 12
    assert pair.blocks.sessions[0].steps[0].num_tokens == sum(LENGTHS)


def test_sampled_beams(pair: Pair) -> None:
    """Sampling and forking together."""
    pair.generate(prompt(), seed=5, do_sample=True, num_beams=3, max_new_tokens=20, pad_token_id=0)


def test_several_answers_to_one_prompt_send_it_once(pair: Pair) -> None:
    """Long prompts are what costs."""
    ids = pair.generate(prompt(), seed=5, do_sample=True, num_return_sequences=3, max_new_tokens=20, pad_token_id=0)
    assert ids.shape[0] == 3
    assert pair.blocks.sessions[0].steps[0].num_tokens == 12


def test_assisted_by_a_smaller_model(pair: Pair) -> None:
    """Rejected candidates are taken back by the next step, and fewer steps are needed than tokens."""
    pair.generate(prompt(), assistant_model=pair.local, max_new_tokens=60, eos_token_id=None, **GREEDY)
    (session,) = pair.blocks.sessions
    assert len(session.steps) < 40, "a perfect assistant must save trips"
    other = build_tiny_model("llama", seed=3)
    pair.generate(prompt(), assistant_model=other, max_new_tokens=30, eos_token_id=None, **GREEDY)
    pair.generate(prompt(), seed=11, assistant_model=other, do_sample=True, max_new_tokens=30, eos_token_id=None)


def test_assisted_by_prompt_lookup(pair: Pair) -> None:
    """Candidates come from the prompt itself; near the end they must not overrun the session."""
    repeating = prompt(6).repeat(1, 20)
    plain = pair.local.generate(repeating, max_new_tokens=40, eos_token_id=None, **GREEDY)
    assisted = pair.generate(repeating, prompt_lookup_num_tokens=5, max_new_tokens=40, eos_token_id=None, **GREEDY)
    assert torch.equal(plain, assisted)
    first, second = pair.blocks.sessions[0].steps[:2]
    assert first.last_only, "of the long prompt only the end's outputs may travel"
    assert first.num_tokens > 100
    assert second.num_tokens <= 6


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.has_ended = True


def test_streamers_hear_the_same(pair: Pair) -> None:
    """Chat programs print from what streamers are told, token by token."""
    streamers = [_Recorder(), _Recorder()]
    for model, streamer in zip((pair.local, pair.remote), streamers, strict=True):
        model.generate(prompt(), streamer=streamer, max_new_tokens=10, **GREEDY)
    assert streamers[0].values == streamers[1].values
    assert streamers[1].has_ended


def test_stop_criteria_and_processors_are_obeyed(pair: Pair) -> None:
    """They are arbitrary code of the user's, called on the same ids as locally."""

    class StopAtLength(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 17)

    def no_odd_tokens(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores

    ids = pair.generate(
        prompt(),
        stopping_criteria=StoppingCriteriaList([StopAtLength()]),
        logits_processor=[no_odd_tokens],
        max_new_tokens=30,
        **GREEDY,
    )
    assert ids.shape[1] == 17
    assert all(token_id % 2 == 0 for token_id in ids[0, 12:].tolist())


def test_stop_strings(pair: Pair) -> None:
    """Stop strings need the tokenizer, which generate must hand on."""
    characters = Tokenizer(models.WordLevel({chr(32 + index): index for index in range(128)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    free = pair.local.generate(prompt(), max_new_tokens=20, eos_token_id=None, **GREEDY)
    stop = tokenizer.decode(free[0, 12 + 5 : 12 + 7])
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "stop_strings": [stop],
        "max_new_tokens": 20,
        "eos_token_id": None,
    }
    assert pair.generate(prompt(), **settings, **GREEDY).shape[1] <= 12 + 7


def test_embeddings_in_the_place_of_ids(pair: Pair) -> None:
    """Soft prompts begin generation with embeddings; only new ids are returned then, as in transformers."""
    embeddings = pair.local.get_input_embeddings()(prompt())
    ids = pair.generate(inputs_embeds=embeddings, max_new_tokens=20, eos_token_id=None, **GREEDY)
    assert ids.shape == (1, 20)


def test_prompts_given_in_chunks(pair: Pair) -> None:
    """transformers' own chunking of long prompts works too, though servers chunk by themselves."""
    ids, mask = padded_batch()
    pair.generate(ids, attention_mask=mask, prefill_chunk_size=5, max_new_tokens=10, **GREEDY)


def test_scores_and_output_objects(pair: Pair) -> None:
    """Programs that want more than ids get transformers' own output object."""
    settings = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True, **GREEDY}
    expected, got = (model.generate(prompt(), **settings) for model in (pair.local, pair.remote))
    assert torch.equal(expected.sequences, got.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(expected.scores), atol=1e-4, rtol=0)
    with pytest.raises(SessionClosedError):
        pair.remote(prompt(1), past_key_values=got.past_key_values)


def test_without_cache_every_step_is_a_stateless_run(pair: Pair) -> None:
    """Slow, but what use_cache=False asks for."""
    pair.generate(prompt(), use_cache=False, max_new_tokens=4, **GREEDY)
    assert pair.blocks.stateless_runs == [(12,), (13,), (14,), (15,)]
    assert not pair.blocks.sessions


def test_nothing_to_begin_with_is_the_beginning_of_text(pair: Pair) -> None:
    """As in transformers, a call without a prompt starts from the model's first token."""
    assert pair.generate(max_new_tokens=5, **GREEDY).shape == (1, 6)


def test_too_long_is_refused_before_any_compute(pair: Pair) -> None:
    """A clear sentence at once, not garbage or a server's refusal after minutes of work."""
    with pytest.raises(LengthLimitError, match="the prompt has 512 tokens"):
        pair.remote.generate(prompt(512), **GREEDY)
    with pytest.raises(LengthLimitError, match="12 tokens and 501 new ones make 513"):
        pair.remote.generate(prompt(), max_new_tokens=501, **GREEDY)
    with pytest.raises(LengthLimitError, match="make 600"):
        pair.remote.generate(prompt(), max_length=600, **GREEDY)
    with pytest.raises(LengthLimitError, match="make 513"):
        pair.remote.generate(prompt(), GenerationConfig(max_new_tokens=501, pad_token_id=0))
    assert not any(session.steps for session in pair.blocks.sessions)


def test_default_lengths_stop_at_the_end_of_the_context(pair: Pair) -> None:
    """Nobody asked for more than fits, so the answer is cut there, not refused."""
    config = pair.remote.generation_config
    config.max_new_tokens = 4096
    assert pair.remote.generate(prompt(508), eos_token_id=None, **GREEDY).shape == (1, 512)
    assert pair.blocks.sessions[-1].max_length == 512
    config.max_new_tokens = None
    config.max_length = 4096
    assert pair.remote.generate(prompt(509), eos_token_id=None, **GREEDY).shape == (1, 512)


def test_servers_are_asked_for_no_more_room_than_needed(pair: Pair) -> None:
    """Room is what servers admit by; asking for the whole context would keep others out."""
    pair.remote.generate(prompt(), max_new_tokens=10, **GREEDY)
    assert pair.blocks.sessions[0].max_length == 22


def test_memory_is_freed_however_a_call_ends(pair: Pair) -> None:
    """Ctrl-C in the middle of an answer must not leave a session open on every server."""
    pair.blocks.fail_at_step = 5
    with pytest.raises(KeyboardInterrupt):
        pair.remote.generate(prompt(), max_new_tokens=10, **GREEDY)
    pair.blocks.fail_at_step = None

    def break_down(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a user's mistake")

    with pytest.raises(RuntimeError, match="a user's mistake"):
        pair.remote.generate(prompt(), logits_processor=[break_down], max_new_tokens=10, **GREEDY)
    assert [session.is_closed for session in pair.blocks.sessions] == [True, True]


def test_threads_share_a_model(pair: Pair) -> None:
    """A gateway answers several users at once with one model; their calls must not mix."""
    prompts = [prompt(length, seed=length) for length in (4, 9, 14)]
    settings: dict[str, Any] = {"max_new_tokens": 25, "eos_token_id": None, **GREEDY}
    expected = [pair.local.generate(ids, **settings) for ids in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        results = list(threads.map(lambda ids: pair.remote.generate(ids, **settings), prompts))
    assert all(torch.equal(*pair_of_results) for pair_of_results in zip(results, expected, strict=True))


def test_what_a_swarm_can_not_do_is_said(pair: Pair) -> None:
    """Each with its own sentence instead of a failure deep inside transformers."""
    remote = pair.remote
    with pytest.raises(BadInputError, match="takes no past_key_values"):
        remote.generate(prompt(), past_key_values=DynamicCache())
    with pytest.raises(BadInputError, match="cache_implementation='static'"):
        remote.generate(prompt(), cache_implementation="static")
    with pytest.raises(BadInputError, match="continuous batching"):
        remote.generate_batch([[1, 2]])
    with pytest.raises(BadInputError, match="load it locally"):
        remote.generate(prompt(), assistant_model=remote)
    with pytest.raises(BadInputError, match="output_hidden_states is not available"):
        remote.generate(prompt(), return_dict_in_generate=True, output_hidden_states=True, max_new_tokens=2)
    with pytest.raises(BadInputError, match="pad on the left"):
        remote.generate(torch.tensor([[5, 6], [7, 0]]), attention_mask=torch.tensor([[1, 1], [1, 0]]))
    assert not any(session.steps for session in pair.blocks.sessions)
