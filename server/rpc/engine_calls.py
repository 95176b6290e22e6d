"""Waiting, on the event loop, for something that the engine thread does between two steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

from swarm.errors import PeerFaultError, SwarmError
from swarm.server.engine.engine import Engine

__all__ = ["ask_engine", "tell_engine"]

_Result = TypeVar("_Result")


async def ask_engine(engine: Engine, function: Callable[[], _Result]) -> _Result:
    """What `function` returns or raises on the engine thread; foreign errors become PeerFaultError.

    A cancelled wait does not undo it, so what it takes must be given back by a `tell_engine`, which comes after it.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[_Result] = loop.create_future()

    def finish(result: _Result | None, error: Exception | None) -> None:
        if answer.done():  # nobody waits any more
            return
        if error is None:
            answer.set_result(result)  # type: ignore[arg-type]
        elif isinstance(error, SwarmError):
            answer.set_exception(error)
        else:
            fault = PeerFaultError(f"{type(error).__name__}: {error}")
            fault.__cause__ = error
            answer.set_exception(fault)

    def run() -> None:
        result: _Result | None = None
        problem: Exception | None = None
        try:
            result = function()
        except Exception as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(finish, result, problem)

    engine.call(run)
    return await answer


def tell_engine(engine: Engine, function: Callable[[], None]) -> None:
    """Have the engine thread do something, after everything it was asked before, without waiting for it."""
    with contextlib.suppress(PeerFaultError):  # it has stopped, and everything is given back
        engine.call(function)
