"""Steps along one open route: sends them, carries outputs where servers can not, listens, and doubts silence."""

# Letters: T tokens of all sequences in a part, H hidden size.

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from swarm.client.session.outputs import check_output, rows_of
from swarm.client.session.pace import HopPace, RoutePace
from swarm.client.session.parts import StepPart
from swarm.client.transport.hop_stream import HopEvent, HopStream
from swarm.datatypes import Hop, Route
from swarm.errors import PeerFaultError, PeerLeavingError, PeerLostError, RetryElsewhereError
from swarm.pb import session_pb2 as pb

if TYPE_CHECKING:
    from swarm.client.config import ClientConfig
    from swarm.client.peer_health import PeerHealth
    from swarm.client.route_finder import RouteFinder
    from swarm.client.session.blame import Blame
    from swarm.client.session.inquiry import Inquiry
    from swarm.client.session.opening import OpenedHop
    from swarm.client.session.patience import Patience
    from swarm.kvpolicy.settings import KVPolicy

__all__ = ["OnPart", "RouteTraffic"]

logger = logging.getLogger(__name__)
_MAX_EVENTS = 256
"""Words from hops that nobody has listened to yet; a server that says more must wait until somebody does."""
_LONGEST_PAUSE_S = 10.0
_SMALL_BYTES = 16 * 1024
"""Fits any connection's buffers, so that sending it does not wait for the other side."""

_UnderWay = dict[int, tuple[pb.Step, StepPart[torch.Tensor]]]
OnPart = Callable[[int, StepPart[torch.Tensor], torch.Tensor | None], None]
"""Called with the step's number, the part that is done, and the last hop's output, None for a part of a replay."""


