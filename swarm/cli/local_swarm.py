"""A whole swarm on this machine: an entry point and servers, each in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from swarm.cli.node_process import NodeProcess, stop_all
from swarm.datatypes import PeerId, Span
from swarm.errors import BadInputError

__all__ = ["LocalServer", "LocalSwarm", "fair_num_threads", "split_blocks"]

_HOST: Final = "127.0.0.1"
_START_TIMEOUT_S: Final = 300.0
_POLL_S: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    """A server of a LocalSwarm."""

    peer_id: PeerId
    span: Span
    pid: int
    grpc_address: str
    """As passed to --join."""


def split_blocks(num_blocks: int, num_servers: int) -> list[Span]:
    """Consecutive spans for each server, none more than one block longer than another.

    Raises BadInputError for more servers than blocks.
    """
    if not 1 <= num_servers <= num_blocks:
        raise BadInputError(f"{num_servers} servers can not share {num_blocks} blocks; choose 1 to {num_blocks}")
    size, num_larger = divmod(num_blocks, num_servers)
    spans: list[Span] = []
    start = 0
    for index in range(num_servers):
        end = start + size + (index < num_larger)
        spans.append(Span(start=start, end=end))
        start = end
    return spans


def fair_num_threads(num_processes: int) -> int:
    """Threads for each of several processes that may compute at once, without more threads than cores."""
    return max(1, (os.cpu_count() or 1) // num_processes)


class LocalSwarm:
    """Use it in a `with` block: on leaving it every process has ended."""

    def __init__(self, model_name: str, spans: Sequence[Span], *, num_threads: int) -> None:
        """
        Args:
            model_name: as `swarm serve` takes it; best resolved already, or every server does that.
            spans: one server for each.
            num_threads: CPU threads of each process.
        """
        self._model_name = model_name
        self._spans = tuple(spans)
        self._num_threads = num_threads
        self._processes: list[NodeProcess] = []
        self._servers: list[NodeProcess] = []
        self.address = ""
        """Of the entry point, as passed to --join; empty before `start`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stop_all(self._processes)

    def start(self) -> None:
        """Start the entry point, and once it is ready all servers; `wait_until_online` waits for those.

        Raises FinalError with the entry point's own sentence when it fails.
        """
        arguments = ["bootstrap", "--host", _HOST]
        entry = self._launch("entry point", arguments)
        self.address = str(entry.ready(deadline_s=time.monotonic() + _START_TIMEOUT_S)["address"])
        self._servers += [self.launch_server(span) for span in self._spans]

    def launch_server(self, span: Span, arguments: Sequence[str] = (), *, log_path: Path | None = None) -> NodeProcess:
        """One more server, which `wait_until_online` does not wait for; it ends with the swarm at the latest.

        Args:
            span: blocks to serve.
            arguments: more of `swarm serve`.
            log_path: see NodeProcess.
        """
        fixed = ["serve", self._model_name, "--join", self.address, "--blocks", str(span), "--host", _HOST]
        fixed += ["--threads", str(self._num_threads)]
        return self._launch(f"server of blocks {span}", [*fixed, *arguments], log_path=log_path)

    def discard(self, process: NodeProcess) -> None:
        """See that a process of `launch_server` is gone, and keep nothing of it."""
        stop_all([process])
        self._processes.remove(process)

    def wait_until_online(self, on_progress: Callable[[int], None] = lambda num_online: None) -> list[LocalServer]:
        """The servers, in the order of their spans, once all of them serve.

        Args:
            on_progress: told how many are online.

        Raises:
            FinalError: the first failure of any of them.
        """
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while waiting := [process for process in self._servers if not process.is_ready]:
            on_progress(len(self._servers) - len(waiting))
            for process in self._servers:
                if process.is_ready:
                    process.ready(deadline_s=deadline_s)  # raises where one has failed already
            if time.monotonic() >= deadline_s:
                waiting[0].ready(deadline_s=deadline_s)
            time.sleep(_POLL_S)
        servers: list[LocalServer] = []
        for process, span in zip(self._servers, self._spans, strict=True):
            ready = process.ready(deadline_s=deadline_s)
            servers.append(
                LocalServer(
                    peer_id=PeerId(ready["peer_id"]), span=span, pid=process.pid, grpc_address=ready["grpc_address"]
                )
            )
        on_progress(len(servers))
        return servers

    def _launch(self, label: str, arguments: Sequence[str], *, log_path: Path | None = None) -> NodeProcess:
        process = NodeProcess(label, arguments, num_threads=self._num_threads, log_path=log_path)
        self._processes.append(process)
        return process
