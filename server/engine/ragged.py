"""The backend that runs all sessions' new tokens as one packed row over paged keys and values."""

# Letters: T tokens of all sequences, H hidden size.

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from swarm.errors import BadInputError, UnsupportedModelError
from swarm.models.adapters.rows import adapters_for_rows
from swarm.models.narrowed import narrow
from swarm.server.engine.batched_decode import MAX_PADDED_TOKENS, make_groups
from swarm.server.engine.engine import NotNow
from swarm.server.engine.kv_usage import KVUsage
from swarm.server.engine.page_store import KVShape, PageStore
from swarm.server.engine.ragged_attention import (
    ATTENTION_NAME,
    SequenceSlice,
    ShapeProbe,
    StepPlan,
    current_plan,
    register,
)
from swarm.server.engine.session_memory import MemoryConfig, PreparedItem, SessionMemory
from swarm.server.engine.stateless import run_stateless
from swarm.server.engine.work import BackwardWork, ForwardWork, SessionKey, StepWork

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.models import SpanModel
    from swarm.models.narrowed import NarrowedSpan

__all__ = ["RaggedBackend", "probe_shapes"]

logger = logging.getLogger(__name__)
_LAYER_TYPES = ("full_attention", "sliding_attention")


def probe_shapes(model: SpanModel) -> list[KVShape]:
    """What each layer of a span stores per token, from one pass over two zero tokens.

    The model's attention must be ATTENTION_NAME. Raises KeyError when a layer never came to our attention,
    UnsupportedModelError when it sees other positions than its type says: a self-test is too short to notice.
    """
    probe = ShapeProbe()
    token = current_plan.set(probe)
    try:
        hidden = torch.zeros(1, 2, model.hidden_size, dtype=model.dtype, device=model.device)
        with torch.inference_mode():
            model(hidden, torch.arange(2, device=model.device).unsqueeze(0))
    finally:
        current_plan.reset(token)
    for layer, kind in enumerate(model.layer_types):
        if (kind == "sliding_attention") != bool(probe.windows[layer]) or kind not in _LAYER_TYPES:
            raise UnsupportedModelError(
                f"{model.architecture} has a block of type {kind} whose attention function is given a window of "
                f"{probe.windows[layer]} (0 is none)"
            )
    return [probe.shapes[layer] for layer in range(model.num_layers)]


@dataclass(frozen=True)
class _Prepared:
    work: StepWork
    items: Sequence[PreparedItem]

    def rows_to_run(self) -> torch.Tensor:
        """Inputs [T, H] of the tokens whose outputs are not known."""
        if not any(part.num_known for part in self.items):
            return self.work.hidden
        rows: list[torch.Tensor] = []
        first = 0
        for part in self.items:
            rows.append(self.work.hidden[first + part.num_known : first + part.item.count])
            first += part.item.count
        return torch.cat(rows)

    def complete(self, computed: torch.Tensor) -> torch.Tensor:
        """Outputs [T, H] of all tokens, from those that ran and those that were known."""
        if not any(part.num_known for part in self.items):
            return computed
        rows: list[torch.Tensor] = []
        first = 0
        for part in self.items:
            rows.extend(part.known_outputs)
            num_computed = part.item.count - part.num_known
            rows.append(computed[first : first + num_computed])
            first += num_computed
        return torch.cat(rows)


