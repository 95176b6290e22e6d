"""Losses at chosen moments: one session plays a script, and at a certain token something happens to its servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from swarm.cli.chaos.census import SessionAccount, ask_account
from swarm.cli.chaos.playing import Outcome, play
from swarm.datatypes import Hop, PeerId, Span
from swarm.errors import FinalError

if TYPE_CHECKING:
    from swarm.cli.chaos.scripts import Script
    from swarm.cli.chaos.swarm_under_test import FrailServer, ServersUnderTest
    from swarm.cli.chaos.trial_swarm import TrialSwarm
    from swarm.client.generation_session import GenerationSession
    from swarm.client.remote_model import SwarmModelForCausalLM

__all__ = ["LossResult", "Moment", "chosen_tokens", "kill_replacement", "run_with_leave", "run_with_loss"]

_POLL_S: Final = 0.002
_WATCH_TIMEOUT_S: Final = 60.0
_LEAVE_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When it happens."""

    token: int
    """After so many tokens; 0: as soon as there is a route, while the prompt is under way."""
    delay_s: float = 0.0
    """So long after that token, so that a step is under way; 0: between two steps."""


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """What a session made of a loss."""

    case: str
    outcome: Outcome
    route: tuple[Hop, ...]
    """Before it happened."""
    stall_s: float
    """The longest time without a token, from the loss on."""
    is_rest_kept: bool
    """Whether the route still has, at the end, every server that nothing happened to; also true for a loss before the
    first token, when no server holds anything that would be worth keeping."""
    wrongly_blamed: tuple[PeerId, ...] = ()
    """Peers that the client counts a new failure of, though they were well all the time."""
    num_recomputed_tokens: int | None = None
    """Tokens that some server computed though they had been computed before, summed over servers; None: not counted."""

    @property
    def is_identical(self) -> bool:
        return not (self.outcome.num_wrong_tokens or self.outcome.error)


def chosen_tokens(num_prompt_tokens: int, num_new_tokens: int, *, page_tokens: int = 16, count: int = 12) -> list[int]:
    """Numbers of tokens after which a loss is most likely to be noticed: the first ones, the last ones, and those
    around the positions where pages of the cache end; ascending, at most `count`."""
    first, last = [0, 1, 2], [num_new_tokens - 1, num_new_tokens - 2]
    boundaries = [
        position + offset - num_prompt_tokens
        for position in range(page_tokens, num_prompt_tokens + num_new_tokens, page_tokens)
        for offset in (-1, 0, 1)
    ]
    ordered = [token for token in [*first, *last, *boundaries] if 0 <= token < num_new_tokens]
    return sorted(list(dict.fromkeys(ordered))[:count])


def run_with_loss(
    trial: TrialSwarm,
    model: SwarmModelForCausalLM,
    script: Script,
    moment: Moment,
    act: Callable[[tuple[Hop, ...], GenerationSession], Sequence[PeerId]],
    *,
    case: str,
) -> LossResult:
    """Play a script, and let `act` do something at the moment.

    Args:
        trial: the swarm.
        model: a client of it.
        script: without beams.
        moment: when.
        act: gets the route and the session, and returns the peers it has harmed.
        case: name of the result.
    """
    trigger = _Trigger(moment, act)
    failures_before = _count_failures(model)
    outcome = play(
        model,
        script,
        trial.references[script.name],
        client=0,
        deadline_s=trial.deadline_s,
        on_token=trigger.on_token,
        on_session=trigger.on_session,
    )
    trigger.wait()
    happened_s = trigger.happened_s
    stalls_s = [gap.length_s for gap in outcome.gaps if gap.ended_s >= happened_s]
    rest = {hop.peer_id for hop in trigger.route} - set(trigger.harmed)
    well = {server.peer_id for server in trial.servers.servers if server.is_serving} - set(trigger.harmed)
    blamed = {peer for peer, count in _count_failures(model).items() if count > failures_before.get(peer, 0)}
    return LossResult(
        case=case,
        outcome=outcome,
        route=trigger.route,
        stall_s=max(stalls_s, default=0.0),
        is_rest_kept=moment.token == 0 or rest <= trigger.last_peers,
        wrongly_blamed=tuple(sorted(blamed & well)),
    )


