"""A conversation in one session: each turn sends only what is new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from swarm.cli.answering import AnswerSettings, check_is_text
from swarm.errors import LengthLimitError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from swarm.client.generation_session import GenerationSession
    from swarm.client.remote_model import SwarmModelForCausalLM

__all__ = ["Conversation", "Message", "new_text"]

Message = dict[str, str]
"""`role` and `content`, as chat templates take them."""

_MARK = "\u2063the answer stands here\u2063"
"""In the place of the last answer, to find what a template puts behind it; nobody types this."""


def new_text(render: Callable[[Sequence[Message]], str], messages: Sequence[Message]) -> str | None:
    """What a chat template adds after the last answer: its end, the user's new message, the start of a reply.

    The answer itself, and all before it, has been sent as tokens, and must not be written anew: templates
    trim answers, and text does not always split into the tokens it came from.

    Args:
        render: a whole conversation as text, up to where the model is to reply.
        messages: the conversation, which ends with an answer and the user's new message.

    Returns:
        None where the template does not show answers as they are.
    """
    *before, _, newest = messages
    _, mark, after = render([*before, {"role": "assistant", "content": _MARK}, newest]).rpartition(_MARK)
    return after if mark else None


class Conversation:
    """Keeps messages and the session that holds their tokens. Close it, or use it in a `with` block."""

    def __init__(
        self, model: SwarmModelForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: AnswerSettings
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._messages: list[Message] = []
        self._session: GenerationSession = model.session()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def session(self) -> GenerationSession:
        """The session that holds the conversation now."""
        return self._session

    def close(self) -> None:
        """Free the servers' memory; harmless when repeated."""
        self._session.close()

    def reset(self) -> None:
        """Forget everything that was said."""
        self._session.close()
        self._messages.clear()
        self._session = self._model.session()

    def ask(self, text: str, *, on_text: Callable[[str], None], is_stopped: Callable[[], bool]) -> str:
        """The answer to a new message; `on_text` gets it piece by piece.

        A turn that fails leaves the conversation as it was before.

        Args:
            is_stopped: asked after each token; True ends the answer there.

        Raises:
            BadInputError: the message is no UTF-8 text.
            LengthLimitError: the conversation has filled the model's context.
            NoRouteError, DeadlineError: from the swarm.
        """
        import torch

        from swarm.cli.text_stream import AnswerStreamer

        check_is_text("the message", text)
        messages = [*self._messages, {"role": "user", "content": text}]
        session, position = self._session, self._session.position
        new_ids = self._new_ids(messages)
        if new_ids is None:
            session.position = position = 0
            new_ids = self._encode(self._render(messages))
        num_tokens = session.position + len(new_ids)
        if num_tokens >= session.max_length:
            raise LengthLimitError(
                f"the conversation would have {num_tokens} tokens, and the model holds {session.max_length}, answer"
                " included; write less, or start anew with /reset"
            )
        input_ids = torch.tensor([new_ids])
        streamer = AnswerStreamer(self._tokenizer, on_text)
        try:
            output = self._model.generate(
                input_ids,
                session=session,
                streamer=streamer,
                stopping_criteria=[_StopWhen(is_stopped)],
                max_new_tokens=self._settings.new_tokens_after(num_tokens, session.max_length),
                **self._settings.generate_arguments(),
            )
        except BaseException:
            if not session.is_closed:
                session.position = min(position, session.position)
            raise
        answer = self._tokenizer.decode(output[0, len(new_ids) :], skip_special_tokens=True)
        answer = answer if isinstance(answer, str) else "".join(answer)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _new_ids(self, messages: Sequence[Message]) -> list[int] | None:
        """Tokens that the session lacks; None where only the whole conversation can be sent."""
        history = self._session.token_ids[0] if self._messages else []
        if not history:
            return self._encode(self._render(messages), is_start=True)
        text = new_text(self._render, messages)
        if text is None:
            return None
        new_ids = self._encode(text)
        # The template writes the end of the answer; the model has mostly written it itself.
        return new_ids[1:] if new_ids and new_ids[0] == history[-1] else new_ids

    def _render(self, messages: Sequence[Message]) -> str:
        if not self._tokenizer.chat_template:
            return "\n".join(message["content"] for message in messages) + "\n"
        text: Any = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return str(text)

    def _encode(self, text: str, *, is_start: bool = False) -> list[int]:
        # Templates write special tokens out; without one, the tokenizer adds those of a text's start.
        with_special = is_start and not self._tokenizer.chat_template
        return [int(token_id) for token_id in self._tokenizer(text, add_special_tokens=with_special)["input_ids"]]


class _StopWhen:
    """A stop criterion for transformers' generate."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        import torch

        return torch.full((input_ids.shape[0],), self._is_stopped(), device=input_ids.device, dtype=torch.bool)