class RaggedBackend:
    """A span and a page store; sessions join and leave between steps at no cost."""

    def __init__(self, model: SpanModel, *, memory_bytes: int, config: MemoryConfig | None = None) -> None:
        """Raises UnsupportedModelError when the family does not let its attention be replaced."""
        config = config or MemoryConfig()
        register()
        model.set_attention(ATTENTION_NAME)
        self._model = model
        self.store = PageStore(
            probe_shapes(model),
            memory_bytes=memory_bytes,
            page_tokens=config.page_tokens,
            dtype=model.dtype,
            device=model.device,
        )
        self.memory = SessionMemory(self.store, config)
        self._parts: dict[Span, SpanModel | NarrowedSpan] = {}
        self.attends_in_groups = model.device.type != "cpu"
        """Whether decoding sequences share padded attention calls; see batched_decode.py."""
        self.num_tokens_run = 0
        """Tokens that were computed since start; what was known is not among them."""

    @property
    def num_tokens_total(self) -> int:
        """Positions that fit when the server is idle."""
        return self.store.num_tokens_total

    @property
    def num_tokens_free(self) -> int:
        """Positions that still fit; another thread may read it."""
        return self.memory.num_tokens_free

    @property
    def kv_usage(self) -> KVUsage:
        """Use of the KV memory; another thread may read it."""
        return self.memory.usage

    def forget(self, session: SessionKey) -> None:
        """Give a session's pages back; harmless when there are none."""
        self.memory.forget(session)
        self.memory.update_free()

    def drop_step(self, session: SessionKey) -> None:
        """The session's step that was last tried, or ran in part, is not gone on with."""
        self.memory.drop_step(session)

    def set_away(self, session: SessionKey, is_away: bool) -> None:
        """Whether a session's client is away."""
        self.memory.set_away(session, is_away)

    def has_lost(self, session: SessionKey) -> bool:
        """Whether a session was closed to make room; another thread may ask."""
        return self.memory.has_lost(session)

    def run_steps(self, works: list[StepWork]) -> list[torch.Tensor | NotNow | BaseException]:
        """One step of each session as one batch per part of the span; [T, H] each, or that session's error."""
        results: dict[int, torch.Tensor | NotNow | BaseException] = {}
        batches: dict[Span, dict[int, _Prepared]] = {}
        protected: set[SessionKey] = set()
        for index, work in enumerate(works):
            try:
                if work.hidden.dtype is not self._model.dtype:  # what is shared is keyed by what really runs
                    work = replace(work, hidden=work.hidden.to(self._model.dtype))
                items = self.memory.prepare(work, protected=protected)
            except Exception as error:  # the error is that session's own: the others go on
                results[index] = error
                continue
            if isinstance(items, NotNow):
                results[index] = items
                continue
            protected.add(work.session)
            batches.setdefault(work.span, {})[index] = _Prepared(work, items)
        for span, batch in batches.items():
            # Rows of one adapter side by side take one product for it in each layer.
            order = sorted(batch, key=lambda index: works[index].adapter)
            results |= zip(order, self._run_batch(span, [batch[index] for index in order]), strict=True)
        self.memory.update_free()
        return [results[index] for index in range(len(works))]

    def _run_batch(self, span: Span, batch: list[_Prepared]) -> list[torch.Tensor | NotNow | BaseException]:
        """Run prepared steps together; if the batch fails as a whole, one by one, to find whose fault it is."""
        rows = [prepared.rows_to_run() for prepared in batch]
        try:
            computed = self._run_packed(span, batch, rows)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            logger.warning("a batch of %d steps failed and is run one by one: %s", len(batch), error)
            return [result for prepared in batch for result in self._run_batch(span, [prepared])]
        results: list[torch.Tensor | NotNow | BaseException] = []
        for prepared, part in zip(batch, computed.split([len(part) for part in rows]), strict=True):
            if not torch.isfinite(part).all():
                results.append(BadInputError("the step's outputs are not finite; its inputs were bad or overflow"))
                continue
            output = prepared.complete(part)
            self.memory.record(prepared.work, prepared.items, output)
            self.num_tokens_run += len(part)
            results.append(output)
        return results

    @torch.inference_mode()
    def _run_packed(self, span: Span, batch: Sequence[_Prepared], rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Outputs [T, H], on the host, of all rows that must run."""
        hidden = rows[0] if len(rows) == 1 else torch.cat(list(rows))
        if not hidden.shape[0]:
            return hidden
        model = self._part(span)
        hidden = hidden.to(device=model.device, dtype=model.dtype)
        plan, positions = self._plan(span, batch)
        token = current_plan.set(plan)
        adapters = [(prepared.work.adapter, len(part)) for prepared, part in zip(batch, rows, strict=True)]
        try:
            with adapters_for_rows(adapters):
                packed = model(hidden.unsqueeze(0), positions)
        finally:
            current_plan.reset(token)
        return packed.squeeze(0).cpu()

    def _plan(self, span: Span, batch: Sequence[_Prepared]) -> tuple[StepPlan, torch.Tensor]:
        """Where keys and values go and come from, and the positions [1, T]."""
        slices: list[SequenceSlice] = []
        slots: list[npt.NDArray[np.int64]] = []
        positions: list[npt.NDArray[np.int64]] = []
        row = 0
        for prepared in batch:
            for part in prepared.items:
                start, end = part.item.start + part.num_known, part.item.start + part.item.count
                if start == end:
                    continue
                slices.append(SequenceSlice(row, row + end - start, start, part.table))
                slots.append(part.table.slots(start, end))
                positions.append(np.arange(start, end))
                row += end - start
        device = self._model.device
        plan = StepPlan(
            store=self.store,
            slices=slices,
            slots=torch.from_numpy(np.concatenate(slots, axis=1)).to(device),
            first_layer=span.start - self._model.span.start,
        )
        if self.attends_in_groups:
            plan.groups = make_groups(
                slices, page_tokens=self.store.page_tokens, device=device, max_padded_tokens=MAX_PADDED_TOKENS
            )
        return plan, torch.from_numpy(np.concatenate(positions)).to(device).unsqueeze(0)

    def run_stateless(self, work: ForwardWork | BackwardWork) -> torch.Tensor:
        """Whole sequences without pages: outputs, or the gradient of the inputs, [T, H]."""
        return run_stateless(self._part(work.span), work)

    def _part(self, span: Span) -> SpanModel | NarrowedSpan:
        """The blocks of `span`, kept: routes use the same few parts again and again."""
        part = self._parts.get(span)
        if part is None:
            part = self._parts[span] = narrow(self._model, span)
        return part
