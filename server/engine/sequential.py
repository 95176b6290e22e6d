"""The backend that runs one sequence at a time through the model's own cached attention.

It works for every family the loader accepts; families that can share a batch get a faster backend.
"""

# Letters: T tokens of one sequence, H hidden size.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swarm.errors import BadInputError, SessionStateError
from swarm.server.engine.work import BackwardWork, ForwardWork, SessionKey, StepWork

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.models.span import SpanCache, SpanModel

__all__ = ["SequentialBackend"]


class SequentialBackend:
    """A span and, per session and sequence, one cache."""

    def __init__(self, model: SpanModel) -> None:
        self._model = model
        self._caches: dict[SessionKey, dict[int, SpanCache]] = {}

    @property
    def num_sessions(self) -> int:
        """Sessions with caches."""
        return len(self._caches)

    def forget(self, session: SessionKey) -> None:
        """Free a session's caches; harmless when there are none."""
        self._caches.pop(session, None)

    def run_steps(self, works: list[StepWork]) -> list[torch.Tensor | BaseException]:
        """One step of each session, in turn; [T, H] each, or that session's error."""
        results: list[torch.Tensor | BaseException] = []
        for work in works:
            try:
                results.append(self._run_step(work))
            except Exception as error:  # the error is that session's own: the others go on
                results.append(error)
        return results

    @torch.inference_mode()
    def _run_step(self, work: StepWork) -> torch.Tensor:
        model = self._model.narrow(work.span)
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
            outputs.append(model(rows, positions, cache=caches[item.sequence]).squeeze(0))
            row += item.count
        if not outputs:
            return hidden
        result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if not torch.isfinite(result).all():
            raise BadInputError("the step's outputs are not finite; the inputs were bad or overflow this precision")
        return result

    @staticmethod
    def _apply_forks(model: SpanModel, caches: dict[int, SpanCache], work: StepWork) -> None:
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
        if isinstance(work, ForwardWork):
            with torch.inference_mode():
                return torch.cat([self._run_whole(work.span, part) for part in self._split(work.hidden, work.counts)])
        parts = zip(
            self._split(work.hidden, work.counts), self._split(work.gradient, work.counts), strict=True
        )
        return torch.cat([self._input_gradient(work.span, inputs, gradient) for inputs, gradient in parts])

    def _split(self, rows: torch.Tensor, counts: object) -> tuple[torch.Tensor, ...]:
        rows = rows.to(device=self._model.device, dtype=self._model.dtype)
        return rows.split(list(counts))  # type: ignore[call-overload, no-any-return]

    def _run_whole(self, span: Span, hidden: torch.Tensor) -> torch.Tensor:
        model = self._model.narrow(span)
        positions = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(0)
        output: torch.Tensor = model(hidden.unsqueeze(0), positions).squeeze(0)
        return output

    def _input_gradient(self, span: Span, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        hidden = hidden.detach().clone().requires_grad_()
        with torch.enable_grad():
            output = self._run_whole(span, hidden)
        (input_gradient,) = torch.autograd.grad(output, hidden, gradient)
        return input_gradient
