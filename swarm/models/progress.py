"""How long work (downloads, conversions, loading) tells whoever waits for it how far it is."""

from __future__ import annotations

from typing import Protocol

__all__ = ["ProgressReporter", "SilentProgress"]


class ProgressReporter(Protocol):
    """Receives progress of one task at a time; a `start` ends the task before it, if any.

    Calls may come from any thread, one at a time.
    """

    def start(self, description: str, total: int | None, unit: str) -> None:
        """A task begins: `total` units of `unit` ("bytes", "tensors", …) long, or None if nobody knows."""

    def advance(self, amount: int) -> None:
        """`amount` more units are done."""

    def finish(self) -> None:
        """The task is done."""


class SilentProgress:
    """A reporter that tells nobody."""

    def start(self, description: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def finish(self) -> None:
        pass
