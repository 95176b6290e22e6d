"""What a server process holds: files, threads, child processes, and what it says of sessions and pages."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from swarm.errors import FinalError, MissingDependencyError

if TYPE_CHECKING:
    import psutil

__all__ = [
    "ServerCensus",
    "SessionAccount",
    "ask_account",
    "find_leaks",
    "find_processes",
    "named_sockets",
    "survivors",
    "take_census",
]

_ASK_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.5
_SOCKET: Final = re.compile(r"/unix(/\S+\.sock)")


@dataclass(frozen=True, kw_only=True)
class ServerCensus:
    """Of one process, by the system's account."""

    num_files: int
    """Open descriptors, sockets included."""
    num_threads: int
    num_children: int


@dataclass(frozen=True, kw_only=True)
class SessionAccount:
    """Of one server, by its own account."""

    num_sessions: int
    kv_used_bytes: int
    num_tokens: int
    num_tokens_run: int
    num_sessions_taken_over: int
    num_sessions_handed_over: int


def take_census(pid: int) -> ServerCensus:
    """Raises MissingDependencyError without psutil, FinalError when the process is gone."""
    psutil = _import_psutil()
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            return ServerCensus(
                num_files=process.num_fds(), num_threads=process.num_threads(), num_children=len(process.children())
            )
    except psutil.NoSuchProcess:
        raise FinalError(f"process {pid} has ended by itself") from None


def ask_account(grpc_address: str, *, timeout_s: float = _ASK_TIMEOUT_S) -> SessionAccount:
    """What the server at grpc://host:port says of itself. Raises FinalError when it does not answer."""
    import grpc

    from swarm.pb import node_pb2
    from swarm.wire.methods import INFO

    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(grpc_address.removeprefix("grpc://"), options=options) as channel:
        try:
            body = channel.unary_unary(INFO)(node_pb2.InfoRequest().SerializeToString(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise FinalError(f"the server at {grpc_address} does not answer any more ({error.code().name})") from error
    reply = node_pb2.InfoReply.FromString(body)
    return SessionAccount(
        num_sessions=reply.server.num_sessions,
        kv_used_bytes=reply.kv.used_bytes,
        num_tokens=reply.num_tokens,
        num_tokens_run=reply.num_tokens_run,
        num_sessions_taken_over=reply.num_sessions_taken_over,
        num_sessions_handed_over=reply.num_sessions_handed_over,
    )


def find_leaks(
    name: str, baseline: ServerCensus | None, *, pid: int, grpc_address: str, allowance: int, timeout_s: float
) -> list[str]:
    """What a server still holds when nobody uses it any more, as sentences; gives it time to let go.

    Args:
        name: what to call it.
        baseline: what it held before anybody used it; None: only sessions and pages are checked.
        pid: of its process.
        grpc_address: where it answers.
        allowance: descriptors and threads that it may hold more than then: kept connections, pools of threads.
        timeout_s: how long it may take; sessions whose client vanished have a grace.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        leaks = _leaks_now(name, baseline, pid=pid, grpc_address=grpc_address, allowance=allowance)
        if not leaks or time.monotonic() >= deadline_s:
            return leaks
        time.sleep(_POLL_S)


def _leaks_now(name: str, baseline: ServerCensus | None, *, pid: int, grpc_address: str, allowance: int) -> list[str]:
    try:
        account = ask_account(grpc_address)
        census = take_census(pid)
    except FinalError as error:
        return [f"{name}: {error}"]
    leaks: list[str] = []
    if account.num_sessions:
        leaks.append(f"{name} still has {account.num_sessions} sessions")
    if account.kv_used_bytes:
        leaks.append(f"{name} still has {account.kv_used_bytes} bytes of pages in use")
    if baseline is not None:
        for what, before, after, more in (
            ("open files", baseline.num_files, census.num_files, allowance),
            ("threads", baseline.num_threads, census.num_threads, allowance),
            ("child processes", baseline.num_children, census.num_children, 0),
        ):
            if after > before + more:
                leaks.append(f"{name} has {after} {what}, and had {before} before")
    return leaks


def find_processes(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    psutil = _import_psutil()
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def named_sockets(processes: Sequence[psutil.Process]) -> set[Path]:
    """Socket files that appear in the command lines of processes: the DHT daemon gets two."""
    psutil = _import_psutil()
    found: set[Path] = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found.update(Path(path) for path in _SOCKET.findall(" ".join(process.cmdline())))
    return found


def survivors(processes: Sequence[psutil.Process], *, timeout_s: float) -> list[str]:
    """Those that are left after waiting for their end, as sentences."""
    psutil = _import_psutil()
    left: list[str] = []
    for process in psutil.wait_procs(list(processes), timeout=timeout_s)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(f"process {process.pid} ({process.name()}) is left")
    return left


def _import_psutil() -> Any:
    try:
        import psutil
    except ImportError as error:
        raise MissingDependencyError(
            "watching other processes needs psutil; pip install 'swarm-inference[server]'"
        ) from error
    return psutil
