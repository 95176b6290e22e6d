"""Drives one session: opens hops, sends steps, carries outputs where servers can not, replays after a loss."""

# Letters: T tokens of all sequences in a part, H hidden size.

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from swarm.client.config import ClientConfig
from swarm.client.peer_health import PeerHealth
from swarm.client.route_finder import RouteFinder
from swarm.client.session.machine import SequenceRequest, SessionMachine, SessionState, StepPart, plan_parts
from swarm.client.transport.channels import ServerChannels
from swarm.client.transport.hop_stream import HopEvent, HopStream
from swarm.client.transport.unary import check_health
from swarm.datatypes import ModelHash, Route
from swarm.errors import (
    DeadlineError,
    PeerBusyError,
    PeerFaultError,
    PeerLostError,
    RetryElsewhereError,
    SessionStateError,
)
from swarm.pb import session_pb2 as pb
from swarm.wire.limits import PROTOCOL_VERSION

if TYPE_CHECKING:
    from swarm.datatypes import Hop

__all__ = ["SessionDriver"]

logger = logging.getLogger(__name__)
_RETRY_PAUSE_S = 0.25
_BLAME_WAIT_S = 0.3
_HEALTH_TIMEOUT_S = 2.0
_HIDDEN_DTYPES = ("float32", "bfloat16", "float16")


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
        self._model_hash = model_hash
        self._finder = finder
        self._channels = channels
        self._health = health
        self._config = config
        self._use_push = config.use_push
        self._session_id = os.urandom(16)
        self._events: asyncio.Queue[HopEvent] = asyncio.Queue()
        self._streams: list[HopStream] = []
        self._farewells: set[asyncio.Task[None]] = set()
        self.machine: SessionMachine[torch.Tensor] = SessionMachine(max_length=max_length, max_sequences=num_sequences)
        self.route: Route | None = None
        self.num_failovers = 0
        self.queue_position: int | None = None
        """Our place in the queue of a server that is full; None when we do not wait."""
        self._deadline_s = 0.0

    async def step(self, requests: Sequence[SequenceRequest[torch.Tensor]], *, last_only: bool) -> list[torch.Tensor]:
        """Run new tokens through all blocks; outputs per request, [T, H] or the last row.

        Raises the errors of BlockSession.step; after a FinalError the session can be used again from where
        it stood before the step.
        """
        self.machine.begin_step(requests)
        self._deadline_s = time.monotonic() + self._config.request_timeout_s
        try:
            outputs = await self._step_until(last_only)
        except BaseException:
            self._drop_route()
            if self.machine.state is not SessionState.CLOSED:
                self.machine.abandon_step()
            raise
        self.machine.finish_step()
        return outputs

    async def _step_until(self, last_only: bool) -> list[torch.Tensor]:
        """Try, and after each loss recover and try again, until done or out of time."""
        while True:
            try:
                if self.route is None:
                    await self._establish()
                parts = plan_parts(self.machine.pending, max_tokens=self._config.max_step_tokens)
                results = await self._run_parts(parts, last_only=last_only)
                return _outputs_by_request(self.machine.pending, parts, results, last_only=last_only)
            except RetryElsewhereError as error:
                logger.info("step %d of epoch %d: %s", self.machine.step, self.machine.epoch, error)
                had_route = self.route is not None
                self._drop_route()
                if self.machine.state is SessionState.STEPPING:
                    self.machine.lose_route()
                if time.monotonic() + _RETRY_PAUSE_S >= self._deadline_s:
                    raise DeadlineError(
                        f"the step could not be finished within {self._config.request_timeout_s:g} s; last: {error}"
                    ) from error
                self.num_failovers += had_route
                await asyncio.sleep(0 if had_route else _RETRY_PAUSE_S)

    # -- route ---------------------------------------------------------------------------------

    async def _establish(self) -> None:
        """Open a route and send it the log, so that it stands where the session stands."""
        is_recovery = self.machine.epoch > 0
        wait_s = max(min(self._config.no_route_wait_s, self._deadline_s - time.monotonic()), 0.0)
        route = await self._finder.find(wait_s=wait_s, fresh=is_recovery)
        await self._open(route)
        if self.machine.state is SessionState.RECOVERING:
            self.machine.recover_route()
        log = self.machine.log(_concatenate)
        if log:
            parts = plan_parts(log, max_tokens=self._config.max_step_tokens)
            await self._run_parts(parts, last_only=True)

    async def _open(self, route: Route) -> None:
        """Open the session at every hop. Raises the refusal of the first hop that refuses.

        All at once, unless a hop was full before and there is no way around it: then one after the other in
        block order, waiting in its queue. Everybody who waits holding a place does so in that order, so
        nobody waits for somebody who waits for them.
        """
        epoch = self.machine.start_epoch()
        self._events = asyncio.Queue()
        streams = [HopStream(hop, index, epoch, self._events.put_nowait) for index, hop in enumerate(route.hops)]
        try:
            if self._health.busy().intersection(hop.peer_id for hop in route.hops):
                await self._open_in_turn(streams, route, epoch)
            else:
                opened = await asyncio.gather(
                    *(self._open_hop(stream, route, index, epoch) for index, stream in enumerate(streams)),
                    return_exceptions=True,
                )
                problems = [result for result in opened if isinstance(result, BaseException)]
                if problems:
                    # What retrying can not mend is said first.
                    raise min(problems, key=lambda problem: isinstance(problem, RetryElsewhereError))
        except BaseException:
            self._say_farewell(streams)
            raise
        self._streams = streams
        self.route = route

    async def _open_in_turn(self, streams: Sequence[HopStream], route: Route, epoch: int) -> None:
        """Open hop by hop, waiting in queues; the time in them does not count against the step's deadline."""
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self._config.queue_timeout_s):
                for index, stream in enumerate(streams):
                    await self._open_hop(stream, route, index, epoch, on_queued=self._note_position)
        except TimeoutError:
            raise DeadlineError(
                f"the servers of {route} stayed full for {self._config.queue_timeout_s:g} s "
                f"(our place in the queue: {self.queue_position}); try again later"
            ) from None
        finally:
            self.queue_position = None
            self._deadline_s += time.monotonic() - started_s

    def _note_position(self, position: int) -> None:
        logger.info("the server is full; our place in its queue is %d", position)
        self.queue_position = position

    def _expected_tokens(self) -> int:
        """Positions we claim to need soon: what is held and under way, and a little for the answer."""
        held = sum(self.machine.lengths) + sum(len(item.rows) for item in self.machine.pending)
        return min(held + self._config.expected_new_tokens, self.machine.max_length * self.machine.max_sequences)

    async def _open_hop(
        self,
        stream: HopStream,
        route: Route,
        index: int,
        epoch: int,
        on_queued: Callable[[int], None] | None = None,
    ) -> None:
        request = pb.Open(
            session_id=self._session_id,
            epoch=epoch,
            model_hash=self._model_hash,
            start=stream.hop.start,
            end=stream.hop.end,
            max_length=self.machine.max_length,
            max_sequences=self.machine.max_sequences,
            protocol=PROTOCOL_VERSION,
            expected_tokens=self._expected_tokens(),
            may_wait=on_queued is not None,
        )
        if self._use_push and index + 1 < len(route.hops):
            next_server = route.hops[index + 1].server
            request.next.peer_id = next_server.peer_id
            request.next.addresses.extend(next_server.addresses)
        try:
            channel = self._channels.to(stream.hop.server)
            opened = await stream.open(channel, request, timeout_s=self._config.connect_timeout_s, on_queued=on_queued)
            if opened.peer_id != stream.hop.peer_id:
                raise PeerFaultError(
                    f"{stream.hop.server.addresses[0]} should be {stream.hop.peer_id}, but is {opened.peer_id}"
                )
        except RetryElsewhereError as error:
            await self._blame(stream.hop, error)
            raise

    async def _blame(self, hop: Hop, error: RetryElsewhereError) -> None:
        """Only the guilty are avoided: the lost and the faulty, not the busy or those who lost our state."""
        if isinstance(error, PeerBusyError):
            self._health.record_busy(hop.peer_id, error.retry_after_s)
        elif isinstance(error, PeerLostError | PeerFaultError):
            self._health.record_failure(hop.peer_id)
            await self._channels.drop(hop.server)

    def _drop_route(self) -> None:
        streams, self._streams, self.route = self._streams, [], None
        self._say_farewell(streams)

    def _say_farewell(self, streams: Sequence[HopStream]) -> None:
        """Close streams in the background: the session need not wait for servers it leaves."""
        for stream in streams:
            task = asyncio.get_running_loop().create_task(stream.close(say_goodbye=True))
            self._farewells.add(task)
            task.add_done_callback(self._farewells.discard)

    # -- steps ---------------------------------------------------------------------------------

    async def _run_parts(self, parts: Sequence[StepPart[torch.Tensor]], *, last_only: bool) -> list[torch.Tensor]:
        """Send parts, a few under way at a time, and collect the last hop's outputs in order."""
        assert self.route is not None
        steps: dict[int, tuple[pb.Step, StepPart[torch.Tensor]]] = {}
        results: list[torch.Tensor] = []
        num_sent = 0
        while len(results) < len(parts):
            while num_sent < len(parts) and num_sent - len(results) < self._config.max_steps_in_flight:
                part = parts[num_sent]
                step = self._step_message(part, last_only=last_only)
                steps[step.step] = (step, part)
                num_sent += 1
                await self._send(0, step, _rows(part))
            event = await self._next_event(list(steps.values()))
            if event.error is not None:
                await self._handle_failure(event)
            result, frame = event.result, event.frame
            if result is None or frame is None or result.step not in steps:
                continue  # an answer to something already settled
            step, part = steps[result.step]
            is_last = event.hop_index + 1 == len(self._streams)
            output = self._check_output(event, part, last_only=last_only and is_last)
            if not is_last:
                if result.push_problem:
                    logger.info("relaying for %s: %s", self._streams[event.hop_index].hop.peer_id, result.push_problem)
                await self._send(event.hop_index + 1, step, output)
                continue
            if result.step != min(steps):
                raise PeerFaultError(f"server {self._streams[-1].hop.peer_id} answered out of order")
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
            last_only=last_only and self._use_push,
        )

    async def _send(self, hop_index: int, step: pb.Step, hidden: torch.Tensor) -> None:
        stream = self._streams[hop_index]
        try:
            async with asyncio.timeout(self._config.step_timeout_s):
                await stream.send_step(step, hidden)
        except TimeoutError:
            error: RetryElsewhereError = PeerLostError(f"server {stream.hop.peer_id} stopped reading")
            await self._blame(stream.hop, error)
            raise error from None
        except PeerLostError as lost:
            await self._blame(stream.hop, lost)
            raise

    async def _next_event(self, under_way: Sequence[tuple[pb.Step, StepPart[torch.Tensor]]]) -> HopEvent:
        """The next thing a hop of this epoch says. Raises PeerLostError when somebody has fallen silent.

        Where everybody is alive the step is asked for again, in case it was lost on its way between servers:
        those who have run it answer from memory, so asking does no harm.
        """
        while True:
            timeout_s = min(self._config.step_timeout_s, max(self._deadline_s - time.monotonic(), 0.01))
            try:
                async with asyncio.timeout(timeout_s):
                    while (event := await self._events.get()).epoch != self.machine.epoch:
                        pass
                return event
            except TimeoutError:
                if await self._blame_silent_hops() or time.monotonic() >= self._deadline_s:
                    raise PeerLostError(f"no server of the route answered within {timeout_s:.1f} s") from None
                logger.info("the route is slow, but all of its servers answer; asking again")
                if len(under_way) == 1:
                    step, part = under_way[0]
                    await self._send(0, step, _rows(part))

    async def _blame_silent_hops(self) -> bool:
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
            await self._blame(hop, error)
        return bool(silent)

    async def _handle_failure(self, event: HopEvent) -> None:
        """Raise a hop's failure after blaming whoever is guilty of it."""
        assert event.error is not None
        hop = self._streams[event.hop_index].hop
        error = event.error
        if isinstance(error, PeerLostError) and event.hop_index + 1 < len(self._streams):
            # Perhaps only a push failed. If the next hop is dead its own stream says so in a moment.
            try:
                async with asyncio.timeout(_BLAME_WAIT_S):
                    while True:
                        other = await self._events.get()
                        if other.error is not None and other.hop_index != event.hop_index:
                            hop, error = self._streams[other.hop_index].hop, other.error
                            break
            except TimeoutError:
                self._use_push = False
        if isinstance(error, RetryElsewhereError) and not isinstance(error, SessionStateError):
            await self._blame(hop, error)
        raise error

    def _check_output(self, event: HopEvent, part: StepPart[torch.Tensor], *, last_only: bool) -> torch.Tensor:
        """The tensor of a result, or PeerFaultError when it can not be one."""
        assert event.frame is not None
        peer = self._streams[event.hop_index].hop.peer_id
        counts = [len(item.rows) for item in part.sequences]
        sent_last_only = last_only and self._use_push
        num_rows = sum(count > 0 for count in counts) if sent_last_only else sum(counts)
        shape = (num_rows, part.sequences[0].rows.shape[1])
        headers = event.frame.tensors
        if len(headers) != 1 or headers[0].shape != shape or headers[0].dtype not in _HIDDEN_DTYPES:
            raise PeerFaultError(f"server {peer} answered with {[header.shape for header in headers]}, not {shape}")
        return event.frame.tensor(0)

    async def close(self) -> None:
        """Say goodbye to all hops; harmless when repeated."""
        if self.machine.state in (SessionState.STEPPING, SessionState.RECOVERING):
            self.machine.abandon_step()
        self.machine.close()
        self._drop_route()
        if self._farewells:
            await asyncio.wait(self._farewells, timeout=2.0)


