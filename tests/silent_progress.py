"""A progress reporter for tests, which have nobody to show progress to."""

from __future__ import annotations

__all__ = ["SilentProgress"]


class SilentProgress:
    """A swarm.models.progress.ProgressReporter that says nothing."""

    def start(self, description: str, total: int | None, unit: str) -> None: ...
    def advance(self, amount: int) -> None: ...
    def finish(self) -> None: ...
