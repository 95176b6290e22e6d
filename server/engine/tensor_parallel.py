"""A backend whose blocks are cut into slices, one for each of several devices of this machine.

The engine's process holds slice 0 and tells worker processes every call before it makes it; all of them make it, with
the same hidden states at the same time by the same clock, so all take the same decisions about pages, of which each
holds those of its own KV heads. What flows between them are the sums that transformers' plans ask for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from swarm.errors import BadInputError, PeerFaultError, UnsupportedModelError
from swarm.server.engine.session_memory import MemoryConfig
from swarm.server.engine.slice_messages import Call, encode_call, name_dtype
from swarm.server.engine.slice_worker import (
    SharedClock,
    SliceOrder,
    describe_outcome,
    load_slice,
    run_call,
    run_worker,
)

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.models import ModelSource, SpanModel
    from swarm.server.engine.engine import NotNow
    from swarm.server.engine.kv_usage import KVUsage
    from swarm.server.engine.ragged import RaggedBackend
    from swarm.server.engine.slice_group import ProcessGroup
    from swarm.server.engine.work import BackwardWork, ForwardWork, SessionKey, StepWork

__all__ = ["SliceConfig", "TensorParallelBackend", "start_tensor_parallel"]

logger = logging.getLogger(__name__)
_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """How a span is shared out."""

    devices: Sequence[str]
    """One for each process, the engine's first: `("cuda:0", "cuda:1")`; CPUs may be named several times."""
    dtype: torch.dtype = torch.float32
    """Of weights and hidden states; weights in few bits can not be cut yet."""
    memory_bytes: int = 2**30
    """For keys and values, all devices together."""
    cache_dir: Path | None = None
    """As for `resolve_model`."""
    timeout_s: float = 30.0
    """For every exchange between the processes; a step whose exchange takes longer has failed."""
    start_timeout_s: float = 1800.0
    """For loading."""
    num_threads: int | None = None
    """CPU threads of each process."""

    def __post_init__(self) -> None:
        if len(self.devices) < 2:
            raise BadInputError("slices need two devices or more")
        if self.timeout_s <= 0 or self.start_timeout_s <= 0 or self.memory_bytes < 1:
            raise ValueError("SliceConfig needs timeouts and memory above 0")


def start_tensor_parallel(
    source: ModelSource, span: Span, config: SliceConfig, *, memory: MemoryConfig | None = None
) -> TensorParallelBackend:
    """Load a span in slices and start the worker processes; takes as long as loading does.

    Raises:
        UnsupportedModelError: the family has no tensor-parallel plan, or the devices can not share it evenly.
        PeerFaultError: a worker process failed; the message says how.
    """
    from swarm.models.tensor_slices import refusal_of_slices

    size = len(config.devices)
    reason = refusal_of_slices(source.config, size)
    if reason is not None:
        raise UnsupportedModelError(reason)
    memory = memory or MemoryConfig()
    folder = Path(tempfile.mkdtemp(prefix="swarm-slices-"))
    orders = [_order(source, span, config, memory, rank, folder) for rank in range(size)]
    workers = _Workers(config)
    try:
        workers.start(orders[1:])
        clock = SharedClock()
        # This process has nothing to wait for before it meets the others but that they have loaded.
        group, local = load_slice(source, orders[0], clock, memory, before_meeting=workers.wait_until_loaded)
        totals = {local.num_tokens_total, *workers.wait_until_ready()}
        if len(totals) > 1:
            raise PeerFaultError(f"the processes that share the blocks have room for different amounts: {totals}")
    except BaseException:
        workers.stop()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return TensorParallelBackend(local, group, workers, clock)


def _order(
    source: ModelSource, span: Span, config: SliceConfig, memory: MemoryConfig, rank: int, folder: Path
) -> SliceOrder:
    from swarm.models.source import default_cache_dir

    return SliceOrder(
        model=source.name,
        cache_dir=str(config.cache_dir or default_cache_dir()),
        model_hash=source.model_hash,
        start=span.start,
        end=span.end,
        dtype=name_dtype(config.dtype),
        device=config.devices[rank],
        rank=rank,
        size=len(config.devices),
        memory_bytes=config.memory_bytes // len(config.devices),
        memory_config=asdict(memory),
        meeting_place=str(folder / "meeting"),
        timeout_s=config.timeout_s,
        num_threads=config.num_threads,
    )


