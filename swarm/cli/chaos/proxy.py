"""A TCP proxy in front of each server, which breaks, delays or silences its connections on demand."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TypeVar

__all__ = ["FaultyProxy", "ProxyThread"]

logger = logging.getLogger(__name__)
_HOST: Final = "127.0.0.1"
_CHUNK_BYTES: Final = 65536
_MAX_CHUNKS: Final = 256
"""Under way in one direction of one connection, as a long line would hold them."""
_CALL_TIMEOUT_S: Final = 10.0

_Result = TypeVar("_Result")


class FaultyProxy:
    """Forwards connections to one port. Lives on the loop of a ProxyThread; call its methods through that."""

    def __init__(self) -> None:
        self.target_port: int | None = None
        """Where connections go; None refuses them."""
        self.delay_s = 0.0
        """Added to what travels, in each direction."""
        self._is_refusing = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._listener: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    async def start(self) -> int:
        """Begin to listen; the port."""
        self._listener = await asyncio.start_server(self._serve, _HOST, 0)
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Stop listening and end all connections."""
        if self._listener is not None:
            self._listener.close()
        self.cut()
        if self._connections:
            await asyncio.wait(self._connections)

    def cut(self) -> None:
        """Break all connections, as when a router restarts: both ends see a reset."""
        for writers in self._connections.values():
            for writer in writers:
                _reset(writer)
        for task in self._connections:
            task.cancel()

    def refuse(self, is_refusing: bool) -> None:
        """Whether new connections are reset at once."""
        self._is_refusing = is_refusing

    def silence(self, is_silent: bool) -> None:
        """Whether everything stays open and nothing comes through; what was sent meanwhile arrives afterwards."""
        if is_silent:
            self._flowing.clear()
        else:
            self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        writers = self._connections[task] = [writer]
        try:
            if self._is_refusing or self.target_port is None:
                _reset(writer)
                return
            server_reader, server_writer = await asyncio.open_connection(_HOST, self.target_port)
            writers.append(server_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._forward(reader, server_writer))
                both.create_task(self._forward(server_reader, writer))
        except* (OSError, asyncio.CancelledError):  # the other end hears of it when its connection closes
            pass
        finally:
            for one in writers:
                one.close()
            del self._connections[task]

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction; raises ConnectionError at its end, so that the other one ends too."""
        loop = asyncio.get_running_loop()
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_CHUNKS)

        async def deliver() -> None:
            while True:
                due_s, chunk = await line.get()
                await asyncio.sleep(max(due_s - loop.time(), 0))
                await self._flowing.wait()
                if not chunk:
                    raise ConnectionResetError("the sender has hung up")
                writer.write(chunk)
                await writer.drain()

        async with asyncio.TaskGroup() as ends:
            ends.create_task(deliver())
            while chunk := await reader.read(_CHUNK_BYTES):
                await line.put((loop.time() + self.delay_s, chunk))
            await line.put((loop.time() + self.delay_s, b""))


class ProxyThread:
    """An event loop in a thread of its own, for any number of proxies; use it in a `with` block."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxies", daemon=True)
        self._proxies: list[FaultyProxy] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for proxy in self._proxies:
            asyncio.run_coroutine_threadsafe(proxy.close(), self._loop).result(_CALL_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_TIMEOUT_S)
        self._loop.close()

    def add(self) -> tuple[FaultyProxy, int]:
        """A proxy that listens, and its port."""

        async def start() -> tuple[FaultyProxy, int]:
            proxy = FaultyProxy()
            return proxy, await proxy.start()

        proxy, port = asyncio.run_coroutine_threadsafe(start(), self._loop).result(_CALL_TIMEOUT_S)
        self._proxies.append(proxy)
        return proxy, port

    def call(self, action: Callable[[], _Result]) -> _Result:
        """What `action` returns, run on the proxies' loop."""

        async def run() -> _Result:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(_CALL_TIMEOUT_S)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, without the polite half-close."""
    opened: socket.socket | None = writer.get_extra_info("socket")
    if opened is not None:
        with contextlib.suppress(OSError):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
