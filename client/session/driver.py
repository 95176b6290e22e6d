"""Drives one session: opens a route, restores what its servers lack, sends steps, and after a loss does so again."""

# Letters: T tokens of all sequences in a part, H hidden size.

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import torch

from swarm.client.config import ClientConfig
from swarm.client.peer_health import PeerHealth
from swarm.client.route_finder import RouteFinder
from swarm.client.session.blame import Blame
from swarm.client.session.holdings import Holdings
from swarm.client.session.inquiry import Inquiry
from swarm.client.session.machine import SessionMachine, SessionState
from swarm.client.session.opening import OpenedHop, RouteOpener
from swarm.client.session.outputs import concatenate, outputs_by_request
from swarm.client.session.parts import SequenceRequest, StepPart, moves_first, plan_parts
from swarm.client.session.patience import Patience
from swarm.client.session.recovery import last_to_restore
from swarm.client.session.streams import SessionStreams
from swarm.client.session.traffic import RouteTraffic
from swarm.client.transport.channels import ServerChannels
from swarm.datatypes import Hop, ModelHash, Route
from swarm.errors import (
    DeadlineError,
    PeerLostError,
    RetryElsewhereError,
    SessionClosedError,
    SessionStateError,
    SwarmError,
)
from swarm.kvpolicy.settings import KVPolicy
from swarm.pb import session_pb2 as pb

__all__ = ["SessionDriver"]