class TensorParallelBackend:
    """A SpanBackend whose every call is made by all processes. Broken for good once one of them fails."""

    memory = None
    """Sessions can not be moved to other servers: each process holds only its own heads."""

    def __init__(self, local: RaggedBackend, group: ProcessGroup, workers: _Workers, clock: SharedClock) -> None:
        """Not for callers; use `start_tensor_parallel`."""
        self._local = local
        self._group = group
        self._workers = workers
        self._clock = clock

    @property
    def model(self) -> SpanModel:
        """This process' slice; it can be run by itself only through this backend."""
        return self._local._model

    @property
    def is_broken(self) -> bool:
        """Whether a process was lost: the server should load anew, or leave."""
        return self._group.is_broken or self._workers.is_broken

    @property
    def num_tokens_total(self) -> int:
        """Positions that fit when the server is idle."""
        return self._local.num_tokens_total

    @property
    def num_tokens_free(self) -> int:
        """Positions that still fit; another thread may read it."""
        return self._local.num_tokens_free

    @property
    def kv_usage(self) -> KVUsage:
        """Use of this process' KV memory, of which the others have as much; another thread may read it."""
        return self._local.kv_usage

    @property
    def num_tokens_run(self) -> int:
        """Tokens that were computed since start."""
        return self._local.num_tokens_run

    @property
    def compressing_s(self) -> float:
        """Seconds spent since start on compressing, of this process' part."""
        return self._local.compressing_s

    def run_steps(self, works: list[StepWork]) -> list[torch.Tensor | NotNow | BaseException]:
        """One step of each session, as RaggedBackend runs them. Raises PeerFaultError when a process is gone."""
        results: list[torch.Tensor | NotNow | BaseException] = self._call(Call("steps", time.monotonic(), steps=works))
        return results

    def run_stateless(self, work: ForwardWork | BackwardWork) -> torch.Tensor:
        """Outputs or gradients of whole sequences. Raises PeerFaultError when a process is gone."""
        result: torch.Tensor = self._call(Call("stateless", time.monotonic(), stateless=work))
        return result

    def forget(self, session: SessionKey) -> None:
        """Give a session's pages back; harmless when there are none."""
        self._tell(Call("forget", session=session))

    def drop_step(self, session: SessionKey) -> None:
        """The session's step that was last tried, or ran in part, is not gone on with."""
        self._tell(Call("drop_step", session=session))

    def set_away(self, session: SessionKey, is_away: bool) -> None:
        """Whether a session's client is away."""
        self._tell(Call("set_away", session=session, is_away=is_away))

    def has_lost(self, session: SessionKey) -> bool:
        """Whether a session was closed to make room; another thread may ask."""
        return self._local.has_lost(session)

    def close(self) -> None:
        """End the worker processes; harmless when repeated."""
        self._workers.stop()

    def _tell(self, call: Call) -> None:
        """Make a call that has no result and needs nobody's answer."""
        if not self.is_broken:
            self._workers.send(encode_call(call))
        run_call(self._local, call)

    def _call(self, call: Call) -> Any:
        if self.is_broken:
            raise PeerFaultError("a process that shares the blocks is gone; restart the server")
        self._clock.now_s = call.now_s
        self._workers.send(encode_call(call))
        for tensor in call.tensors():
            self._group.share(tensor.contiguous())
        outcome = run_call(self._local, call)
        if self._group.is_broken:
            self._workers.is_broken = True
            raise PeerFaultError(f"a process that shares the blocks is gone; restart the server ({outcome})")
        self._workers.compare(describe_outcome(self._local, outcome))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class _Workers:
    """The other processes, and a pipe to each."""

    def __init__(self, config: SliceConfig) -> None:
        self._config = config
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self.is_broken = False

    def start(self, orders: Sequence[SliceOrder]) -> None:
        # Not forked: torch and gRPC have threads, which a fork does not survive.
        context = multiprocessing.get_context("spawn")
        for order in orders:
            here, there = context.Pipe()
            process = context.Process(
                target=run_worker, args=(there, order.to_json()), name=f"swarm-slice-{order.rank}", daemon=True
            )
            process.start()
            there.close()  # so that the end of either process ends the pipe
            self._processes.append(process)
            self._pipes.append(here)

    def wait_until_loaded(self) -> None:
        """Wait for all to have loaded, then let them meet."""
        deadline_s = time.monotonic() + self._config.start_timeout_s
        for number in range(len(self._pipes)):
            self._receive(number, deadline_s - time.monotonic())
        self.send(b"meet")

    def wait_until_ready(self) -> list[int]:
        """How many tokens each has room for."""
        return [
            int(self._receive(number, self._config.timeout_s)["num_tokens_total"]) for number in range(len(self._pipes))
        ]

    def send(self, message: bytes) -> None:
        """To all. Raises PeerFaultError when one is gone."""
        for number, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(message)
            except OSError as error:
                self._lose(number, str(error), error)

    def compare(self, outcome: list[str]) -> None:
        """See that all processes came to the same end. Raises PeerFaultError when they did not, or one is gone."""
        for number in range(len(self._pipes)):
            found = self._receive(number, self._config.timeout_s).get("outcome")
            if found != outcome:
                self._lose(number, f"it came to {found}, the others to {outcome}", None)

    def _receive(self, number: int, timeout_s: float) -> dict[str, Any]:
        pipe = self._pipes[number]
        try:
            if not pipe.poll(max(timeout_s, 0.0)):
                self._lose(number, f"it was silent for {timeout_s:.0f} s", None)
            message: dict[str, Any] = json.loads(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self._processes[number].join(_POLL_S)
            self._lose(number, f"it ended with exit code {self._processes[number].exitcode}", error)
        if "error" in message:
            self._lose(number, str(message["error"]), None)
        return message

    def _lose(self, number: int, reason: str, cause: BaseException | None) -> NoReturn:
        self.is_broken = True
        device = self._config.devices[number + 1]
        raise PeerFaultError(f"the process for the blocks' slice on {device} failed: {reason}") from cause

    def stop(self) -> None:
        """End all processes, at once where they do not end by themselves."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(encode_call(Call("stop")))
            pipe.close()
        for process in self._processes:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join(5.0)
        self._pipes, self._processes = [], []
