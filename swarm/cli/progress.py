"""Shows progress of downloads, conversions and loading as bars on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from swarm.cli.terminal import say, stderr_console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["TerminalProgress"]


class TerminalProgress:
    """A swarm.models.progress.ProgressReporter for people; on leaving the context the bar goes away.

    Where standard error is no terminal, each task of known length is one line when it begins.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()

    def start(self, description: str, total: int | None, unit: str) -> None:
        """A task begins; the one before it, if any, has ended."""
        self._end_task()
        description = description[:1].upper() + description[1:]
        if not stderr_console().is_terminal:
            if total is not None:
                say(f"{description} ...")
            return
        if self._progress is None:
            self._progress = _new_progress()
            self._progress.start()
        self._task = self._progress.add_task(description, total=total, unit=unit)

    def advance(self, amount: int) -> None:
        """`amount` more units are done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, amount)

    def finish(self) -> None:
        """The task is done, and the bar goes away: while it is there, other output has to pass through it."""
        self._end_task()
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _end_task(self) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)
        self._task = None


def _new_progress() -> Progress:
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    class KnownLengthColumn(BarColumn):
        """A bar where there is something to fill; the spinner alone says that work goes on."""

        def render(self, task: Task) -> ProgressBar | Text:  # type: ignore[override]
            return Text("") if task.total is None else super().render(task)

    class AmountColumn(ProgressColumn):
        """How much is done, in the task's own unit."""

        def render(self, task: Task) -> Text:
            unit = task.fields["unit"]
            is_bytes = unit == "bytes"
            done = decimal(int(task.completed)) if is_bytes else f"{task.completed:.0f}"
            if task.total is None:
                return Text(f"{done}" if is_bytes else "")
            total = decimal(int(task.total)) if is_bytes else f"{task.total:.0f} {unit}"
            return Text(f"{done} of {total}")

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        KnownLengthColumn(bar_width=30),
        AmountColumn(),
        TimeElapsedColumn(),
        console=stderr_console(),
        transient=True,
    )
