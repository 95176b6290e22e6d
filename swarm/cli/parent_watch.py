"""Lets a process notice that the one that started it is gone, on any system: its standard input ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final

__all__ = ["ParentWatch"]

_STDIN: Final = 0
_GRACE_S: Final = 15.0
"""After this long without leaving in good order, the process ends anyway."""


class ParentWatch:
    """Watches from its making on. Until somebody sets `on_gone`, the end of the parent ends the process at once."""

    def __init__(self) -> None:
        self.on_gone: Callable[[], None] = _end_now
        """Called from another thread."""
        threading.Thread(target=self._wait, name="parent-watch", daemon=True).start()

    def _wait(self) -> None:
        # Not sys.stdin: its lock, held here while the interpreter ends, would be a fatal error.
        try:
            while os.read(_STDIN, 4096):
                pass
        except OSError:  # closed by ourselves counts as gone
            pass
        self.on_gone()
        time.sleep(_GRACE_S)
        os._exit(1)


def _end_now() -> None:
    os._exit(0)
