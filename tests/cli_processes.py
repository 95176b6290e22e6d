"""Commands in real processes: run to their end, or kept running as nodes of a swarm."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["SWARM", "Finished", "Node", "TinySwarm", "run_swarm", "running"]

SWARM = (sys.executable, "-P", "-m", "swarm")
START_TIMEOUT_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A command that has ended."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Its object; standard output must hold nothing else."""
        value: dict[str, Any] = json.loads(self.out)
        return value

    @property
    def sentence(self) -> str:
        """The error it ended with; demands that there is exactly one, and no traceback."""
        assert "Traceback" not in self.err, self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        return errors[0].removeprefix("error: ")


def run_swarm(*arguments: str | Path, timeout_s: float = 60.0, stdin: str = "", **env: str) -> Finished:
    """Run a command to its end."""
    done = subprocess.run(
        [*SWARM, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **env},
        check=False,
    )
    return Finished(exit_code=done.returncode, out=done.stdout, err=done.stderr)


class Node:
    """A `serve` or `bootstrap` that runs."""

    def __init__(self, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [*SWARM, *map(str, arguments), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        watchdog = threading.Timer(START_TIMEOUT_S, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        watchdog.cancel()
        if not line:
            _, err = self.process.communicate()
            raise AssertionError(f"{arguments[0]} did not start: {err}")
        self.ready: Mapping[str, Any] = json.loads(line)
        self.family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        """The process and what it started."""

    @property
    def address(self) -> str:
        return str(self.ready["address"])

    @property
    def grpc_address(self) -> str:
        return str(self.ready["grpc_address"])

    def end(self, signal_number: int, *, timeout_s: float = 30.0) -> Finished:
        """Send a signal and wait for the end."""
        self.process.send_signal(signal_number)
        out, err = self.process.communicate(timeout=timeout_s)
        return Finished(exit_code=self.process.returncode, out=out, err=err)

    def survivors(self, *, timeout_s: float = 10.0) -> list[psutil.Process]:
        """Processes of the family that are left after waiting for them."""
        return list(psutil.wait_procs(self.family, timeout=timeout_s)[1])

    def close(self) -> None:
        """End it by force if it has not ended."""
        for process in reversed(self.family):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ValueError):  # its output has been read already
            self.process.communicate()


@contextlib.contextmanager
def running(*arguments: str | Path) -> Iterator[Node]:
    """A node for as long as the block lasts."""
    node = Node(*arguments)
    try:
        yield node
    finally:
        node.close()


@dataclass(frozen=True, kw_only=True)
class TinySwarm:
    """An entry point and two servers that share the tiny model."""

    model: Path
    address: str
    """Of the entry point, which serves no blocks."""
    servers: tuple[Node, ...]