logger = logging.getLogger(__name__)
_RETRY_PAUSE_S = 0.25


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
        self._health = health
        self._config = config
        self._blame = Blame(health=health, channels=channels, use_push=config.use_push)
        self._patience = Patience(config)
        self._holdings = Holdings()
        self._streams = SessionStreams()
        self._inquiry = Inquiry(
            blame=self._blame,
            holdings=self._holdings,
            channels=channels,
            health=health,
            finder=finder,
            patience=self._patience,
        )
        self._opener = RouteOpener(
            model_hash=model_hash,
            channels=channels,
            health=health,
            inquiry=self._inquiry,
            holdings=self._holdings,
            streams=self._streams,
            patience=self._patience,
            config=config,
        )
        self.machine: SessionMachine[torch.Tensor] = SessionMachine(max_length=max_length, max_sequences=num_sequences)
        self._traffic: RouteTraffic | None = None
        """Along the route in use; None when there is none."""
        self._latest: RouteTraffic | None = None
        """Along the route opened last, whether or not it is still in use: what its hops say counts until the next."""
        self._last_hops: tuple[Hop, ...] = ()
        """Of the route that was in use last."""
        self._policies: tuple[KVPolicy, ...] | None = None
        """Those under which hops of the latest route compress; None before the first."""
        self._is_going_back = False
        """Whether the log was cut where servers could not follow, so that it is to be sent again."""
        self.num_failovers = 0
        """How often a server was replaced, or had to be sent the log again."""
        self._stepping: asyncio.Task[object] | None = None
        """The task of the step under way."""

    @property
    def route(self) -> Route | None:
        """The route in use."""
        return self._traffic.route if self._traffic is not None else None

    @property
    def queue_position(self) -> int | None:
        """Our place in the queue of a server that is full; None when we do not wait."""
        return self._opener.queue_position

    async def room_to_take_back(self, sequence: int, start: int) -> int | None:
        """See BlockSession; between steps only."""
        if self._policies is None:
            return 0 if await self._finder.may_compress() else None
        return self.machine.room_to_take_back(self._policies, sequence, start)

    async def step(self, requests: Sequence[SequenceRequest[torch.Tensor]], *, last_only: bool) -> list[torch.Tensor]:
        """Run new tokens through all blocks; outputs per request, [T, H] or the last row.

        Raises the errors of BlockSession.step; after a FinalError the session can be used again from where
        it stood before the step.
        """
        self.machine.begin_step(requests)
        self._patience.begin_step()
        self._stepping = asyncio.current_task()
        held_before = self._holdings.save()
        try:
            return await self._step_until(last_only)
        except BaseException as error:
            self._traffic = None  # servers may be anywhere in the step, so the next one begins with keeping
            self._is_going_back = False
            if self.machine.state is not SessionState.CLOSED:
                if self.machine.abandon_step():
                    self._holdings.go_back(held_before)
            elif isinstance(error, asyncio.CancelledError):
                raise SessionClosedError("the session was closed while a step was under way") from None
            raise
        finally:
            self._stepping = None
            self._inquiry.settle()

    async def _step_until(self, last_only: bool) -> list[torch.Tensor]:
        """Try, and after each loss recover and try again, until done or out of time."""
        pending = self.machine.pending
        parts = plan_parts(pending, max_tokens=self._config.max_step_tokens)
        results: list[torch.Tensor] = []
        is_first_loss = True
        must_go_back = not self.machine.can_go_back(self._policies or ())
        telling: RetryElsewhereError | None = None
        while True:
            try:
                if must_go_back:
                    parts = self._go_back_in_log(parts, results)
                    must_go_back = False
                if self._traffic is not None:
                    await self._traffic.heed_idle_events()
                else:
                    await self._establish(parts[len(results) :])
                await self._run(parts, results, last_only=last_only)
                return outputs_by_request(pending, parts, results, last_only=last_only)
            except RetryElsewhereError as error:
                logger.info("epoch %d: %s", self.machine.epoch, error)
                had_route, self._traffic = self._traffic is not None, None
                if self.machine.state is SessionState.STEPPING:
                    self.machine.lose_route()
                # A session that is gone from a server mostly follows from something else, which says more.
                if telling is None or not _is_refusal_of_state(error):
                    telling = error
                if self._patience.left_s <= _RETRY_PAUSE_S:
                    raise self._giving_up(telling) from error
                await asyncio.sleep(0 if had_route and is_first_loss else _RETRY_PAUSE_S)
                is_first_loss = False
                # Who compresses may know better than our record how far it can go back.
                must_go_back = bool(self._policies) and _is_refusal_of_state(error)

    def _go_back_in_log(
        self, parts: Sequence[StepPart[torch.Tensor]], results: list[torch.Tensor]
    ) -> list[StepPart[torch.Tensor]]:
        """Let the log go back to where the parts without a result begin, so that servers which can not are sent it.

        What they have compressed can not be undone; a replay of the log that is left leads them to where they would
        be had they never gone further. Returns the parts anew.
        """
        done, waiting = list(parts[: len(results)]), parts[len(results) :]
        planned = moves_first(waiting, self.machine.length)
        if planned is None:
            return list(parts)
        moves, appending = planned
        logger.info("going back to where servers can not; the log up to there is sent again")
        self.machine.finish_part(moves)
        self._traffic = None
        self._holdings.make_stale()
        self._is_going_back = True
        results.append(moves.sequences[0].rows)
        return [*done, moves, *appending]

    async def _run(
        self, parts: Sequence[StepPart[torch.Tensor]], results: list[torch.Tensor], *, last_only: bool
    ) -> None:
        """Run the parts that have no result yet; each that is done is part of the log at once."""
        assert self._traffic is not None
        hops, epoch = self._traffic.hops, self.machine.epoch

        def note_done(number: int, part: StepPart[torch.Tensor], output: torch.Tensor | None) -> None:
            assert output is not None
            results.append(output)
            if len(results) < len(parts):
                self.machine.finish_part(part)
            else:
                self.machine.finish_step(part)
            self._holdings.commit(hops, epoch=epoch, step=number)
            self._inquiry.note_progress()

        await self._traffic.run(parts[len(results) :], note_done, last_only=last_only)

    def _giving_up(self, error: RetryElsewhereError) -> SwarmError:
        """What to raise when the step's time is over."""
        if isinstance(error, PeerLostError):
            missing = self._finder.missing_error(waited_s=self._config.request_timeout_s)
            if missing is not None:
                return missing
        return DeadlineError(
            f"the step could not be finished within {self._config.request_timeout_s:g} s; last: {error}"
        )

    # -- route ---------------------------------------------------------------------------------

    async def _establish(self, parts: Sequence[StepPart[torch.Tensor]]) -> None:
        """Open a route on which all servers stand where the log ends; `parts` are to follow."""
        route = await self._find_route()
        machine = self.machine
        is_pushing = self._blame.use_push
        traffic = RouteTraffic(
            route,
            epoch=machine.start_epoch(),
            is_pushing=is_pushing,
            inquiry=self._inquiry,
            blame=self._blame,
            finder=self._finder,
            health=self._health,
            patience=self._patience,
            config=self._config,
        )
        self._latest = traffic
        opened = await self._opener.open(
            route, self._wanted(parts), machine.lengths, traffic.events.put, use_push=is_pushing
        )
        traffic.begin(opened)
        self._policies = traffic.compressing_policies()
        has_restored = await self._restore(traffic, opened)
        self._dismiss_unclaimed(route.hops)
        self._holdings.keep_only(route.hops)
        self._streams.leave_others([hop.peer_id for hop in route.hops])
        if machine.state is SessionState.RECOVERING:
            machine.recover_route()
        self._note_failover(route, has_restored=has_restored and not self._is_going_back)
        self._is_going_back = False
        self._traffic = traffic

    async def _find_route(self) -> Route:
        """A route with as many hops in it that hold the session's state as can be."""
        is_recovery = self.machine.epoch > 0
        wait_s = self._patience.left_s
        if not self.machine.lengths and not self._last_hops:
            wait_s = min(wait_s, self._config.no_route_wait_s)
        while True:
            if self._latest is not None:
                self._latest.heed_farewells()
            route = await self._finder.find(
                wait_s=wait_s, fresh=is_recovery, held=self._holdings.all(), like=self._last_hops
            )
            # Whoever has left while we waited is not there to be opened.
            if self._latest is None or not self._latest.heed_farewells():
                return route

    async def _restore(self, traffic: RouteTraffic, opened: Sequence[OpenedHop]) -> bool:
        """Send the log to hops that lack it, through those before them; says whether that was needed."""
        has_log = any(self.machine.lengths)
        last_hop = last_to_restore([item.has_kept for item in opened]) if has_log else None
        if last_hop is None:
            self._patience.begin_attempt(sum(self.machine.lengths))
            return False
        self._patience.begin_attempt()
        hops = traffic.hops[: last_hop + 1]
        logger.info("sending %d tokens again to blocks 0:%d", sum(self.machine.lengths), hops[-1].end)
        self._holdings.begin_restoring(hops)
        replay = self.machine.replay(
            concatenate,
            policies=traffic.compressing_policies(last_hop),
            max_tokens=self._config.max_step_tokens,
        )
        step = await traffic.restore(replay, last_hop)
        self._holdings.restored(hops, epoch=self.machine.epoch, step=step)
        return True

    def _dismiss_unclaimed(self, in_use: Sequence[Hop]) -> None:
        """Servers that leave hand the session over; a successor that it does not go on at need not wait for us."""
        peers_in_use = {hop.peer_id for hop in in_use}
        for holding in self._holdings.unclaimed():
            server = self._finder.remembered(holding.peer_id)
            if server is None or holding.peer_id in peers_in_use or not server.span.contains_span(holding.span):
                continue
            wanted = self._wanted(())
            wanted.epoch = self.machine.epoch + 1
            hop = Hop(server=server, span=holding.span)
            self._streams.end_elsewhere(self._opener.dismiss(hop, wanted))

    def _note_failover(self, route: Route, *, has_restored: bool) -> None:
        if self._last_hops:
            before = [(hop.peer_id, hop.span) for hop in self._last_hops]
            if has_restored or before != [(hop.peer_id, hop.span) for hop in route.hops]:
                self.num_failovers += 1
        self._last_hops = route.hops

    def _wanted(self, parts: Sequence[StepPart[torch.Tensor]]) -> pb.Open:
        """A new epoch of the session, and the positions we claim to need soon: a little more than those at hand."""
        machine = self.machine
        held = sum(machine.lengths) + sum(part.num_tokens for part in parts)
        return pb.Open(
            epoch=machine.epoch,
            max_length=machine.max_length,
            max_sequences=machine.max_sequences,
            expected_tokens=min(held + self._config.expected_new_tokens, machine.max_length * machine.max_sequences),
        )

    async def close(self) -> None:
        """Say goodbye to all hops; a step under way ends with SessionClosedError. Harmless when repeated."""
        self.machine.close()
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait([self._stepping], timeout=2.0)
        if self._latest is not None:
            self._latest.heed_farewells()
        self._dismiss_unclaimed(self._traffic.hops if self._traffic is not None else ())
        self._traffic = None
        await self._streams.leave_all(timeout_s=3.0)


def _is_refusal_of_state(error: SwarmError) -> bool:
    """Whether a server refused a step because of where it stands."""
    return isinstance(error, SessionStateError) or isinstance(error.__cause__, SessionStateError)
