"""The thin layer under a server's moves: it looks around now and then, asks routing, and carries out the answer."""

from __future__ import annotations

import asyncio
import enum
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from swarm.datatypes import ServerInfo, Span
from swarm.errors import PeerLostError
from swarm.routing.placement import Settling, choose_span, explain_choice
from swarm.routing.rebalancing import Move, Wishes, find_obstacle, may_move_again, plan_move

__all__ = ["Chosen", "Movable", "MoveOutcome", "Mover", "choose_with_others"]

logger = logging.getLogger(__name__)
_LOOKS_PER_PERIOD: Final = 10
"""How many times as often as for a better place a server looks for blocks that nobody serves."""
_JITTER: Final = (0.5, 1.5)
"""Waits are stretched at random, so that servers that started together do not stay in step."""


class Movable(Protocol):
    """What a server offers to whoever decides about its blocks."""

    @property
    def info(self) -> ServerInfo:
        """What it announces now."""

    async def look_up(self) -> list[ServerInfo]:
        """All servers of the model, itself perhaps included, as announced just now."""

    async def announce_span(self, span: Span, *, is_choosing: bool) -> None:
        """Say that it is going to load these blocks, for sure or unless others take them."""

    async def announce_wish(self, wish: Span | None) -> None:
        """Say where it wishes to move, or that it stays."""

    async def change_blocks(self, span: Span, may_leave: MayLeave) -> MoveOutcome:
        """Drain, ask `may_leave`, and serve `span` instead. Raises FinalError when nothing can be served any more."""


class MoveOutcome(enum.Enum):
    """How a move ended."""

    MOVED = "moved"
    WENT_BACK = "went back"  # the new blocks could not be loaded
    STAYED = "stayed"  # somebody else had left in the meantime


class MayLeave(Protocol):
    """The last look before the point of no return."""

    async def __call__(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The blocks a server has chosen to begin with."""

    span: Span
    why: str
    """Half a sentence for its operator."""


async def choose_with_others(node: Movable, room: int, num_blocks: int, *, least: int = 1, settle_s: float) -> Chosen:
    """Choose blocks for a server that is about to start, beside others that may be choosing at the same moment.

    `settle_s` is twice as long as an announcement takes to reach everybody; with 0 the first choice stands.
    """
    servers = await node.look_up()
    peer_id = node.info.peer_id
    others = [server for server in servers if server.peer_id != peer_id]
    settling = Settling(
        peer_id=peer_id,
        room=room,
        least=least,
        span=await asyncio.to_thread(choose_span, others, num_blocks, room, least=least),
        known=frozenset(server.peer_id for server in others),
    )
    await node.announce_span(settling.span, is_choosing=settle_s > 0)
    while settle_s and not settling.is_over:
        await asyncio.sleep(settle_s * random.uniform(1.0, 2.0))
        servers = await node.look_up()
        before, settling = settling, await asyncio.to_thread(settling.look_again, servers, num_blocks)
        if settling.span != before.span:
            logger.info("others start, too: taking blocks %s instead of %s", settling.span, before.span)
            await node.announce_span(settling.span, is_choosing=not settling.is_over)
    if settle_s:
        await node.announce_span(settling.span, is_choosing=False)
    others = settling.those_first(servers)
    return Chosen(span=settling.span, why=explain_choice(settling.span, others, num_blocks))


class Mover:
    """Moves one server; `run` until cancelled. An error that ends the server is raised by it."""

    def __init__(
        self,
        node: Movable,
        *,
        room: int,
        least: int,
        period_s: float,
        announce_period_s: float,
        on_moved: Callable[[Span, Move], None],
    ) -> None:
        """`room` and `least`: most and fewest blocks to hold; `on_moved` is told where the server was, and why."""
        self._node = node
        self._room = room
        self._least = least
        self._period_s = period_s
        self._announce_period_s = announce_period_s
        self._on_moved = on_moved
        self._moves_at_s: list[float] = []
        self._wishes = Wishes()

    async def run(self) -> None:
        """Look around for ever, and move when it helps."""
        num_looks = 0
        while True:
            await asyncio.sleep(self._period_s / _LOOKS_PER_PERIOD * random.uniform(*_JITTER))
            num_looks += 1
            only_gaps = num_looks % _LOOKS_PER_PERIOD != 0
            if not may_move_again(self._moves_at_s, now_s=time.monotonic(), only_gaps=only_gaps):
                continue
            try:
                await self._move_if_it_helps(only_gaps=only_gaps)
            except PeerLostError as error:  # nobody could be asked or told; the next look may do better
                logger.info("could not look around: %s", error)

    async def _move_if_it_helps(self, *, only_gaps: bool) -> None:
        node = self._node
        wish = await self._plan(only_gaps=only_gaps)
        if wish is None:
            return
        logger.info("%s wishes to move %s", node.info.peer_id, wish)
        await node.announce_wish(wish.span)
        move: Move | None = None  # planned again, since what counts is what others have announced by then
        try:
            await asyncio.sleep(2 * self._announce_period_s)
            move = await self._plan(only_gaps=only_gaps)
        finally:
            if move is None:
                await node.announce_wish(None)
        if move is None:
            logger.info("%s stays after all", node.info.peer_id)
            return
        left = node.info.span
        outcome = await node.change_blocks(move.span, self._may_leave)
        if outcome is not MoveOutcome.STAYED:
            self._moves_at_s.append(time.monotonic())
        if outcome is MoveOutcome.MOVED:
            self._on_moved(left, move)

    async def _plan(self, *, only_gaps: bool) -> Move | None:
        servers = await self._look_up()
        me = self._node.info
        return await asyncio.to_thread(
            plan_move, me, servers, me.num_blocks, self._room, least=self._least, only_gaps=only_gaps
        )

    async def _may_leave(self) -> bool:
        servers = await self._look_up()
        obstacle = find_obstacle(self._node.info, servers)
        if obstacle is not None:
            logger.info("%s does not leave its blocks: %s", self._node.info.peer_id, obstacle)
        return obstacle is None

    async def _look_up(self) -> list[ServerInfo]:
        return self._wishes.believe(await self._node.look_up(), now_s=time.monotonic())
