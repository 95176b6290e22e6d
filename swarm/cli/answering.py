"""One answer to one prompt: what is fed to the model, how it generates, and what is reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swarm.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarm.client.remote_model import SwarmModelForCausalLM
    from swarm.datatypes import Hop

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "Answer",
    "AnswerSettings",
    "answer",
    "check_is_text",
    "check_prompt",
    "encode_prompt",
]

DEFAULT_NEW_TOKENS = 256
"""Length of an answer when nobody says how much; less where the model's context ends earlier."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How to generate."""

    max_new_tokens: int | None = None
    """At most this many; None: DEFAULT_NEW_TOKENS, or what fits the model's context."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are sampled."""
    seed: int | None = None
    """Makes sampling repeatable."""

    def __post_init__(self) -> None:
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise BadInputError(f"--seed {self.seed} is too large; give a number of at most 64 bits")

    def new_tokens_after(self, num_prompt_tokens: int, max_positions: int | None) -> int:
        """How many tokens to ask for. Lengths that the model does not allow are left to be refused there."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        room = DEFAULT_NEW_TOKENS if max_positions is None else max_positions - num_prompt_tokens
        return max(1, min(DEFAULT_NEW_TOKENS, room))

    def generate_arguments(self) -> dict[str, Any]:
        """Keyword arguments for transformers' generate, seeding torch as a side effect."""
        if self.seed is not None:
            import torch

            torch.manual_seed(self.seed)
        if self.temperature > 0:
            return {"do_sample": True, "temperature": self.temperature}
        return {"do_sample": False, "num_beams": 1}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a prompt."""

    prompt: str
    """As the user gave it."""
    prompt_token_ids: list[int]
    """What the model was fed: with the chat template around it, where there is one."""
    token_ids: list[int]
    """New tokens, the end token included where it came."""
    text: str
    """New tokens as text, without special ones."""
    seconds_to_first_token: float
    tokens_per_s: float
    """Of the tokens after the first."""
    route: tuple[Hop, ...]
    """Hops at the end of the answer."""
    num_failovers: int

    def to_json(self, model_name: str) -> dict[str, Any]:
        """The object that `generate --json` prints."""
        return {
            "model": model_name,
            "prompt": self.prompt,
            "text": self.text,
            "prompt_token_ids": self.prompt_token_ids,
            "token_ids": self.token_ids,
            "num_new_tokens": len(self.token_ids),
            "seconds_to_first_token": round(self.seconds_to_first_token, 4),
            "tokens_per_s": round(self.tokens_per_s, 3),
            "route": [{"peer_id": hop.peer_id, "start": hop.start, "end": hop.end} for hop in self.route],
            "failovers": self.num_failovers,
        }


def check_is_text(what: str, text: str) -> None:
    """Refuse bytes of a terminal or a pipe that were no UTF-8: tokenizers fail on them. Raises BadInputError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInputError(f"{what} is no UTF-8 text; convert it, for example with iconv -t utf-8") from None


def check_prompt(prompt: str) -> None:
    """Raises BadInputError for a prompt that no tokenizer can make anything of."""
    check_is_text("the prompt", prompt)
    if not prompt.strip():
        raise BadInputError("the prompt is empty; give --prompt some text")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, is_raw: bool) -> list[int]:
    """Token ids to feed: the prompt as a user's message where the tokenizer has a chat template, unless `is_raw`.

    Raises:
        BadInputError: nothing is left to feed, or it is no UTF-8 text.
    """
    check_prompt(prompt)
    if is_raw or not tokenizer.chat_template:
        ids = tokenizer(prompt)["input_ids"]
    else:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        # The template writes special tokens out itself.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    token_ids = [int(token_id) for token_id in ids]
    if not token_ids:
        raise BadInputError("the tokenizer makes no token of this prompt; give --prompt some other text")
    return token_ids


def answer(
    model: SwarmModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    settings: AnswerSettings,
    *,
    is_raw: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Generate an answer, handing its text to `on_text` piece by piece.

    Raises:
        BadInputError: an empty prompt, or one that is longer than the model's context.
        NoRouteError, DeadlineError: from the swarm.
    """
    import torch

    from swarm.cli.text_stream import AnswerStreamer

    prompt_ids = encode_prompt(tokenizer, prompt, is_raw=is_raw)
    max_new_tokens = settings.new_tokens_after(len(prompt_ids), model.source.max_positions)
    input_ids = torch.tensor([prompt_ids])
    # A session of our own, because it tells the route.
    with model.session(max_length=_session_length(len(prompt_ids) + max_new_tokens, model)) as session:
        streamer = AnswerStreamer(tokenizer, on_text)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            session=session,
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            **settings.generate_arguments(),
        )
        result = Answer(
            prompt=prompt,
            prompt_token_ids=prompt_ids,
            token_ids=output[0, len(prompt_ids) :].tolist(),
            text="",
            seconds_to_first_token=streamer.seconds_to_first_token,
            tokens_per_s=streamer.tokens_per_s,
            route=session.route,
            num_failovers=session.num_failovers,
        )
    text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
    return dataclasses.replace(result, text=text if isinstance(text, str) else "".join(text))


def _session_length(wanted: int, model: SwarmModelForCausalLM) -> int:
    """Positions to ask for; where the model has fewer, generate refuses the prompt in its own words."""
    max_positions = model.source.max_positions
    return wanted if max_positions is None else min(wanted, max_positions)
