"""The proxy in front of a server under test: it passes bytes on faithfully, and breaks lines exactly when told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from swarm.cli.chaos.proxy import FaultyProxy, ProxyThread

TIMEOUT_S = 10.0


@dataclass
class Line:
    """A proxy before a server that sends back what it receives."""

    thread: ProxyThread
    proxy: FaultyProxy
    port: int

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)


@pytest.fixture
def line() -> Iterator[Line]:
    with socket.create_server(("127.0.0.1", 0)) as listener, ProxyThread() as thread:

        def echo(connection: socket.socket) -> None:
            with connection:
                try:
                    while data := connection.recv(65536):
                        connection.sendall(data)
                except OSError:
                    pass

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        proxy, port = thread.add()
        target: int = listener.getsockname()[1]
        thread.call(lambda: setattr(proxy, "target_port", target))
        yield Line(thread, proxy, port)
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join(TIMEOUT_S)


def receive(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        chunk = connection.recv(num_bytes - len(data))
        if not chunk:
            break
        data += chunk
    return data


def exchange(line: Line, data: bytes) -> None:
    """Send something over a new connection and receive it again. Raises ConnectionError when it breaks."""
    with line.dial() as connection:
        connection.sendall(data)
        assert receive(connection, len(data)) == data


def test_bytes_pass_unchanged(line: Line) -> None:
    """A proxy that harmed what it forwards would find bugs that are not there."""
    sent = bytes(range(256)) * 4096
    with line.dial() as connection:
        threading.Thread(target=connection.sendall, args=(sent,), daemon=True).start()
        assert receive(connection, len(sent)) == sent


def test_a_cut_breaks_connections_and_refuses_new_ones(line: Line) -> None:
    """As when a router restarts: whoever is connected hears of it at once."""
    with line.dial() as connection:
        connection.sendall(b"x")
        assert receive(connection, 1) == b"x"
        line.thread.call(lambda: line.proxy.refuse(True))
        line.thread.call(line.proxy.cut)
        with pytest.raises(ConnectionResetError):
            receive(connection, 1)
    with pytest.raises(ConnectionError):
        exchange(line, b"x")
    line.thread.call(lambda: line.proxy.refuse(False))
    exchange(line, b"y")


def test_silence_keeps_connections_and_loses_nothing(line: Line) -> None:
    """Like a cable that is pulled for a while: nobody hears of it, and what was sent arrives later."""
    with line.dial() as connection:
        connection.sendall(b"a")
        assert receive(connection, 1) == b"a"
        line.thread.call(lambda: line.proxy.silence(True))
        connection.sendall(b"b")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            receive(connection, 1)
        connection.settimeout(TIMEOUT_S)
        line.thread.call(lambda: line.proxy.silence(False))
        assert receive(connection, 1) == b"b"


def test_delay_is_added_once_in_each_direction(line: Line) -> None:
    """A line is long, not narrow: many messages under way together are not delayed one after the other."""
    with line.dial() as connection:
        line.thread.call(lambda: setattr(line.proxy, "delay_s", 0.1))
        started_s = time.monotonic()
        for _ in range(20):
            connection.sendall(b"z")
            time.sleep(0.002)
        assert receive(connection, 20) == b"z" * 20
        assert 0.2 <= time.monotonic() - started_s < 3.0


def test_a_server_that_is_gone_ends_connections(line: Line) -> None:
    """Clients must not wait for a process that was killed."""
    line.thread.call(lambda: setattr(line.proxy, "target_port", None))
    with pytest.raises(ConnectionError):
        exchange(line, b"x")


def test_nothing_is_left_open(line: Line) -> None:
    """The test-bed looks for leaks of others."""
    exchange(line, b"x")
    deadline_s = time.monotonic() + TIMEOUT_S
    while line.proxy.num_connections and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert line.proxy.num_connections == 0
