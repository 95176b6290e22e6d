"""Servers behind proxies, each of which can be killed, frozen, cut off, started again or joined by another."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swarm.cli.chaos.census import ServerCensus, ask_account, find_processes, named_sockets, take_census
from swarm.cli.chaos.faults import SLOW_SHARE
from swarm.cli.chaos.proxy import FaultyProxy, ProxyThread
from swarm.cli.local_swarm import LocalSwarm
from swarm.datatypes import PeerId, Span
from swarm.errors import FinalError

if TYPE_CHECKING:
    import psutil

    from swarm.cli.node_process import NodeProcess

__all__ = ["FrailServer", "ServersUnderTest"]

logger = logging.getLogger(__name__)
_START_TIMEOUT_S: Final = 300.0
_SLOW_PERIOD_S: Final = 0.2
_POLL_S: Final = 0.05
_ASK_TIMEOUT_S: Final = 1.0
_SERVER_PORTS: Final = range(20_000, 30_000)


class FrailServer:
    """One server with its own proxy and key; it may run, be frozen, or be gone. One thread at a time."""

    def __init__(
        self,
        name: str,
        span: Span,
        *,
        swarm: LocalSwarm,
        proxies: ProxyThread | None,
        identity_path: Path,
        arguments: Sequence[str] = (),
        log_path: Path | None = None,
    ) -> None:
        """
        Args:
            name: for people.
            span: blocks it serves.
            swarm: that it joins.
            proxies: where its proxy lives; None lets others reach it directly.
            identity_path: of its key.
            arguments: more of `swarm serve`.
            log_path: where it writes what it does.
        """
        self.name = name
        self.span = span
        self._swarm = swarm
        self._proxies = proxies
        self._identity_path = identity_path
        self._arguments = tuple(arguments)
        self._log_path = log_path
        self._proxy: FaultyProxy | None = None
        self._announced_port = 0
        if proxies is not None:
            self._proxy, self._announced_port = proxies.add()
        self._process: NodeProcess | None = None
        self._is_frozen = False
        self._slowing: threading.Thread | None = None
        self._slow_until = threading.Event()
        self.baseline: ServerCensus | None = None
        """What it held when it had come online and nobody had used it."""
        self.processes: list[psutil.Process] = []
        """All that it ever started, as far as note_baseline saw them."""
        self.sockets: set[Path] = set()
        """Files that these made."""

    def __repr__(self) -> str:
        return f"<FrailServer {self.name} {self.span} {'serving' if self.is_serving else 'away'}>"

    @property
    def pid(self) -> int | None:
        """None while no process runs."""
        return self._process.pid if self._process is not None and not self._process.has_ended else None

    @property
    def is_serving(self) -> bool:
        """Whether its process is online and not frozen; cut lines do not count."""
        process = self._process
        return process is not None and not process.has_ended and process.is_ready and not self._is_frozen

    @property
    def peer_id(self) -> PeerId:
        """Of the running process. Raises FinalError when it is not ready."""
        assert self._process is not None
        return PeerId(self._process.ready(deadline_s=time.monotonic())["peer_id"])

    @property
    def direct_address(self) -> str:
        """grpc://host:port of the process itself, past the proxy."""
        return f"grpc://127.0.0.1:{self._port}"

    def count_sessions(self) -> int:
        """Those open there now; 0 when it does not say so quickly."""
        if not self.is_serving:
            return 0
        try:
            return ask_account(self.direct_address, timeout_s=_ASK_TIMEOUT_S).num_sessions
        except FinalError:
            return 0

    def start(self) -> None:
        """Start it, again if it has ended; returns at once."""
        if self._process is not None:
            self._swarm.discard(self._process)
        self._port = _free_port()
        arguments = [*self._arguments, "--identity", str(self._identity_path), "--port", str(self._port)]
        if self._proxy is not None:
            arguments += ["--announce-host", "127.0.0.1", "--announce-port", str(self._announced_port)]
        self._process = self._swarm.launch_server(self.span, arguments, log_path=self._log_path)
        self.baseline = None
        proxy, port = self._proxy, self._port
        if proxy is not None and self._proxies is not None:
            self._proxies.call(lambda: setattr(proxy, "target_port", port))

    def wait_until_online(self, *, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Raises FinalError when it fails or takes longer."""
        assert self._process is not None
        self._process.ready(deadline_s=time.monotonic() + timeout_s)

    def note_baseline(self) -> None:
        """Remember what the idle server holds, unless that is done."""
        pid = self.pid
        if self.baseline is None and self.is_serving and pid is not None:
            with contextlib.suppress(FinalError):  # it ended this very moment
                self.baseline = take_census(pid)
                family = find_processes(pid)
                self.processes += family
                self.sockets |= named_sockets(family)

    # -- faults --------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._signal(signal.SIGKILL)
        self._wait_ended(timeout_s=10.0)
        self._is_frozen = False

    def begin_leave(self) -> None:
        """SIGTERM; see has_ended."""
        self._signal(signal.SIGTERM)

    @property
    def has_ended(self) -> bool:
        """Whether no process of it is left."""
        return self._process is None or self._process.has_ended

    def freeze(self) -> None:
        """SIGSTOP."""
        self._is_frozen = True
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT, after freeze."""
        self._signal(signal.SIGCONT)
        self._is_frozen = False

    def begin_slowness(self) -> None:
        """From now on it runs for a share of the time only."""
        self._slow_until.clear()
        self._slowing = threading.Thread(target=self._be_slow, name=f"slowness of {self.name}", daemon=True)
        self._slowing.start()

    def end_slowness(self) -> None:
        """After begin_slowness."""
        self._slow_until.set()
        if self._slowing is not None:
            self._slowing.join()
            self._slowing = None

    def _be_slow(self) -> None:
        while not self._slow_until.is_set():
            self._signal(signal.SIGSTOP)
            time.sleep(_SLOW_PERIOD_S * (1 - SLOW_SHARE))
            self._signal(signal.SIGCONT)
            self._slow_until.wait(_SLOW_PERIOD_S * SLOW_SHARE)

    def cut(self) -> None:
        """Break its connections; no new ones until `mend`."""
        proxy, proxies = self._lines()

        def act() -> None:
            proxy.refuse(True)
            proxy.cut()

        proxies.call(act)

    def silence(self) -> None:
        """Nothing comes through its connections until `mend`."""
        proxy, proxies = self._lines()
        proxies.call(lambda: proxy.silence(True))

    def delay(self, delay_s: float) -> None:
        """Slower lines, until `mend`."""
        proxy, proxies = self._lines()
        proxies.call(lambda: setattr(proxy, "delay_s", delay_s))

    def mend(self) -> None:
        """Lines as they should be."""
        if self._proxy is None or self._proxies is None:
            return
        proxy = self._proxy

        def act() -> None:
            proxy.refuse(False)
            proxy.silence(False)
            proxy.delay_s = 0.0

        self._proxies.call(act)

    def recover(self) -> None:
        """Undo every fault that is not an ended process."""
        self.end_slowness()
        if not self.has_ended:
            self.thaw()
        self.mend()

    def _lines(self) -> tuple[FaultyProxy, ProxyThread]:
        if self._proxy is None or self._proxies is None:
            raise RuntimeError(f"{self.name} has no proxy whose lines could be harmed")
        return self._proxy, self._proxies

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _wait_ended(self, *, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not self.has_ended and time.monotonic() < deadline_s:
            time.sleep(_POLL_S / 5)


class ServersUnderTest:
    """Makes frail servers of one swarm; use it in a `with` block."""

    def __init__(
        self, swarm: LocalSwarm, *, folder: Path, with_proxies: bool, arguments: Sequence[str], log_folder: Path | None
    ) -> None:
        """
        Args:
            swarm: started without servers of its own.
            folder: an empty one, for keys.
            with_proxies: whether lines can be harmed.
            arguments: more of `swarm serve`, for every server.
            log_folder: where servers write what they do, a file each; None: nowhere.
        """
        self._swarm = swarm
        self._folder = folder
        self._proxies = ProxyThread() if with_proxies else None
        self._arguments = tuple(arguments)
        self._log_folder = log_folder
        self.servers: list[FrailServer] = []

    def __enter__(self) -> ServersUnderTest:
        if self._proxies is not None:
            self._proxies.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for server in self.servers:
            server.recover()
        if self._proxies is not None:
            self._proxies.__exit__(None, None, None)

    def add(self, span: Span) -> FrailServer:
        """One more server, started; see FrailServer.wait_until_online."""
        name = f"s{len(self.servers)}"
        arguments = [*self._arguments, *(["--verbose"] if self._log_folder is not None else [])]
        server = FrailServer(
            name,
            span,
            swarm=self._swarm,
            proxies=self._proxies,
            identity_path=self._folder / f"{name}.key",
            arguments=arguments,
            log_path=self._log_folder / f"{name}.log" if self._log_folder is not None else None,
        )
        self.servers.append(server)
        server.start()
        return server

    def wait_until_online(self) -> None:
        """All that were added. Raises FinalError when one fails."""
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        for server in self.servers:
            server.wait_until_online(timeout_s=deadline_s - time.monotonic())

    def find(self, peer_id: PeerId) -> FrailServer:
        """The serving one with this identity. Raises FinalError when there is none."""
        for server in self.servers:
            if server.is_serving and server.peer_id == peer_id:
                return server
        raise FinalError(f"no server of this swarm is {peer_id}")


def _free_port() -> int:
    """One below those that systems hand out by themselves: until the server listens, no connection can come to it."""
    for port in random.sample(_SERVER_PORTS, len(_SERVER_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise FinalError(f"no port of {_SERVER_PORTS.start} to {_SERVER_PORTS.stop - 1} is free on 127.0.0.1")
