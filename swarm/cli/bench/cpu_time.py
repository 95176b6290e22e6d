"""CPU time of processes, their children included."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swarm.errors import MissingDependencyError

if TYPE_CHECKING:
    import psutil

__all__ = ["CpuClock"]


class CpuClock:
    """Sums the CPU seconds of this process and of some others, with the children they have now."""

    def __init__(self, pids: Sequence[int]) -> None:
        """Raises MissingDependencyError without psutil."""
        try:
            import psutil
        except ImportError as error:
            raise MissingDependencyError(
                "measuring other processes needs psutil; pip install 'swarm-inference[server]'"
            ) from error
        self._others: list[psutil.Process] = []
        for pid in pids:
            process = psutil.Process(pid)
            self._others += [process, *process.children(recursive=True)]
        # Our own children that are not listed (another case's servers) do not count, so no recursion here.
        self._gone = (psutil.NoSuchProcess, psutil.ZombieProcess)

    def own_s(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()

    def others_s(self) -> float:
        """CPU seconds of the others so far; a process that has ended counts no more."""
        total_s = 0.0
        for process in self._others:
            with contextlib.suppress(*self._gone):
                times = process.cpu_times()
                total_s += times.user + times.system
        return total_s
