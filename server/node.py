"""The life of a server: join, choose blocks, load, check, announce, serve, drain, leave."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.datatypes import ServerInfo, ServerState, Span
from swarm.errors import BadInputError, UnsupportedModelError
from swarm.server.engine.engine import Engine, SpanBackend
from swarm.server.rpc.service import NodeService
from swarm.server.rpc.sessions import HostedModel, SessionLimits, SessionTable

if TYPE_CHECKING:
    import torch

    from swarm.discovery.registry import Registry
    from swarm.identity import Identity
    from swarm.models import ModelSource, SpanModel
    from swarm.models.progress import ProgressReporter

__all__ = ["Node", "NodeConfig"]

logger = logging.getLogger(__name__)
_UNLIMITED_POSITIONS = 2**20
"""For models that state no context length (bloom); memory is the limit then."""
_PACKED_SHARE = 0.125
"""Part of the memory still free that packed copies of weights may take."""
_WEIGHTS = ("auto", "fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """How to run a server."""

    span: Span | None = None
    """Blocks to serve; None lets the server choose those the swarm lacks most."""
    num_blocks: int | None = None
    """How many blocks to serve when it chooses; None: all of the model."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    weights: str = "auto"
    """Precision of the weights."""
    kv_policy: str = "none"
    kv_memory_bytes: int = 2**30
    """Memory for keys and values."""
    host: str = "0.0.0.0"
    """Address to listen on; what is announced is derived from it unless announce_host is given."""
    announce_host: str | None = None
    """Host name or address that others can reach this server at."""
    port: int = 0
    """gRPC port; 0 picks a free one."""
    dht_port: int = 0
    """DHT port; 0 picks a free one."""
    join: Sequence[str] = ()
    """Addresses of the swarm; empty starts a new one."""
    identity_path: Path | None = None
    """Key file; None makes a fresh identity."""
    announce_period_s: float = 5.0
    """A record lives for two periods, so a dead server is forgotten after at most that."""
    drain_timeout_s: float = 60.0
    """How long a leaving server lets its sessions finish."""
    num_threads: int | None = None
    """CPU threads for computing; None leaves it to torch."""
    limits: SessionLimits = field(default_factory=SessionLimits)

    def __post_init__(self) -> None:
        if self.weights not in _WEIGHTS:
            raise BadInputError(f"--weights {self.weights} is not offered yet; choose one of {', '.join(_WEIGHTS)}")
        if self.kv_policy != "none":
            raise BadInputError(f"--kv {self.kv_policy} is not offered yet; use --kv none")
        if self.span is not None and self.num_blocks is not None:
            raise BadInputError("give either --blocks or --num-blocks, not both")


