"""What `serve` and `bootstrap` share: they run until a signal, or the end of their parent, tells them to leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn, TypeVar

from swarm.cli.failures import INTERRUPTED
from swarm.cli.parent_watch import ParentWatch
from swarm.cli.terminal import say

__all__ = ["Orders", "end_process", "run_until_told", "say_how_to_stop", "wait_for_orders"]

_CLEAN_UP_TIMEOUT_S: Final = 10.0

_Result = TypeVar("_Result")


class Orders:
    """Orders to leave, as they come: the first asks for an orderly leave, the second for one at once."""

    def __init__(self) -> None:
        self._num_given = 0
        self._changed = asyncio.Event()
        self.parent_is_gone = False
        """Then nobody waits for an orderly leave."""

    def give(self, *, parent_is_gone: bool = False) -> None:
        """One more order; called on the event loop."""
        self._num_given += 1
        self.parent_is_gone = self.parent_is_gone or parent_is_gone
        self._changed.set()

    async def first(self) -> None:
        """Wait for the first order."""
        await self._wait_for(1)

    async def second(self) -> None:
        """Wait for the second order, or the end of the parent."""
        await self._wait_for(2)

    async def unless_given(self, start: Coroutine[Any, Any, _Result]) -> _Result:
        """What `start` returns; an order before that cancels it, and ends the process once it has cleaned up."""
        starting = asyncio.ensure_future(start)
        ordered = asyncio.ensure_future(self.first())
        await asyncio.wait((starting, ordered), return_when=asyncio.FIRST_COMPLETED)
        ordered.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.wait((starting,), timeout=_CLEAN_UP_TIMEOUT_S)
            end_process(INTERRUPTED)
        return starting.result()

    async def _wait_for(self, num_orders: int) -> None:
        while self._num_given < num_orders and not self.parent_is_gone:
            self._changed.clear()
            await self._changed.wait()


def wait_for_orders(parent: ParentWatch | None) -> Orders:
    """From now on SIGINT, SIGTERM and the end of `parent` (where there is one to watch) are orders to leave."""
    loop, orders = asyncio.get_running_loop(), Orders()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, orders.give)
        except NotImplementedError:  # Windows: handlers run in the main thread between two instructions
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(orders.give))
    if parent is not None:

        def on_gone() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(lambda: orders.give(parent_is_gone=True))

        parent.on_gone = on_gone
    return orders


def run_until_told(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `work()` on an event loop, uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:  # optional: slower, not different
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work())


def say_how_to_stop(what_ctrl_c_does: str) -> None:
    """The last line of a banner; only where somebody sits at a keyboard."""
    if sys.stdin is not None and sys.stdin.isatty():
        say(f"Ctrl-C {what_ctrl_c_does}.", style="dim")


def end_process(code: int) -> NoReturn:
    """End without waiting for threads: one may load a model for minutes more, and can not be told to stop."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
