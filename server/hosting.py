"""One loaded span with all that belongs to it: blocks, engine, sessions; a move replaces it as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.datatypes import PeerId, Span
from swarm.errors import FinalError
from swarm.server.adapters import open_adapters
from swarm.server.engine.engine import Engine
from swarm.server.planned_kv import UNLIMITED_POSITIONS
from swarm.server.rpc.session_claims import KVSizes
from swarm.server.rpc.sessions import HostedModel, SessionTable
from swarm.server.rpc.taking_over import HandoverReceiver
from swarm.server.span_loading import LoadedSpan, load_backend

if TYPE_CHECKING:
    from swarm.models import ModelSource
    from swarm.models.progress import ProgressReporter
    from swarm.server.node_config import NodeConfig
    from swarm.server.preparing import Workplace

__all__ = ["Hosting", "load_hosting"]

logger = logging.getLogger(__name__)
_CLOSE_ABANDONED_PERIOD_S = 1.0


def _log_broken(error: FinalError) -> None:
    logger.error("%s", error)


@dataclass(kw_only=True, eq=False)
class Hosting:
    """A span that is served; `close` frees it."""

    model: HostedModel
    engine: Engine
    sessions: SessionTable
    handovers: HandoverReceiver
    """Takes sessions over from servers that leave."""
    tokens_per_s: float
    """Measured single-stream decoding speed."""
    plan: str
    """What was put where, in one sentence for the operator."""
    kv_note: str
    """What the operator should know about the KV policy, in one sentence; empty when there is nothing to say."""
    release: Callable[[], None]
    """Gives back threads, processes and files of the backend."""
    is_broken: Callable[[], bool]
    on_broken: Callable[[FinalError], None] = _log_broken
    """Told once when the backend can not go on: a process that shares the blocks has died."""
    _sweeper: asyncio.Task[None] | None = None

    @property
    def span(self) -> Span:
        return self.model.span

    @property
    def weights(self) -> str:
        """Precision of the weights, as announced."""
        return self.model.weights

    def start(self) -> None:
        """Begin to look after the sessions."""
        self._sweeper = asyncio.create_task(self._close_abandoned_forever(), name="close-abandoned")

    async def close(self) -> None:
        """Close all sessions and give the memory back; harmless when repeated."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
            self._sweeper = None
        await self.sessions.shutdown()
        await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self.release)

    async def _close_abandoned_forever(self) -> None:
        while True:
            await asyncio.sleep(_CLOSE_ABANDONED_PERIOD_S)
            await self.sessions.close_abandoned()
            if self.is_broken():
                self.on_broken(
                    FinalError("a process that shares the blocks with this one has died; start the server again")
                )
                return


async def load_hosting(
    source: ModelSource,
    span: Span,
    config: NodeConfig,
    workplace: Workplace,
    *,
    peer_id: PeerId,
    report: ProgressReporter | None = None,
) -> Hosting:
    """Load and check blocks and start their engine.

    Raises UnsupportedModelError when they would be served wrongly, BadInputError when the memory is too small or an
    adapter is for another model, ModelFilesError for files that can not be read.
    """
    adapters = await asyncio.to_thread(open_adapters, config.adapters, report=report)
    loaded = await asyncio.to_thread(load_backend, source, span, config, workplace, adapters, report)
    # Before the engine's thread owns the backend.
    try:
        tokens_per_s = await asyncio.to_thread(measure_tokens_per_s, loaded)
    except BaseException:
        loaded.close()
        raise
    hosted = HostedModel(
        model_hash=source.model_hash,
        span=span,
        hidden_size=loaded.hidden_size,
        max_positions=source.max_positions or UNLIMITED_POSITIONS,
        kv_policy=loaded.kv_policy,
        rules_hash=loaded.rules_hash,
        weights=loaded.weights,
        peer_id=peer_id,
        adapters=loaded.adapters,
    )
    engine = Engine(loaded.backend, first_step_s=1 / tokens_per_s)
    engine.start()
    sessions = SessionTable(hosted, engine, config.limits, sizes=_measure_sizes(loaded))
    hosting = Hosting(
        model=hosted,
        engine=engine,
        sessions=sessions,
        handovers=HandoverReceiver(hosted, engine, sessions),
        tokens_per_s=tokens_per_s,
        plan=loaded.plan,
        kv_note=loaded.kv_note,
        release=loaded.close,
        is_broken=loaded.is_broken,
    )
    hosting.start()
    return hosting


def _measure_sizes(loaded: LoadedSpan) -> KVSizes:
    backend, footprint = loaded.backend, loaded.footprint
    total_bytes = backend.kv_usage.total_bytes
    if footprint is not None:
        exact_bytes = footprint.full_bytes(footprint.page_tokens) // footprint.page_tokens
    else:
        exact_bytes = max(total_bytes // backend.num_tokens_total, 1)
    return KVSizes(
        total_bytes=total_bytes, exact_bytes_per_token=exact_bytes, num_blocks=len(loaded.span), footprint=footprint
    )


def free_memory() -> None:
    """Give back what a closed Hosting held, once nothing refers to it: modules and hooks refer to each other."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_tokens_per_s(loaded: LoadedSpan, *, num_steps: int = 7) -> float:
    """Single-stream decoding speed of a span: the median of a few steps after a first one."""
    import torch

    from swarm.server.engine.work import StepWork
    from swarm.server.session_mirror import SequenceStep

    session = (b"measure", 1)
    times_s: list[float] = []
    for position in range(num_steps + 1):
        hidden = torch.zeros(1, loaded.hidden_size)
        work = StepWork(session, loaded.span, [SequenceStep(0, 0, position, 1)], hidden, lambda output, error: None)
        started_s = time.perf_counter()
        (result,) = loaded.backend.run_steps([work])
        if not isinstance(result, torch.Tensor):
            raise result if isinstance(result, BaseException) else RuntimeError("an idle server has no room")
        float(result.sum())  # waits for a GPU
        times_s.append(time.perf_counter() - started_s)
    loaded.backend.forget(session)
    return round(1.0 / sorted(times_s[1:])[num_steps // 2], 2)