class Node:
    """One server. `start`, then `wait_until_left` after `drain` or `leave`."""

    def __init__(
        self, source: ModelSource, identity: Identity, config: NodeConfig, *, registry: Registry | None = None
    ) -> None:
        """Without `registry` the server joins the DHT named by the config; tests pass one in memory."""
        self._source = source
        self._identity = identity
        self._config = config
        self._info: ServerInfo | None = None
        self._registry = registry
        self._engine: Engine | None = None
        self._sessions: SessionTable | None = None
        self._service: NodeService | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._announce_now = asyncio.Event()
        self._is_leaving = asyncio.Event()

    @property
    def info(self) -> ServerInfo:
        """What this server announces now. Raises RuntimeError before start."""
        if self._info is None:
            raise RuntimeError("the server has not started")
        if self._sessions is None or self._engine is None or self._info.state is ServerState.JOINING:
            return self._info  # it has no totals yet that free tokens could be a part of
        return replace(
            self._info, num_sessions=self._sessions.num_sessions, kv_tokens_free=self._engine.num_tokens_free
        )

    def join_addresses(self) -> list[str]:
        """What others pass to --join, DHT addresses first."""
        addresses = self._registry.join_addresses() if self._registry is not None else []
        return [*addresses, *(f"grpc://{address}" for address in (self._info.addresses if self._info else ()))]

    async def start(self, report: ProgressReporter | None = None) -> None:
        """Join the swarm, load and check the blocks, and announce them. On failure nothing stays behind."""
        try:
            await self._start(report)
        except BaseException:
            await self.leave()
            raise

    async def _start(self, report: ProgressReporter | None) -> None:
        config, source = self._config, self._source
        self._check_asked_blocks()
        if self._registry is None:
            self._registry = await self._join()
        span = await self._choose_span()
        # At once, so that others who start now choose other blocks.
        self._info = self._joining_info(span)
        await self._announce()
        self._tasks.append(asyncio.create_task(self._announce_forever(), name="announce"))
        model = await asyncio.to_thread(self._load, span, report)
        from swarm.server.engine.choosing import choose_backend

        chosen = await asyncio.to_thread(choose_backend, model, memory_bytes=config.kv_memory_bytes)
        # Before the engine's thread owns the backend.
        tokens_per_s = await asyncio.to_thread(measure_tokens_per_s, model, chosen.backend)
        hosted = HostedModel(
            model_hash=source.model_hash,
            span=span,
            hidden_size=model.hidden_size,
            max_positions=source.max_positions or _UNLIMITED_POSITIONS,
            kv_policy=config.kv_policy,
            peer_id=self._identity.peer_id,
        )
        self._engine = Engine(chosen.backend)
        self._engine.start()
        self._sessions = SessionTable(hosted, self._engine, config.limits)
        from swarm.discovery import CachedRegistry
        from swarm.discovery.lookup_service import answer_lookup

        registry = CachedRegistry(self._registry)  # anyone may ask, and each look-up reads many keys

        async def lookup(request: bytes) -> bytes:
            return await answer_lookup(registry, request)

        self._service = NodeService(
            model=hosted,
            sessions=self._sessions,
            engine=self._engine,
            describe=lambda: self.info,
            answer_lookup=lookup,
            join_addresses=self.join_addresses,
        )
        port = await self._service.start(config.host, config.port)
        self._info = replace(
            self._info,
            state=ServerState.ONLINE,
            weights=_weights_name(model),
            kv_tokens_free=self._engine.num_tokens_free,
            kv_tokens_total=self._engine.num_tokens_total,
            tokens_per_s=tokens_per_s,
            addresses=[_with_port(self._announced_host(), port)],
        )
        await self._announce()
        self._tasks.append(asyncio.create_task(self._close_abandoned_forever(), name="close-abandoned"))

    def _joining_info(self, span: Span) -> ServerInfo:
        source = self._source
        return ServerInfo(
            peer_id=self._identity.peer_id,
            model_hash=source.model_hash,
            model_name=source.name,
            num_blocks=source.num_blocks,
            span=span,
            state=ServerState.JOINING,
            weights=self._config.weights,
            kv_policy=self._config.kv_policy,
            version=_version(),
        )

    async def _join(self) -> Registry:
        from swarm.discovery.dht import DhtRegistry
        from swarm.discovery.lookup_client import find_dht_addresses

        config = self._config
        initial_peers = await find_dht_addresses(config.join, timeout_s=10.0)
        return await DhtRegistry.start(
            self._identity, host=config.host, port=config.dht_port, initial_peers=initial_peers
        )

    def _check_asked_blocks(self) -> None:
        """Refuse blocks that the model does not have, before anybody is asked for anything."""
        config, source = self._config, self._source
        if config.span is not None and config.span.end > source.num_blocks:
            raise BadInputError(
                f"blocks {config.span} are outside {source.name}, which has blocks 0:{source.num_blocks}"
            )
        if config.num_blocks is not None and not 1 <= config.num_blocks <= source.num_blocks:
            raise BadInputError(f"--num-blocks {config.num_blocks} is outside 1..{source.num_blocks} of {source.name}")

    async def _choose_span(self) -> Span:
        """The blocks asked for, or those that are served least."""
        from swarm.routing.placement import choose_span

        config, source = self._config, self._source
        if config.span is not None:
            return config.span
        assert self._registry is not None
        servers = await self._registry.lookup(source.model_hash, source.num_blocks)
        return choose_span(servers, source.num_blocks, config.num_blocks or source.num_blocks)

    def _load(self, span: Span, report: ProgressReporter | None) -> SpanModel:
        """Load and check the blocks. Raises UnsupportedModelError when they would be served wrongly."""
        import torch

        from swarm.models import check_span, load_span

        if self._config.num_threads is not None:
            torch.set_num_threads(self._config.num_threads)
        device = _choose_device(self._config.device)
        dtype = _choose_dtype(self._config.weights, device)
        model = load_span(self._source, span, dtype=dtype, device=device, report=report)
        verdict = check_span(model)
        if not verdict.ok:
            raise UnsupportedModelError(f"{self._source.name} is not served: {verdict.reason}")
        if model.device.type == "cpu":
            import psutil

            from swarm.server.engine.packed_linear import pack_large_linears

            pack_large_linears(model, max_bytes=int(psutil.virtual_memory().available * _PACKED_SHARE))
        return model

    def _announced_host(self) -> str:
        from swarm.discovery.addresses import advertised_host

        return self._config.announce_host or advertised_host(self._config.host)

    # -- while serving -------------------------------------------------------------------------

    async def _announce(self) -> None:
        assert self._registry is not None
        await self._registry.announce(self.info, ttl_s=2 * self._config.announce_period_s)

    async def _announce_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.announce_period_s):
                    await self._announce_now.wait()
            except TimeoutError:
                pass
            self._announce_now.clear()
            try:
                await self._announce()
            except Exception as error:  # the next period tries again; sessions do not depend on it
                logger.warning("could not announce: %s", error)

    async def _close_abandoned_forever(self) -> None:
        assert self._sessions is not None
        while True:
            await asyncio.sleep(1.0)
            await self._sessions.close_abandoned()

    async def drain(self) -> None:
        """Take no new sessions, let those that are open finish until the deadline, then leave."""
        if self._sessions is None or self._info is None:
            await self.leave()
            return
        self._sessions.is_draining = True
        self._info = replace(self._info, state=ServerState.DRAINING)
        self._announce_now.set()
        deadline_s = time.monotonic() + self._config.drain_timeout_s
        while self._sessions.num_sessions and time.monotonic() < deadline_s and not self._is_leaving.is_set():
            await asyncio.sleep(0.1)
        if not self._is_leaving.is_set():
            await self.leave()

    async def leave(self) -> None:
        """Stop serving at once and withdraw; harmless when repeated."""
        if self._is_leaving.is_set():
            return
        self._is_leaving.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._registry is not None and self._info is not None:
            self._info = replace(self._info, state=ServerState.OFFLINE)
            try:
                async with asyncio.timeout(3.0):
                    await self._registry.withdraw(self.info)
            except Exception as error:  # the record expires by itself
                logger.info("could not withdraw: %s", error)
        if self._sessions is not None:
            await self._sessions.shutdown()
        if self._service is not None:
            await self._service.stop()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        if self._registry is not None:
            await self._registry.close()