def _concatenate(chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(chunks))


def _rows(part: StepPart[torch.Tensor]) -> torch.Tensor:
    """All rows of a part, [T, H]."""
    if len(part.sequences) == 1:
        return part.sequences[0].rows
    return torch.cat([item.rows for item in part.sequences])


def _outputs_by_request(
    requests: Sequence[SequenceRequest[torch.Tensor]],
    parts: Sequence[StepPart[torch.Tensor]],
    results: Sequence[torch.Tensor],
    *,
    last_only: bool,
) -> list[torch.Tensor]:
    """Give each request its rows back, however the step was cut."""
    pieces: dict[int, list[torch.Tensor]] = {item.sequence: [] for item in requests}
    for part, result in zip(parts, results, strict=True):
        counts = [len(item.rows) for item in part.sequences]
        if last_only and result.shape[0] != sum(counts):
            counts = [min(count, 1) for count in counts]
        for item, rows in zip(part.sequences, result.split(counts), strict=True):
            pieces[item.sequence].append(rows)
    outputs: list[torch.Tensor] = []
    for item in requests:
        rows = [piece for piece in pieces[item.sequence] if len(piece)]
        if not rows:
            outputs.append(item.rows[:0])
        elif last_only:
            outputs.append(rows[-1][-1:])
        else:
            outputs.append(rows[0] if len(rows) == 1 else torch.cat(rows))
    return outputs
