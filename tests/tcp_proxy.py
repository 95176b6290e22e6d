"""A network that a test can break: a TCP proxy whose connections are cut, refused or forgotten on demand."""

from __future__ import annotations

import asyncio
import contextlib

from tests.swarm_in_process import InProcessSwarm

__all__ = ["TcpProxy"]


class TcpProxy:
    """Forwards bytes to `target` (host:port), on the swarm's event loop."""

    def __init__(self, swarm: InProcessSwarm, target: str) -> None:
        self._swarm = swarm
        self._target = target
        self._server: asyncio.Server | None = None
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._generation = 0
        """Connections of an earlier one are forgotten."""
        self.num_connections = 0
        """Accepted so far."""
        swarm.run(self._listen())

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Break all connections; new ones are accepted."""
        self._swarm.run(self._cut())

    def go_down(self) -> None:
        """Break all connections and refuse new ones."""
        self._swarm.run(self._go_down())

    def come_back(self) -> None:
        """Listen again, at the same port."""
        self._swarm.run(self._listen())

    def forget(self) -> None:
        """Keep the connections there are and pass nothing on, as a router that has forgotten them; new ones work."""
        self._swarm.run(self._forget())

    def close(self) -> None:
        """End everything."""
        self.go_down()

    async def _forget(self) -> None:
        self._generation += 1

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _go_down(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._cut()
        self._server = None

    async def _cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        host, _, port = self._target.rpartition(":")
        self._writers.add(writer)
        out: asyncio.StreamWriter | None = None
        try:
            back, out = await asyncio.open_connection(host, int(port))
            self._writers.add(out)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, out))
                group.create_task(self._pass_on(back, writer))
        except (OSError, asyncio.CancelledError):
            pass  # cut, or the other side has gone: nobody to tell
        finally:
            for each in (writer, out):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort()
            self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        generation = self._generation
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                if generation == self._generation:
                    writer.write(data)
                    await writer.drain()
        writer.transport.abort()
