"""The backend that runs one sequence at a time through the model's own cached attention.

It works for every family the loader accepts; families that can share a batch get a faster backend.
"""

# Letters: T tokens of one sequence, H hidden size.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swarm.errors import BadInputError, PeerBusyError, SessionStateError
from swarm.models.adapters.rows import adapters_for_rows
from swarm.models.narrowed import narrow
from swarm.server.capacity import kv_tokens_that_fit
from swarm.server.engine.engine import NotNow
from swarm.server.engine.kv_usage import KVUsage
from swarm.server.engine.memory_bounds import refuse_session
from swarm.server.engine.stateless import run_stateless
from swarm.server.engine.work import BackwardWork, ForwardWork, SessionKey, StepWork

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.models import SpanCache, SpanModel
    from swarm.models.narrowed import NarrowedSpan
    from swarm.server.engine.session_memory import SessionMemory

__all__ = ["SequentialBackend"]


class SequentialBackend:
    """A span and, per session and sequence, one cache."""

    def __init__(self, model: SpanModel, *, memory_bytes: int) -> None:
        """Raises BadInputError when `memory_bytes` hold not even one token."""
        self._model = model
        self._bytes_per_token = _cache_bytes_per_token(model)
        self.num_tokens_total = kv_tokens_that_fit(memory_bytes, self._bytes_per_token)
        self._num_tokens_used: dict[SessionKey, int] = {}
        self.num_tokens_run = 0
        """Tokens that were computed since start."""
        self.compressing_s = 0.0
        """Nothing is compressed."""
        self.memory: SessionMemory | None = None
        """There are no pages to move to another server."""
        self._caches: dict[SessionKey, dict[int, SpanCache]] = {}
        self._parts: dict[Span, SpanModel | NarrowedSpan] = {}

    def _part(self, span: Span) -> SpanModel | NarrowedSpan:
        """The blocks of `span`, kept: routes use the same few parts again and again."""
        part = self._parts.get(span)
        if part is None:
            part = self._parts[span] = narrow(self._model, span)
        return part

    @property
    def num_sessions(self) -> int:
        """Sessions with caches."""
        return len(self._caches)

    @property
    def num_tokens_free(self) -> int:
        """Positions that still fit; another thread may read it."""
        return max(self.num_tokens_total - sum(list(self._num_tokens_used.values())), 0)

    @property
    def kv_usage(self) -> KVUsage:
        """Use of the KV memory: caches are as long as their tokens; another thread may read it."""
        return KVUsage(
            total_bytes=self.num_tokens_total * self._bytes_per_token,
            used_bytes=sum(list(self._num_tokens_used.values())) * self._bytes_per_token,
        )

    def forget(self, session: SessionKey) -> None:
        """Free a session's caches; harmless when there are none."""
        self._caches.pop(session, None)
        self._num_tokens_used.pop(session, None)

    def drop_step(self, session: SessionKey) -> None:
        """Nothing to do: a step runs whole or not at all."""

    def set_away(self, session: SessionKey, is_away: bool) -> None:
        """Nothing to do: no session makes room for another."""

    def has_lost(self, session: SessionKey) -> bool:
        """Never: no session makes room for another."""
        return False

    def run_steps(self, works: list[StepWork]) -> list[torch.Tensor | NotNow | BaseException]:
        """One step of each session, in turn; [T, H] each, or that session's error."""
        results: list[torch.Tensor | NotNow | BaseException] = []
        for work in works:
            try:
                self._check_room(work)
                results.append(self._run_step(work))
                self.num_tokens_run += work.hidden.shape[0]
                lengths = [cache.length for cache in self._caches[work.session].values()]
                self._num_tokens_used[work.session] = sum(lengths)
            except Exception as error:  # the error is that session's own: the others go on
                results.append(error)
        return results

    def _check_room(self, work: StepWork) -> None:
        num_new = work.hidden.shape[0]
        if num_new > self.num_tokens_free:
            after = {sequence: cache.length for sequence, cache in self._caches.get(work.session, {}).items()}
            after |= {item.sequence: item.start + item.count for item in work.sequences}
            if sum(after.values()) > self.num_tokens_total:
                raise refuse_session(self.num_tokens_total)
            raise PeerBusyError(f"the KV memory has room for {self.num_tokens_free} tokens, not for {num_new}")

    @torch.inference_mode()
    def _run_step(self, work: StepWork) -> torch.Tensor:
        model = self._part(work.span)
        caches = self._caches.setdefault(work.session, {})
        self._apply_forks(model, caches, work)
        hidden = work.hidden.to(device=model.device, dtype=model.dtype)
        outputs: list[torch.Tensor] = []
        row = 0
        for item in work.sequences:
            if item.count == 0:
                continue
            positions = torch.arange(item.start, item.start + item.count, device=model.device).unsqueeze(0)
            rows = hidden[row : row + item.count].unsqueeze(0)
            with adapters_for_rows([(work.adapter, item.count)]):
                outputs.append(model(rows, positions, cache=caches[item.sequence]).squeeze(0))
            row += item.count
        if not outputs:
            return hidden
        result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if not torch.isfinite(result).all():
            raise BadInputError("the step's outputs are not finite; the inputs were bad or overflow this precision")
        return result

    @staticmethod
    def _apply_forks(model: SpanModel | NarrowedSpan, caches: dict[int, SpanCache], work: StepWork) -> None:
        """Bring every named sequence to its start: new, continued, rewound, or copied from its parent.

        Copies are made before any parent is cropped, because all parents are read as they were.
        """
        num_uses: dict[int, int] = {}
        for item in work.sequences:
            num_uses[item.parent] = num_uses.get(item.parent, 0) + 1
        prepared: dict[int, SpanCache] = {}
        for item in work.sequences:
            cache = caches.get(item.parent)
            if cache is None:
                if item.start > 0:
                    raise SessionStateError(f"sequence {item.parent} holds nothing, not {item.start} positions")
                cache = model.new_cache()
            elif num_uses[item.parent] > 1 or item.parent != item.sequence:
                cache = cache.clone()
            prepared[item.sequence] = cache
        for item in work.sequences:
            prepared[item.sequence].crop(item.start)
        caches.update(prepared)

    def run_stateless(self, work: ForwardWork | BackwardWork) -> torch.Tensor:
        """Whole sequences without caches: outputs, or the gradient of the inputs, [T, H]."""
        return run_stateless(self._part(work.span), work)


def _cache_bytes_per_token(model: SpanModel) -> int:
    """From what a cache of a few tokens really takes: families differ in what they store."""
    num_tokens = 4
    cache = model.new_cache()
    hidden = torch.zeros(1, num_tokens, model.hidden_size, dtype=model.dtype, device=model.device)
    with torch.inference_mode():
        model(hidden, torch.arange(num_tokens, device=model.device).unsqueeze(0), cache=cache)
    return max(cache.size_bytes // num_tokens, 1)
