"""One client that decodes greedily in a session of its own, and stamps the time of every token."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

    from swarm.client.blocks import BlockSession
    from swarm.client.remote_model import SwarmModelForCausalLM

__all__ = ["DecodingClient", "random_prompt"]


def random_prompt(num_tokens: int, *, vocab_size: int, seed: int) -> torch.Tensor:
    """Token ids [1, num_tokens], int64; other seeds share no prefix worth speaking of."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size // 50, vocab_size * 4 // 5, (1, num_tokens), generator=generator)


class DecodingClient:
    """Embedding, session and head without `generate`, whose own work would hide what the swarm does.

    Use it in a `with` block, one thread at a time.
    """

    def __init__(self, model: SwarmModelForCausalLM, *, max_length: int, has_head: bool = True) -> None:
        """Without `has_head` the next token is not computed but taken from the prompt: the servers' work is
        the same, and many clients in one process do not keep each other and the servers from the processor."""
        self._model: Any = model
        self._has_head = has_head
        self._session: BlockSession = model.remote_blocks.open_session(max_length=max_length)
        self._prompt: torch.Tensor | None = None
        self._next: torch.Tensor | None = None
        self._position = 0
        self.stamps_s: list[float] = []
        """When each token came, on time.perf_counter's clock."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session.close()

    def prefill(self, prompt: torch.Tensor) -> None:
        """Send a prompt [1, T] and receive the first token."""
        self._prompt = prompt
        self._append(prompt)

    def decode(self, num_tokens: int) -> None:
        """Receive `num_tokens` more, one after the other."""
        for _ in range(num_tokens):
            if self._next is None:
                raise RuntimeError("a client decodes after its prompt; call prefill first")
            self._append(self._next)

    def _append(self, token_ids: torch.Tensor) -> None:
        import torch

        from swarm.client.blocks import SequenceInput

        assert self._prompt is not None
        with torch.inference_mode():
            hidden = self._model.get_input_embeddings()(token_ids[0])
            inputs = SequenceInput(sequence=0, parent=0, start=self._position, hidden=hidden)
            (output,) = self._session.step([inputs], last_only=True)
            self._position += len(hidden)
            if self._has_head:
                self._next = self._model.get_output_embeddings()(output).argmax(dim=-1, keepdim=True)
            else:
                column = self._position % self._prompt.shape[1]
                self._next = self._prompt[:, column : column + 1]
        self.stamps_s.append(time.perf_counter())
