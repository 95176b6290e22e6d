"""One event loop in a daemon thread, so that blocking user code can use asynchronous transport."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["BackgroundLoop"]

_Result = TypeVar("_Result")


class BackgroundLoop:
    """Runs coroutines on its own thread; `run` blocks the caller until they are done."""

    def __init__(self) -> None:
        try:
            import uvloop
        except ImportError:  # optional: slower, not different
            self._loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        else:
            self._loop = uvloop.new_event_loop()
        self._spawned: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="swarm-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Wait for a coroutine; an interrupt (Ctrl-C) cancels it and waits for its clean-up."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                concurrent.futures.wait([future], timeout=5.0)
            raise

    def spawn(self, start: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine whose end nobody waits for; from any thread, also while objects are being collected."""

        def begin() -> None:
            task = self._loop.create_task(start())
            self._spawned.add(task)
            task.add_done_callback(self._spawned.discard)

        with contextlib.suppress(RuntimeError):  # the loop has stopped, and everything with it
            self._loop.call_soon_threadsafe(begin)

    def stop(self) -> None:
        """End the loop after cancelling what still runs."""

        async def cancel_all() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if self._loop.is_closed():
            return
        self.run(cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()
