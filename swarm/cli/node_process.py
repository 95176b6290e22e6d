"""One `swarm bootstrap` or `swarm serve` on this machine, in a process of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from swarm.errors import FinalError

__all__ = ["NodeProcess", "stop_all"]

_STOP_TIMEOUT_S: Final = 15.0
_MAX_STDERR_BYTES: Final = 65536


class NodeProcess:
    """Runs until `stop_all`, and no longer than the process that made it, however that ends."""

    def __init__(self, label: str, arguments: Sequence[str], *, num_threads: int, log_path: Path | None = None) -> None:
        """
        Args:
            label: what to call it in messages.
            arguments: of `swarm`, without --json.
            num_threads: CPU threads of its libraries.
            log_path: file that what it says on standard error is appended to; None keeps it for error messages only.
        """
        self.label = label
        threads = str(num_threads)
        # A file, not a pipe: nobody need read it while the process runs.
        self._stderr = open(log_path, "ab+") if log_path else tempfile.TemporaryFile()  # noqa: SIM115 (see stop_all)
        self._process = subprocess.Popen(
            # -P: a folder named swarm where the user happens to be is not ours.
            [sys.executable, "-P", "-m", "swarm", *arguments, "--json", "--exit-with-parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            # Ctrl-C in the terminal is for us alone; we tell our processes in good order.
            start_new_session=os.name == "posix",
        )
        self._ready: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
        threading.Thread(target=self._read_output, name=f"output of {label}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    @property
    def is_ready(self) -> bool:
        """Whether `ready` has something to say, good or bad."""
        return self._ready.done()

    def ready(self, *, deadline_s: float) -> dict[str, Any]:
        """The object it prints when it is ready.

        Args:
            deadline_s: on time.monotonic's clock.

        Raises:
            FinalError: it failed, with its own sentence, or is not ready by the deadline.
        """
        try:
            return self._ready.result(max(deadline_s - time.monotonic(), 0.0))
        except concurrent.futures.TimeoutError:
            raise FinalError(f"the {self.label} was not ready in time; is the machine very busy?") from None

    def send_signal(self, number: int) -> None:
        """Send it a signal of `signal`; nothing happens when it has ended already."""
        self._process.send_signal(number)

    def begin_stop(self) -> None:
        """Tell it to leave at once."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def end_stop(self, *, deadline_s: float) -> None:
        """See that it has left, by force after the deadline."""
        try:
            self._process.wait(max(deadline_s - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            line = output.readline()
            try:
                ready = json.loads(line)
            except ValueError:
                self._process.wait()
                self._ready.set_exception(FinalError(f"the {self.label} failed: {self._last_words()}"))
            else:
                self._ready.set_result(ready)
            while output.read(65536):  # keep it from blocking on a full pipe
                pass

    def _last_words(self) -> str:
        """The sentence it ended with."""
        with contextlib.suppress(OSError, ValueError):
            size_bytes = self._stderr.seek(0, os.SEEK_END)
            self._stderr.seek(max(size_bytes - _MAX_STDERR_BYTES, 0))
            lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines()]
            for line in reversed(lines):
                if line.startswith("error: "):
                    return line.removeprefix("error: ")
            for line in reversed(lines):
                if line:
                    return line
        return f"it ended with exit code {self._process.returncode} and said nothing"


def stop_all(processes: Sequence[NodeProcess]) -> None:
    """End processes, all at the same time; returns when none is left."""
    for process in processes:
        process.begin_stop()
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    for process in processes:
        process.end_stop(deadline_s=deadline_s)
