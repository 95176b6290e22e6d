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
from swarm.kvpolicy.settings import FULL_CACHE
from swarm.models.adapters.rows import adapters_for_rows
from swarm.models.narrowed import narrow
from swarm.server.engine.batched_decode import MAX_PADDED_TOKENS, make_groups
from swarm.server.engine.compressed_attention import CompressedAttention, CompressedSlice
from swarm.server.engine.compressed_sequence import Compression
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
    from swarm.server.engine.compression import Compressor
    from swarm.server.policy_layers import PolicyLayers

__all__ = ["LayerProbe", "RaggedBackend", "probe_layers", "probe_shapes"]

logger = logging.getLogger(__name__)
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class LayerProbe:
    """What the attention of one layer was given."""

    shape: KVShape
    window: int
    """Positions a query sees; 0 for all."""
    scaling: float
    query_values: int
    """Of a token's queries, all heads."""


def probe_shapes(model: SpanModel) -> list[KVShape]:
    """What each layer of a span stores per token; see `probe_layers`."""
    return [layer.shape for layer in probe_layers(model)]


def probe_layers(model: SpanModel) -> list[LayerProbe]:
    """What the layers of a span are like, from one pass over two zero tokens.

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
    return [
        LayerProbe(probe.shapes[layer], probe.windows[layer], probe.scalings[layer], probe.query_values[layer])
        for layer in range(model.num_layers)
    ]


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

    def __init__(
        self,
        model: SpanModel,
        *,
        memory_bytes: int,
        config: MemoryConfig | None = None,
        policy_layers: PolicyLayers | None = None,
        allows_kernel: bool = True,
    ) -> None:
        """Raises UnsupportedModelError when the family does not let its attention be replaced, or be compressed.

        Args:
            policy_layers: the policy of sessions that compress; None for none.
            allows_kernel: whether compiled code may attend over compressed sequences.
        """
        config = config or MemoryConfig()
        register()
        model.set_attention(ATTENTION_NAME)
        self._model = model
        layers = probe_layers(model)
        self.store = PageStore(
            [layer.shape for layer in layers],
            memory_bytes=memory_bytes,
            page_tokens=config.page_tokens,
            dtype=model.dtype,
            device=model.device,
            row_values=policy_layers.row_values if policy_layers is not None else None,
        )
        self.policy_layers = policy_layers
        """How sessions are compressed; None where none is."""
        self.policy = policy_layers.policy if policy_layers is not None else FULL_CACHE
        """Of sessions that compress; the others are exact."""
        self._attention: CompressedAttention | None = None
        self._compression: Compression | None = None
        self._compressor: Compressor | None = None
        if policy_layers is not None:
            self._compress_by(policy_layers, layers, allows_kernel=allows_kernel)
        self.memory = SessionMemory(self.store, config, compression=self._compression)
        self._parts: dict[Span, SpanModel | NarrowedSpan] = {}
        self.attends_in_groups = model.device.type != "cpu"
        """Whether decoding sequences share padded attention calls; see batched_decode.py."""
        self.num_tokens_run = 0
        """Tokens that were computed since start; what was known is not among them."""

    def _compress_by(self, policy_layers: PolicyLayers, layers: Sequence[LayerProbe], *, allows_kernel: bool) -> None:
        """Have what sessions under a policy need."""
        # Only here: what it loads is of no use to servers that keep everything.
        from swarm.server.engine.compressed_store import CompressedStore
        from swarm.server.engine.compression import Compressor
        from swarm.server.engine.token_scores import attach_scorers

        settings = policy_layers.settings
        store = CompressedStore(
            self.store,
            policy=policy_layers.policy,
            row_bytes=settings[0].codec.row_bytes,
            position_bytes=policy_layers.position_bytes,
            has_scores=policy_layers.has_scores,
        )
        attach_scorers(self._model.blocks, settings)
        self._attention = CompressedAttention(store, settings, allows_kernel=allows_kernel)
        self._compressor = Compressor(store, settings, [layer.scaling for layer in layers])
        self._compression = Compression(
            store=store,
            events=self._compressor,
            first_block=self._model.span.start,
            bytes_per_token=policy_layers.footprint.bytes_per_token,
            query_values=max(layer.query_values for layer in layers) if any(own.judges for own in settings) else 0,
        )

    @property
    def compressing_s(self) -> float:
        """Seconds spent since start on compressing what sessions hold."""
        return self._compressor.busy_s if self._compressor is not None else 0.0

    @property
    def num_tokens_total(self) -> int:
        """Positions that fit when the server is idle, under its policy."""
        return self.memory.num_tokens_total

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
            self.num_tokens_run += len(part)
            results.append(self._finish(prepared, output))
        return results

    def _finish(self, prepared: _Prepared, output: torch.Tensor) -> torch.Tensor | BaseException:
        """Remember what a step gave, compress what ends with it; its output, or what went wrong."""
        try:
            self.memory.record(prepared.work, prepared.items, output)
            for part in prepared.items:
                sequence, plan = part.compressed, part.plan
                if self._compression is not None and sequence is not None and plan is not None and plan.ends_staging:
                    self._compression.events.finish(sequence, plan)
        except Exception as error:  # the error is that session's own: the others go on
            logger.warning("a session could not be compressed: %s", error, exc_info=True)
            return error
        return output

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
        outputs: torch.Tensor = packed.squeeze(0).cpu()
        if plan.compressed is not None:
            # Last, once nothing else can fail: the steps of a batch that failed run again, and must find what they did.
            plan.compressed.keep(plan.scores or {}, plan.first_layer)
        return outputs

    def _plan(self, span: Span, batch: Sequence[_Prepared]) -> tuple[StepPlan, torch.Tensor]:
        """Where keys and values go and come from, and the positions [1, T]."""
        slices: list[SequenceSlice] = []
        compressed: list[CompressedSlice] = []
        slots: list[npt.NDArray[np.int64]] = [np.zeros((len(span), 0), dtype=np.int64)]
        paged_rows: list[npt.NDArray[np.int64]] = []
        positions: list[npt.NDArray[np.int64]] = []
        row = 0
        for prepared in batch:
            for part in prepared.items:
                start, end = part.item.start + part.num_known, part.item.start + part.item.count
                if start == end:
                    continue
                rows = range(row, row + end - start)
                row = rows.stop
                positions.append(np.arange(start, end))
                if part.compressed is not None and part.plan is not None:
                    compressed.append(CompressedSlice(rows.start, rows.stop, part.plan, part.compressed))
                    if not part.plan.is_staged:
                        continue
                    staged_start = part.compressed.table.staged_start
                    slots.append(part.table.slots(start - staged_start, end - staged_start))
                else:
                    slices.append(SequenceSlice(rows.start, rows.stop, start, part.table))
                    slots.append(part.table.slots(start, end))
                paged_rows.append(np.asarray(rows))
        device = self._model.device
        plan = StepPlan(
            store=self.store,
            slices=slices,
            slots=torch.from_numpy(np.concatenate(slots, axis=1)).to(device),
            first_layer=span.start - self._model.span.start,
            positions=torch.from_numpy(np.concatenate(positions)).to(device),
        )
        if compressed and self._attention is not None:
            plan.compressed = self._attention.plan(compressed)
            plan.scores = {} if self._attention.store.has_scores else None
            if plan.slots.shape[1] < row:
                every = np.concatenate([*paged_rows, np.zeros(0, dtype=np.int64)])
                plan.paged_rows = torch.from_numpy(every).to(device)
        if self.attends_in_groups:
            plan.groups = make_groups(
                slices, page_tokens=self.store.page_tokens, device=device, max_padded_tokens=MAX_PADDED_TOKENS
            )
        assert plan.positions is not None
        return plan, plan.positions.unsqueeze(0)

    def run_stateless(self, work: ForwardWork | BackwardWork) -> torch.Tensor:
        """Whole sequences without pages: outputs, or the gradient of the inputs, [T, H]."""
        return run_stateless(self._part(work.span), work)

    def _part(self, span: Span) -> SpanModel | NarrowedSpan:
        """The blocks of `span`, kept: routes use the same few parts again and again."""
        part = self._parts.get(span)
        if part is None:
            part = self._parts[span] = narrow(self._model, span)
        return part