def _choose_device(name: str) -> str:
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda:0" if has_cuda else "cpu"
    if name == "cpu":
        return name
    if not name.startswith("cuda"):
        raise BadInputError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N")
    if not has_cuda:
        raise BadInputError(f"--device {name} was asked for, but torch sees no CUDA device; use --device cpu")
    return "cuda:0" if name == "cuda" else name


def _choose_dtype(weights: str, device: str) -> torch.dtype:
    import torch

    if weights == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]


def _weights_name(model: SpanModel) -> str:
    return {"torch.float32": "fp32", "torch.bfloat16": "bf16"}[str(model.dtype)]


def measure_tokens_per_s(model: SpanModel, backend: SpanBackend, *, num_steps: int = 7) -> float:
    """Single-stream decoding speed of a span: the median of a few steps after a first one."""
    import torch

    from swarm.server.engine.work import StepWork
    from swarm.server.session_mirror import SequenceStep

    session = (b"measure", 1)
    times_s: list[float] = []
    for position in range(num_steps + 1):
        hidden = torch.zeros(1, model.hidden_size)
        work = StepWork(session, model.span, [SequenceStep(0, 0, position, 1)], hidden, lambda output, error: None)
        started_s = time.perf_counter()
        (result,) = backend.run_steps([work])
        if not isinstance(result, torch.Tensor):
            raise result if isinstance(result, BaseException) else RuntimeError("an idle server has no room")
        float(result.sum())  # waits for a GPU
        times_s.append(time.perf_counter() - started_s)
    backend.forget(session)
    return round(1.0 / sorted(times_s[1:])[num_steps // 2], 2)


def _with_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("swarm-inference")
    except PackageNotFoundError:
        return "0"
