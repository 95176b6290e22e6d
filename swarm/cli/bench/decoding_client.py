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
    """Single forward passes in place of `generate`, whose own work would hide what the swarm does.

    Use it in a `with` block, one thread at a time.
    """

    def __init__(self, model: SwarmModelForCausalLM, *, max_length: int, has_head: bool = True) -> None:
        """
        Args:
            model: may be shared by several clients in several threads.
            max_length: tokens of prompt and answer.
            has_head: False takes the next token from the prompt instead of computing it. The servers' work is
                the same, and many clients in one process keep neither each other nor the servers from the
                processor.
        """
        self._model: Any = model
        self._has_head = has_head
        self._session = model.session(max_length=max_length)
        self._blocks: BlockSession | None = None
        if not has_head:
            self._blocks = model.remote_blocks.open_session(max_length=max_length)
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
        if self._blocks is not None:
            self._blocks.close()

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

        with torch.inference_mode():
            self._next = self._choose(token_ids) if self._blocks is None else self._pass_through(token_ids)
        self.stamps_s.append(time.perf_counter())

    def _choose(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The model's greedy next token [1, 1]."""
        logits = self._model(token_ids, past_key_values=self._session.cache, logits_to_keep=1).logits
        chosen: torch.Tensor = logits[:, -1:].argmax(dim=-1)
        return chosen

    def _pass_through(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Through the blocks and no further; the next token [1, 1] comes from the prompt."""
        from swarm.client.blocks import SequenceInput

        assert self._blocks is not None and self._prompt is not None
        hidden = self._model.get_input_embeddings()(token_ids[0])
        self._blocks.step([SequenceInput(sequence=0, parent=0, start=self._position, hidden=hidden)], last_only=True)
        self._position += len(hidden)
        column = self._position % self._prompt.shape[1]
        return self._prompt[:, column : column + 1]
