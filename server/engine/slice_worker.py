"""A process that holds one slice of a span's matrices and repeats every call of the engine's backend."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.errors import PeerFaultError, SwarmError

if TYPE_CHECKING:
    import torch

    from swarm.models import ModelSource
    from swarm.server.engine.ragged import RaggedBackend
    from swarm.server.engine.slice_group import ProcessGroup
    from swarm.server.engine.slice_messages import Call

__all__ = ["SharedClock", "SliceOrder", "describe_outcome", "load_slice", "run_call", "run_worker"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SliceOrder:
    """What a process has to load, and whom to meet."""

    model: str
    """Name of the model, as `resolve_model` takes it."""
    cache_dir: str
    model_hash: str
    """What the name must lead to."""
    start: int
    end: int
    dtype: str
    device: str
    rank: int
    size: int
    memory_bytes: int
    """For this process' part of the KV memory."""
    memory_config: dict[str, float]
    """Fields of MemoryConfig."""
    meeting_place: str
    timeout_s: float
    num_threads: int | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class SharedClock:
    """A clock that stands still during a call, at the time that the first process read."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def run_worker(connection: Connection, order_json: str) -> None:
    """Load, meet the others, and repeat calls until the connection ends. Runs as a process of its own."""
    # Ctrl-C goes to all processes of a terminal; the first one decides when it is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order = SliceOrder(**json.loads(order_json))
    try:
        _serve(connection, order)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the first process is gone
    except SwarmError as error:
        _tell(connection, error=str(error))
    except Exception as error:  # a traceback in a process that nobody watches helps nobody
        logger.debug("a slice of the blocks failed", exc_info=True)
        _tell(connection, error=f"{type(error).__name__}: {error}")


def _serve(connection: Connection, order: SliceOrder) -> None:
    import torch

    from swarm.models import resolve_model
    from swarm.server.engine.session_memory import MemoryConfig
    from swarm.server.engine.slice_messages import decode_call

    if order.num_threads is not None:
        torch.set_num_threads(order.num_threads)
    source = resolve_model(order.model, cache_dir=Path(order.cache_dir))
    if source.model_hash != order.model_hash:
        raise PeerFaultError(f"the files of {order.model} have changed since the server started")
    clock = SharedClock()
    config = MemoryConfig(**order.memory_config)  # type: ignore[arg-type]

    def wait_for_the_others() -> None:
        _tell(connection, loaded=True)
        connection.recv_bytes()  # the first process begins to meet when all have loaded

    group, backend = load_slice(source, order, clock, config, before_meeting=wait_for_the_others)
    _tell(connection, num_tokens_total=backend.num_tokens_total)
    while True:
        call = decode_call(connection.recv_bytes())
        if call.name == "stop":
            return
        for tensor in call.tensors():
            group.share(tensor)
        clock.now_s = call.now_s
        outcome = run_call(backend, call)
        if call.name in ("steps", "stateless"):
            _tell(connection, outcome=describe_outcome(backend, outcome))
        if group.is_broken:
            return


def load_slice(
    source: ModelSource,
    order: SliceOrder,
    clock: SharedClock,
    config: Any,
    *,
    before_meeting: Callable[[], object],
) -> tuple[ProcessGroup, RaggedBackend]:
    """One process' part of the blocks and of the KV memory; every process of the group calls this.

    Raises UnsupportedModelError when the model can not be cut, PeerFaultError when the others do not come.
    """
    import torch

    from swarm.datatypes import Span
    from swarm.models import load_span
    from swarm.models.tensor_slices import slice_span
    from swarm.server.engine.ragged import RaggedBackend
    from swarm.server.engine.session_memory import SessionMemory
    from swarm.server.engine.slice_group import ProcessGroup
    from swarm.server.engine.slice_messages import parse_dtype

    # On the CPU, where files are mapped and only what is kept is read.
    device = torch.device(order.device)
    model = load_span(source, Span(start=order.start, end=order.end), dtype=parse_dtype(order.dtype))
    placeholder = _GroupToCome(order.rank, order.size)
    slice_span(model, placeholder)
    torch.nn.Module.to(model, device)
    before_meeting()
    group = ProcessGroup(
        Path(order.meeting_place), rank=order.rank, size=order.size, device=device, timeout_s=order.timeout_s
    )
    placeholder.group = group
    backend = RaggedBackend(model, memory_bytes=order.memory_bytes, config=config)
    backend.memory = SessionMemory(backend.store, config, now_s=clock)
    return group, backend


class _GroupToCome:
    """Stands for the group while blocks are loaded, which may take minutes."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.group: ProcessGroup | None = None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.group is not None
        return self.group.sum(tensor)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        assert self.group is not None
        return self.group.gather(tensor)


def run_call(backend: RaggedBackend, call: Call) -> Any:
    """Make the call; what it returns, or the error it ends with."""
    try:
        if call.name == "steps":
            return backend.run_steps(list(call.steps))
        if call.stateless is not None:
            return backend.run_stateless(call.stateless)
        assert call.session is not None
        if call.name == "set_away":
            backend.set_away(call.session, call.is_away)
        else:
            {"forget": backend.forget, "drop_step": backend.drop_step}[call.name](call.session)
    except Exception as error:
        return error
    return None


def describe_outcome(backend: RaggedBackend, outcome: Any) -> list[str]:
    """What every process must agree about: how each session fared, and what memory is left."""
    results = outcome if isinstance(outcome, list) else [outcome]
    return [*(type(result).__name__ for result in results), str(backend.store.pool.num_free)]


def _tell(connection: Connection, **message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())
