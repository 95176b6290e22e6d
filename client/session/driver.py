"""Drives one session: opens hops, sends steps, carries outputs where servers can not, replays after a loss."""

# Letters: T tokens of all sequences in a part, H hidden size.

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch

from swarm.client.config import ClientConfig
from swarm.client.peer_health import PeerHealth
from swarm.client.route_finder import RouteFinder
from swarm.client.session.blame import Blame
from swarm.client.session.machine import SequenceRequest, SessionMachine, SessionState, StepPart, plan_parts
from swarm.client.session.opening import RouteOpener
from swarm.client.session.outputs import check_output, concatenate, outputs_by_request, rows_of
from swarm.client.session.patience import Patience
from swarm.client.transport.channels import ServerChannels
from swarm.client.transport.hop_stream import HopEvent, HopStream
from swarm.client.transport.unary import check_health
from swarm.datatypes import ModelHash, Route
from swarm.errors import (
    DeadlineError,
    FinalError,
    PeerFaultError,
    PeerLostError,
    RetryElsewhereError,
    SessionClosedError,
    SessionStateError,
    SwarmError,
)
from swarm.pb import session_pb2 as pb

if TYPE_CHECKING:
    from swarm.datatypes import Hop

__all__ = ["SessionDriver"]

logger = logging.getLogger(__name__)
_RETRY_PAUSE_S = 0.25
_BLAME_WAIT_S = 0.3
_HEALTH_TIMEOUT_S = 2.0
_MAX_EVENTS = 256
"""Words from hops that nobody has listened to yet; a server that says more must wait until somebody does."""


