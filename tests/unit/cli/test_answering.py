"""What a prompt becomes before it is fed, and how much is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.cli.answering import Answer, AnswerSettings, encode_prompt
from swarm.cli.app import run
from swarm.errors import BadInputError
from tests.tiny_tokenizer import save_tiny_tokenizer


def test_prompt_goes_into_the_chat_template(tmp_path: Path) -> None:
    """A chat model answers a question only when it sees one in the form it was trained on."""
    tokenizer = save_tiny_tokenizer(tmp_path)
    ids = encode_prompt(tokenizer, "Hi", is_raw=False)
    assert tokenizer.decode(ids) == "<|user|>Hi<|end|>\n<|assistant|>"


def test_raw_prompt_is_fed_as_it_is(tmp_path: Path) -> None:
    """To let a model continue a text, nothing may stand around it."""
    tokenizer = save_tiny_tokenizer(tmp_path)
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", is_raw=True)) == "Hi"


def test_without_template_the_prompt_is_raw(tmp_path: Path) -> None:
    """Base models have no template, and work all the same."""
    tokenizer = save_tiny_tokenizer(tmp_path, has_chat_template=False)
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", is_raw=False)) == "Hi"


def test_empty_prompt_is_refused(tmp_path: Path) -> None:
    """Nothing to continue would fail far away, on a server."""
    with pytest.raises(BadInputError, match="the prompt is empty"):
        encode_prompt(save_tiny_tokenizer(tmp_path), " \n", is_raw=False)


@pytest.mark.parametrize("is_raw", [False, True])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, is_raw: bool) -> None:
    """A prompt from an old file or terminal; Python passes its bytes on as surrogates, and tokenizers fail on those."""
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")
    with pytest.raises(BadInputError, match="the prompt is no UTF-8 text"):
        encode_prompt(save_tiny_tokenizer(tmp_path), prompt, is_raw=is_raw)


@pytest.mark.parametrize(
    ("prompt", "problem"), [(b"caf\xe9", "the prompt is no UTF-8 text"), (b" ", "prompt is empty")]
)
def test_the_demo_looks_at_its_prompt_first(
    prompt: bytes, problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole swarm takes half a minute to start."""
    monkeypatch.setattr("swarm.models.resolve_model", lambda *_, **__: pytest.fail("the model was looked for"))
    assert run(["demo", "--prompt", prompt.decode("utf-8", "surrogateescape")]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    """torch fails on it, after the model has been opened."""
    with pytest.raises(BadInputError, match="--seed"):
        AnswerSettings(seed=seed)
    AnswerSettings(seed=2**64 - 1, temperature=1.0).generate_arguments()
    AnswerSettings(seed=-(2**63), temperature=1.0).generate_arguments()


@pytest.mark.parametrize(
    ("asked", "num_prompt", "max_positions", "expected"),
    [
        (None, 10, 4096, 256),
        (None, 10, 100, 90),
        (None, 10, None, 256),
        (None, 200, 100, 1),  # refused later, in the model's own words
        (500, 10, 100, 500),
    ],
)
def test_default_length_gives_way_to_the_context(
    asked: int | None, num_prompt: int, max_positions: int | None, expected: int
) -> None:
    """Nobody should be refused for a length they never asked for; what they did ask for is not cut in silence."""
    settings = AnswerSettings(max_new_tokens=asked)
    assert settings.new_tokens_after(num_prompt, max_positions) == expected


def test_temperature_decides_between_greedy_and_sampling() -> None:
    """0 must be greedy: transformers itself refuses a temperature of 0."""
    assert AnswerSettings().generate_arguments()["do_sample"] is False
    assert AnswerSettings(temperature=0.7).generate_arguments() == {"do_sample": True, "temperature": 0.7}


def test_seed_makes_sampling_repeatable() -> None:
    """The same seed must give the same answer again."""
    settings = AnswerSettings(temperature=1.0, seed=5)
    drawn = []
    for _ in range(2):
        settings.generate_arguments()
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1]


def test_json_has_the_promised_shape() -> None:
    """Scripts read this; its keys are promised to users."""
    result = Answer(
        prompt="p",
        prompt_token_ids=[1, 2],
        token_ids=[3],
        text="t",
        seconds_to_first_token=0.25,
        tokens_per_s=4.0,
        route=(),
        num_failovers=0,
    )
    assert result.to_json("m") == {
        "model": "m",
        "prompt": "p",
        "text": "t",
        "prompt_token_ids": [1, 2],
        "token_ids": [3],
        "num_new_tokens": 1,
        "seconds_to_first_token": 0.25,
        "tokens_per_s": 4.0,
        "route": [],
        "failovers": 0,
    }