class _Trigger:
    """Acts once, at its moment."""

    def __init__(self, moment: Moment, act: Callable[[tuple[Hop, ...], GenerationSession], Sequence[PeerId]]) -> None:
        self._moment = moment
        self._act = act
        self._num_tokens = 0
        self._session: GenerationSession | None = None
        self._thread: threading.Thread | None = None
        self.route: tuple[Hop, ...] = ()
        """When it happened."""
        self.harmed: Sequence[PeerId] = ()
        self.happened_s = float("inf")
        """On time.monotonic's clock."""
        self.last_peers: set[PeerId] = set()
        """Of the latest route that was seen."""

    def on_session(self, session: GenerationSession) -> None:
        self._session = session
        if self._moment.token == 0:
            self._thread = threading.Thread(target=self._act_on_route, name="loss", daemon=True)
            self._thread.start()

    def on_token(self, num_columns: int) -> None:
        assert self._session is not None
        self._num_tokens += 1
        if self._num_tokens == self._moment.token:
            if self._moment.delay_s:
                self._thread = threading.Timer(self._moment.delay_s, self._act_now)
                self._thread.start()
            else:
                self._act_now()
        elif route := self._session.route:
            self.last_peers = {hop.peer_id for hop in route}

    def wait(self) -> None:
        """Until it has happened, if it ever began to."""
        if self._thread is not None:
            self._thread.join(_WATCH_TIMEOUT_S)

    def _act_on_route(self) -> None:
        assert self._session is not None
        deadline_s = time.monotonic() + _WATCH_TIMEOUT_S
        while not self._session.route and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        self._act_now()

    def _act_now(self) -> None:
        assert self._session is not None
        self.route = self._session.route
        self.happened_s = time.monotonic()
        self.harmed = self._act(self.route, self._session)


def kill_replacement(
    servers: ServersUnderTest, session: GenerationSession, span: Span, lost: PeerId, harmed: list[PeerId]
) -> None:
    """Wait, in a thread of its own, until somebody else has the blocks of a lost server, and kill that one at once.

    It is then appended to `harmed`.

    A route is shown when it has been opened, which is before the log is replayed to it.
    """

    def watch() -> None:
        deadline_s = time.monotonic() + _WATCH_TIMEOUT_S
        while time.monotonic() < deadline_s:
            for hop in session.route:
                if hop.peer_id != lost and hop.start < span.end and span.start < hop.end:
                    harmed.append(hop.peer_id)
                    servers.find(hop.peer_id).kill()
                    return
            time.sleep(_POLL_S)

    threading.Thread(target=watch, name="kill-replacement", daemon=True).start()


def run_with_leave(
    trial: TrialSwarm, model: SwarmModelForCausalLM, script: Script, moment: Moment, *, hop: int, case: str
) -> LossResult:
    """SIGTERM for one hop of the route while others hold its blocks; counts what was computed twice.

    Raises FinalError when the server does not leave.
    """
    before = _accounts(trial)
    at_leave: dict[PeerId, SessionAccount] = {}
    leaving: list[FrailServer] = []

    def act(route: tuple[Hop, ...], session: GenerationSession) -> Sequence[PeerId]:
        at_leave.update(_accounts(trial))
        leaving.append(trial.servers.find(route[hop].peer_id))
        peer_id = leaving[0].peer_id
        leaving[0].begin_leave()
        return [peer_id]

    result = run_with_loss(trial, model, script, moment, act, case=case)
    deadline_s = time.monotonic() + _LEAVE_TIMEOUT_S
    while leaving and not leaving[0].has_ended:
        if time.monotonic() >= deadline_s:
            raise FinalError(f"{leaving[0].name} does not leave")
        time.sleep(0.1)
    # What the one that left computed after the count stays unknown, so this is at most what was computed twice.
    num_run = sum(
        account.num_tokens_run - before[peer].num_tokens_run
        for peer, account in {**at_leave, **_accounts(trial)}.items()
        if peer in before
    )
    num_wanted = len(result.route) * (trial.references[script.name].max_length - 1)
    return replace(result, num_recomputed_tokens=max(num_run - num_wanted, 0) if num_run else None)


def _count_failures(model: SwarmModelForCausalLM) -> dict[PeerId, int]:
    """By peer, as the client remembers them."""
    from swarm.client.connection import SwarmBlocks

    blocks = model.remote_blocks
    return {one.peer_id: one.num_failures for one in blocks.peer_health()} if isinstance(blocks, SwarmBlocks) else {}


def _accounts(trial: TrialSwarm) -> Mapping[PeerId, SessionAccount]:
    return {server.peer_id: ask_account(server.direct_address) for server in trial.servers.servers if server.is_serving}