class SessionDriver:
    """One session's traffic; lives on the event loop, one step at a time."""

    def __init__(
        self,
        *,
        model_hash: ModelHash,
        finder: RouteFinder,
        channels: ServerChannels,
        health: PeerHealth,
        config: ClientConfig,
        max_length: int,
        num_sequences: int,
    ) -> None:
        self._finder = finder
        self._channels = channels
        self._health = health
        self._config = config
        self._blame = Blame(health=health, channels=channels, use_push=config.use_push)
        self._is_pushing = False
        """Whether the servers of the route in use push to each other."""
        self._patience = Patience(config)
        self._opener = RouteOpener(
            model_hash=model_hash,
            channels=channels,
            health=health,
            blame=self._blame,
            patience=self._patience,
            config=config,
        )
        self._events: asyncio.Queue[HopEvent] = asyncio.Queue(_MAX_EVENTS)
        self._streams: list[HopStream] = []
        self._sent_to: dict[int, int] = {}
        """Index of the hop that a step of this epoch was last sent to, by step."""
        self.machine: SessionMachine[torch.Tensor] = SessionMachine(max_length=max_length, max_sequences=num_sequences)
        self.route: Route | None = None
        self.num_failovers = 0
        self._stepping: asyncio.Task[object] | None = None
        """The task of the step under way."""
        self._has_asked_again = False

    @property
    def queue_position(self) -> int | None:
        """Our place in the queue of a server that is full; None when we do not wait."""
        return self._opener.queue_position

    async def step(self, requests: Sequence[SequenceRequest[torch.Tensor]], *, last_only: bool) -> list[torch.Tensor]:
        """Run new tokens through all blocks; outputs per request, [T, H] or the last row.

        Raises the errors of BlockSession.step; after a FinalError the session can be used again from where
        it stood before the step.
        """
        self.machine.begin_step(requests)
        self._patience.begin_step()
        self._stepping = asyncio.current_task()
        try:
            outputs = await self._step_until(last_only)
        except BaseException as error:
            self._drop_route()
            if self.machine.state is not SessionState.CLOSED:
                self.machine.abandon_step()
            elif isinstance(error, asyncio.CancelledError):
                raise SessionClosedError("the session was closed while a step was under way") from None
            raise
        finally:
            self._stepping = None
            self._blame.settle()
        self.machine.finish_step()
        return outputs

    async def _step_until(self, last_only: bool) -> list[torch.Tensor]:
        """Try, and after each loss recover and try again, until done or out of time."""
        is_first_loss = True
        while True:
            try:
                if self.route is None:
                    await self._establish()
                parts = plan_parts(self.machine.pending, max_tokens=self._config.max_step_tokens)
                results = await self._run_parts(parts, last_only=last_only)
                return outputs_by_request(self.machine.pending, parts, results, last_only=last_only)
            except RetryElsewhereError as error:
                logger.info("step %d of epoch %d: %s", self.machine.step, self.machine.epoch, error)
                had_route = self.route is not None
                self._drop_route()
                if self.machine.state is SessionState.STEPPING:
                    self.machine.lose_route()
                if self._patience.left_s <= _RETRY_PAUSE_S:
                    raise DeadlineError(
                        f"the step could not be finished within {self._config.request_timeout_s:g} s; last: {error}"
                    ) from error
                self.num_failovers += had_route
                await asyncio.sleep(0 if had_route and is_first_loss else _RETRY_PAUSE_S)
                is_first_loss = False

    # -- route ---------------------------------------------------------------------------------

    async def _establish(self) -> None:
        """Open a route and send it the log, so that it stands where the session stands."""
        is_recovery = self.machine.epoch > 0
        wait_s = min(self._config.no_route_wait_s, self._patience.left_s)
        route = await self._finder.find(wait_s=wait_s, fresh=is_recovery)
        self._events = asyncio.Queue(_MAX_EVENTS)
        self._sent_to.clear()
        self._patience.begin_attempt()
        self._is_pushing = self._blame.use_push
        self._streams = await self._opener.open(route, self._wanted(), self._events.put, use_push=self._is_pushing)
        self.route = route
        if self.machine.state is SessionState.RECOVERING:
            self.machine.recover_route()
        log = self.machine.log(concatenate)
        if log:
            parts = plan_parts(log, max_tokens=self._config.max_step_tokens)
            await self._run_parts(parts, last_only=True)

    def _wanted(self) -> pb.Open:
        """A new epoch of the session, and the positions we claim to need soon: a little more than those at hand."""
        machine = self.machine
        held = sum(machine.lengths) + sum(len(item.rows) for item in machine.pending)
        return pb.Open(
            epoch=machine.start_epoch(),
            max_length=machine.max_length,
            max_sequences=machine.max_sequences,
            expected_tokens=min(held + self._config.expected_new_tokens, machine.max_length * machine.max_sequences),
        )

    def _drop_route(self) -> None:
        streams, self._streams, self.route = self._streams, [], None
        self._opener.leave(streams)

    # -- steps ---------------------------------------------------------------------------------

    async def _run_parts(self, parts: Sequence[StepPart[torch.Tensor]], *, last_only: bool) -> list[torch.Tensor]:
        """Send parts, a few under way at a time, and collect the last hop's outputs in order."""
        assert self.route is not None
        steps: dict[int, tuple[pb.Step, StepPart[torch.Tensor]]] = {}
        results: list[torch.Tensor] = []
        num_sent = 0
        self._patience.note_movement()
        self._has_asked_again = False
        while len(results) < len(parts):
            while num_sent < len(parts) and num_sent - len(results) < self._config.max_steps_in_flight:
                part = parts[num_sent]
                step = self._step_message(part, last_only=last_only)
                steps[step.step] = (step, part)
                num_sent += 1
                await self._send(0, step, rows_of(part))
            event = await self._next_event(list(steps.values()))
            if event.error is not None:
                await self._handle_failure(event)
            result, frame = event.result, event.frame
            if result is None or frame is None or result.step not in steps:
                continue  # an answer to something already settled
            step, part = steps[result.step]
            is_last = event.hop_index + 1 == len(self._streams)
            try:
                peer = self._streams[event.hop_index].hop.peer_id
                output = check_output(frame, part, last_only=last_only and is_last and self._is_pushing, peer=peer)
                if is_last and result.step != min(steps):
                    raise PeerFaultError(f"server {peer} answered out of order")
            except PeerFaultError as fault:
                await self._blame.record(self._streams[event.hop_index].hop, fault)
                raise
            if not is_last:
                if result.push_problem:
                    logger.info("relaying for %s: %s", peer, result.push_problem)
                await self._send(event.hop_index + 1, step, output)
                self._patience.note_movement()
                continue
            self._patience.note_done(part.num_tokens)
            self._has_asked_again = False
            del steps[result.step]
            results.append(output)
        for stream in self._streams:
            self._health.record_success(stream.hop.peer_id)
        return results

    def _step_message(self, part: StepPart[torch.Tensor], *, last_only: bool) -> pb.Step:
        return pb.Step(
            epoch=self.machine.epoch,
            step=self.machine.next_step(),
            sequences=[
                pb.SequenceStep(sequence=item.sequence, parent=item.parent, start=item.start, count=len(item.rows))
                for item in part.sequences
            ],
            last_only=last_only and self._is_pushing,
        )

    async def _send(self, hop_index: int, step: pb.Step, hidden: torch.Tensor) -> None:
        stream = self._streams[hop_index]
        self._sent_to[step.step] = hop_index
        try:
            async with asyncio.timeout(self._config.step_timeout_s):
                await stream.send_step(step, hidden)
        except TimeoutError:
            error: RetryElsewhereError = PeerLostError(f"server {stream.hop.peer_id} stopped reading")
            await self._blame.record(stream.hop, error)
            raise error from None
        except RetryElsewhereError as problem:
            await self._blame.record(stream.hop, problem)
            raise

    async def _next_event(self, under_way: Sequence[tuple[pb.Step, StepPart[torch.Tensor]]]) -> HopEvent:
        """The next thing a hop of this epoch says. Raises PeerLostError when there is no progress for too long."""
        while True:
            timeout_s = self._patience.standstill_left_s
            if timeout_s > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        return await self._events.get()
            if await self._blame_unreachable_hops() or self._patience.left_s <= 0:
                raise PeerLostError(f"no server of the route answered within {self._config.step_timeout_s:g} s")
            if self._has_asked_again:
                await self._leave_silent_hop(under_way[0][0])
            elif len(under_way) == 1:
                await self._ask_again(*under_way[0])
            self._has_asked_again = True
            self._patience.note_movement()

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
        if self._is_pushing and not step.relay and len(self._streams) > 1:
            self._blame.search()
            raise PeerLostError("the route is silent, and only carrying everything ourselves shows at whom")
        hop = self._streams[self._sent_to[step.step]].hop
        if await self._finder.can_avoid(hop.peer_id):
            error = PeerLostError(f"server {hop.peer_id} is alive, but does not answer its step")
            await self._blame.record(hop, error)
            raise error

    async def _blame_unreachable_hops(self) -> bool:
        """A step got lost without a word: whoever does not even answer a health call is to blame."""
        hops = [stream.hop for stream in self._streams]
        answers = await asyncio.gather(
            *(check_health(self._channels.to(hop.server), hop.peer_id, timeout_s=_HEALTH_TIMEOUT_S) for hop in hops),
            return_exceptions=True,
        )
        silent = [
            (hop, answer) for hop, answer in zip(hops, answers, strict=True) if isinstance(answer, RetryElsewhereError)
        ]
        for hop, error in silent:
            await self._blame.record(hop, error)
        return bool(silent)

    async def _handle_failure(self, event: HopEvent) -> NoReturn:
        """Raise a hop's failure after blaming whoever is guilty of it."""
        assert event.error is not None
        hop, error = self._streams[event.hop_index].hop, event.error
        can_have_pushed = self._is_pushing and event.hop_index + 1 < len(self._streams)
        if event.is_report and isinstance(error, PeerLostError) and can_have_pushed:
            lost = await self._lost_hop()
            if lost is None:
                self._blame.stop_pushing()
                raise error
            hop, error = lost
        elif self._is_pushing and event.hop_index > 0 and isinstance(error, FinalError | SessionStateError):
            # What it refuses came from another server; carried by us, every output is checked.
            self._blame.search()
            raise PeerFaultError(str(error)) from error
        if isinstance(error, FinalError):
            raise self._blame.weigh(hop, error) from error
        if isinstance(error, RetryElsewhereError):
            await self._blame.record(hop, error)
        raise error

    async def _lost_hop(self) -> tuple[Hop, SwarmError] | None:
        """A push failed: if the next hop is dead, its own stream says so in a moment; None if it is not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BLAME_WAIT_S):
                while True:
                    event = await self._events.get()
                    if event.error is not None and not event.is_report:
                        return self._streams[event.hop_index].hop, event.error
        return None

    async def close(self) -> None:
        """Say goodbye to all hops; a step under way ends with SessionClosedError. Harmless when repeated."""
        self.machine.close()
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait([self._stepping], timeout=2.0)
        self._drop_route()
        await self._opener.wait_until_left(timeout_s=2.0)