class RouteTraffic:
    """The messages of one session at one epoch; lives on the event loop.

    Errors that another attempt may mend are raised after whoever is guilty of them has been blamed.
    """

    def __init__(
        self,
        route: Route,
        *,
        epoch: int,
        is_pushing: bool,
        inquiry: Inquiry,
        blame: Blame,
        finder: RouteFinder,
        health: PeerHealth,
        patience: Patience,
        config: ClientConfig,
    ) -> None:
        self.route = route
        self.is_pushing = is_pushing
        """Whether the servers push to each other."""
        self._epoch = epoch
        self._inquiry = inquiry
        self._blame = blame
        self._finder = finder
        self._health = health
        self._patience = patience
        self._config = config
        self.events: asyncio.Queue[HopEvent] = asyncio.Queue(_MAX_EVENTS)
        self._streams: list[HopStream] = []
        self._policies: list[KVPolicy] = []
        self._pace = RoutePace([])
        self._step = 0
        """Number of the last step sent in this epoch."""
        self._sent_to: dict[int, int] = {}
        """Index of the hop that a step was last sent to, by step."""
        self._answering_hop = 0
        """Index of the hop whose answers end the steps under way."""
        self._has_asked_again = False

    @property
    def hops(self) -> tuple[Hop, ...]:
        return self.route.hops

    def compressing_policies(self, last_hop: int | None = None) -> tuple[KVPolicy, ...]:
        """Policies under which hops, up to `last_hop`, compress; each once."""
        policies = self._policies if last_hop is None else self._policies[: last_hop + 1]
        return tuple(dict.fromkeys(policy for policy in policies if policy.compresses))

    def begin(self, opened: Sequence[OpenedHop]) -> None:
        """All hops are open."""
        self._streams = [item.stream for item in opened]
        self._policies = [item.policy for item in opened]
        self._pace = RoutePace(
            [HopPace.announced(step_us=item.opened.step_us, token_us=item.opened.token_us) for item in opened]
        )

    # -- between steps -------------------------------------------------------------------------

    async def heed_idle_events(self) -> None:
        """Look at what hops said while no step was under way. Raises what speaks against going on."""
        for _ in range(self.events.qsize()):  # and no more, or a talkative server would be listened to for ever
            event = self.events.get_nowait()
            if event.error is not None:
                raise await self._inquiry.into_event(event, self.hops, is_pushing=self.is_pushing)

    def heed_farewells(self) -> bool:
        """Note which hops have left, on a route that is given up; says whether any has."""
        has_left = False
        for _ in range(self.events.qsize()):
            event = self.events.get_nowait()
            if isinstance(event.error, PeerLeavingError) and event.is_report:
                self._inquiry.note_leaving(self.hops[event.hop_index], event.error)
                has_left = True
        return has_left

    # -- steps ---------------------------------------------------------------------------------

    async def run(self, parts: Sequence[StepPart[torch.Tensor]], on_part: OnPart, *, last_only: bool) -> None:
        """Send parts through all hops, a few under way at a time; `on_part` gets their outputs in order."""
        await self._run(parts, on_part, answering_hop=len(self._streams) - 1, last_only=last_only, is_replay=False)
        for hop in self.hops:
            self._health.record_success(hop.peer_id)

    async def restore(self, parts: Sequence[StepPart[torch.Tensor]], last_hop: int) -> int:
        """Send the log through the hops up to `last_hop`, whose output nobody needs. Returns the last step's number."""
        await self._run(
            parts, lambda number, part, output: None, answering_hop=last_hop, last_only=False, is_replay=True
        )
        return self._step

    async def _run(
        self,
        parts: Sequence[StepPart[torch.Tensor]],
        on_part: OnPart,
        *,
        answering_hop: int,
        last_only: bool,
        is_replay: bool,
    ) -> None:
        under_way: _UnderWay = {}
        waiting = list(reversed(parts))
        self._answering_hop = answering_hop
        self._has_asked_again = False
        self._patience.note_movement()
        started_s = time.monotonic()
        while waiting or under_way:
            while waiting and len(under_way) < self._config.max_steps_in_flight:
                step = self._step_message(waiting[-1], last_only=last_only, is_replay=is_replay)
                under_way[step.step] = (step, waiting.pop())
                await self._send(0, step, rows_of(under_way[step.step][1]))
            event = await self._next_event(under_way)
            if event.error is not None:
                raise await self._inquiry.into_event(event, self.hops, is_pushing=self.is_pushing)
            if event.result is None or event.result.step not in under_way or event.hop_index > answering_hop:
                continue  # an answer to something already settled
            number = event.result.step
            step, part = under_way[number]
            output = await self._read_result(event, step, part, is_in_order=number == min(under_way))
            if event.hop_index < answering_hop:
                assert output is not None
                await self._send(event.hop_index + 1, step, output)
                self._patience.note_movement()
                continue
            self._patience.note_done(part.num_tokens)
            if len(parts) == 1 and part.num_tokens and not is_replay:
                self._pace.note_step(part.num_tokens, time.monotonic() - started_s)
            self._has_asked_again = False
            del under_way[number]
            on_part(number, part, output)

    async def _read_result(
        self, event: HopEvent, step: pb.Step, part: StepPart[torch.Tensor], *, is_in_order: bool
    ) -> torch.Tensor | None:
        """A hop's output, checked. Raises PeerFaultError after blaming it."""
        assert event.result is not None and event.frame is not None
        is_answer = event.hop_index == self._answering_hop
        hop = self.hops[event.hop_index]
        try:
            if is_answer and not is_in_order:
                raise PeerFaultError(f"server {hop.peer_id} answered out of order")
            if is_answer and step.replay_end:
                return None
            output = check_output(event.frame, part, last_only=step.last_only and is_answer, peer=hop.peer_id)
        except PeerFaultError as fault:
            raise await self._inquiry.into_fault(hop, fault) from fault
        if event.result.push_problem:
            logger.info("relaying for %s: %s", hop.peer_id, event.result.push_problem)
        return output

    def _step_message(self, part: StepPart[torch.Tensor], *, last_only: bool, is_replay: bool) -> pb.Step:
        self._step += 1
        return pb.Step(
            epoch=self._epoch,
            step=self._step,
            sequences=[
                pb.SequenceStep(
                    sequence=item.sequence,
                    parent=item.parent,
                    start=item.start,
                    count=len(item.rows),
                    unfinished=item.is_unfinished,
                )
                for item in part.sequences
            ],
            last_only=last_only and self.is_pushing,
            replay_end=self.hops[self._answering_hop].end if is_replay else 0,
        )

    async def _send(self, hop_index: int, step: pb.Step, hidden: torch.Tensor) -> None:
        stream = self._streams[hop_index]
        self._sent_to[step.step] = hop_index
        sending = stream.send_step(step, hidden)
        try:
            async with asyncio.timeout(self._config.step_timeout_s):
                if hidden.nbytes > _SMALL_BYTES:
                    sending = self._inquiry.watch_over(stream.hop, sending)
                await sending
        except TimeoutError:
            problem = PeerLostError(f"server {stream.hop.peer_id} stopped reading")
            await self._blame.record(stream.hop, problem)
            raise problem from None
        except RetryElsewhereError as error:
            raise await self._inquiry.into_broken_stream(stream.hop, error) from error

    # -- silence -------------------------------------------------------------------------------

    async def _next_event(self, under_way: _UnderWay) -> HopEvent:
        """The next thing a hop says. Raises PeerLostError when there is no progress for too long."""
        num_tokens = sum(part.num_tokens for _, part in under_way.values())
        pause_s = self._pace.quiet_s(num_tokens)
        while True:
            left_s = self._patience.standstill_left_s
            if left_s > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, pause_s)):
                        return await self.events.get()
                event = await self._look_around(num_tokens)
                if event is not None:
                    return event
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            await self._inquiry.look_around(self.hops, self._pace, num_tokens)
            if self._patience.left_s <= 0:
                raise PeerLostError(f"no server of the route answered within {self._config.step_timeout_s:g} s")
            step, part = under_way[min(under_way)]
            if self._has_asked_again:
                await self._leave_silent_hop(step)
            elif len(under_way) == 1:
                await self._ask_again(step, part)
            self._has_asked_again = True
            self._patience.note_movement()

    async def _look_around(self, num_tokens: int) -> HopEvent | None:
        """Ask all hops whether they live, until one of them says something by itself; None when all are well."""
        listening = asyncio.create_task(self.events.get())
        looking = asyncio.create_task(self._inquiry.look_around(self.hops, self._pace, num_tokens))
        try:
            await asyncio.wait([listening, looking], return_when=asyncio.FIRST_COMPLETED)
            if listening.done():
                return listening.result()
            looking.result()
            return None
        finally:
            for task in (listening, looking):
                task.cancel()
            await asyncio.gather(listening, looking, return_exceptions=True)

    async def _ask_again(self, step: pb.Step, part: StepPart[torch.Tensor]) -> None:
        """Take a step that may have got lost between servers along the route ourselves.

        Those who have run it answer from memory, so asking does no harm, and it shows who has not.
        """
        logger.info("the route is slow, but all of its servers answer; asking again")
        step.relay = True
        await self._send(0, step, rows_of(part))

    async def _leave_silent_hop(self, step: pb.Step) -> None:
        """The oldest step is overdue though everybody is alive: leave whoever holds it, if others can do its work.

        Raises PeerLostError to leave; returns to go on waiting, because a slow server is better than none.
        """
        if self.is_pushing and not step.relay and len(self._streams) > 1:
            self._blame.search()
            raise PeerLostError("the route is silent, and only carrying everything ourselves shows at whom")
        hop = self._streams[self._sent_to[step.step]].hop
        if await self._finder.can_avoid(hop.peer_id):
            error = PeerLostError(f"server {hop.peer_id} is alive, but does not answer its step")
            await self._blame.record(hop, error)
            raise error
