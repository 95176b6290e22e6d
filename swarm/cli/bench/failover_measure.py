"""Loses servers at chosen tokens, in every way that is promised to be survived, and measures the stalls."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from swarm.cli.chaos.losses import LossResult, Moment, chosen_tokens, kill_replacement, run_with_leave, run_with_loss
from swarm.cli.chaos.scripts import LOSS_SCRIPT
from swarm.cli.chaos.stalls import Stall, summarise_stalls
from swarm.cli.local_swarm import split_blocks
from swarm.datatypes import Span
from swarm.errors import BadInputError

if TYPE_CHECKING:
    from swarm.cli.chaos.trial_swarm import TrialSwarm
    from swarm.client.generation_session import GenerationSession
    from swarm.client.remote_model import SwarmModelForCausalLM
    from swarm.datatypes import Hop, PeerId
    from swarm.models.progress import ProgressReporter

__all__ = [
    "CASES",
    "FailoverSettings",
    "LossTrials",
    "check_cases",
    "loss_spans",
    "measure_failover",
    "results_to_json",
]

logger = logging.getLogger(__name__)
_STEP_SHARE: Final = 0.5
"""How far into a step of the usual length a loss comes, where it is to come during one."""
_GAP_S: Final = 20.0
_ANNOUNCED_S: Final = 2.0
"""After a server says it is ready, until everybody can be expected to have heard of it."""


@dataclass(frozen=True, kw_only=True)
class FailoverSettings:
    """What to measure."""

    cases: tuple[str, ...]
    num_tokens: int = 12
    """Tokens at which each server is killed in the case `kill`."""


def loss_spans(num_blocks: int) -> list[Span]:
    """Of the six servers that LossTrials wants."""
    return split_blocks(num_blocks, 3) * 2


class LossTrials:
    """The cases, on a swarm of three spans that two servers hold each. One thread at a time."""

    def __init__(self, trial: TrialSwarm) -> None:
        """The swarm's first six servers hold the thirds of the model, twice; it has no proxies."""
        self._trial = trial
        self._servers = trial.servers
        self._thirds = [server.span for server in trial.servers.servers[:3]]
        self._step_s = 0.1

    def restore(self) -> None:
        """Both servers of each third are online again, and nobody else."""
        for server in self._servers.servers[6:]:
            if not server.has_ended:
                server.kill()
        for server in self._servers.servers[:6]:
            server.recover()
            if server.has_ended:
                server.start()
        for server in self._servers.servers[:6]:
            server.wait_until_online()
        time.sleep(_ANNOUNCED_S)

    def undisturbed(self, model: SwarmModelForCausalLM) -> LossResult:
        """For comparison; also tells how long a step takes."""
        result = run_with_loss(self._trial, model, LOSS_SCRIPT, Moment(token=1), lambda *_: [], case="undisturbed")
        lengths_s = sorted(gap.length_s for gap in result.outcome.gaps[1:])
        if lengths_s:
            self._step_s = lengths_s[len(lengths_s) // 2]
        return result

    def kill(self, model: SwarmModelForCausalLM, *, hops: Sequence[int], token: int, in_step: bool) -> LossResult:
        """SIGKILL for some hops of the route at once."""

        def act(route: tuple[Hop, ...], session: GenerationSession) -> Sequence[PeerId]:
            lost = [route[hop].peer_id for hop in hops]
            victims = [self._servers.find(peer) for peer in lost]
            for victim in victims:
                victim.kill()
            return lost

        names = " and ".join(str(hop) for hop in hops)
        when = "during the step after" if in_step else "after"
        moment = Moment(token=token, delay_s=self._step_s * _STEP_SHARE if in_step and token else 0.0)
        return run_with_loss(
            self._trial, model, LOSS_SCRIPT, moment, act, case=f"kill hop {names} {when} token {token}"
        )

    def freeze(self, model: SwarmModelForCausalLM, *, hop: int, token: int) -> LossResult:
        """SIGSTOP: connections stay open, and nobody answers."""

        def act(route: tuple[Hop, ...], session: GenerationSession) -> Sequence[PeerId]:
            self._servers.find(route[hop].peer_id).freeze()
            return [route[hop].peer_id]

        moment = Moment(token=token, delay_s=self._step_s * _STEP_SHARE)
        return run_with_loss(self._trial, model, LOSS_SCRIPT, moment, act, case=f"freeze hop {hop} after token {token}")

    def kill_and_kill_replacement(self, model: SwarmModelForCausalLM, *, hop: int, token: int) -> LossResult:
        """The server that takes over dies too, while the log is replayed to it; a third one is there."""
        third = self._servers.add(self._thirds[hop])
        third.wait_until_online()
        time.sleep(_ANNOUNCED_S)

        def act(route: tuple[Hop, ...], session: GenerationSession) -> Sequence[PeerId]:
            lost = route[hop].peer_id
            victim = self._servers.find(lost)
            harmed = [lost]
            kill_replacement(self._servers, session, route[hop].span, lost, harmed)
            victim.kill()
            return harmed

        moment = Moment(token=token)
        return run_with_loss(
            self._trial, model, LOSS_SCRIPT, moment, act, case=f"kill hop {hop} and its replacement after token {token}"
        )

    def replace_by_two(self, model_of: Callable[[], SwarmModelForCausalLM], *, hop: int, token: int) -> LossResult:
        """The only other holders of a span hold half of it each."""
        span = self._thirds[hop]
        middle = (span.start + span.end) // 2
        halves = [Span(start=span.start, end=middle), Span(start=middle, end=span.end)]
        self._servers.servers[3 + hop].kill()
        for half in halves:
            self._servers.add(half)
        for server in self._servers.servers[-2:]:
            server.wait_until_online()
        time.sleep(_ANNOUNCED_S)
        with model_of() as model:
            result = self.kill(model, hops=[hop], token=token, in_step=False)
        return replace(result, case=f"{result.case}, two smaller servers take over")

    def fill_gap(self, model: SwarmModelForCausalLM, *, hop: int, token: int) -> LossResult:
        """Nobody holds the blocks any more; a server is started 20 s later."""
        starter: list[threading.Timer] = []

        def act(route: tuple[Hop, ...], session: GenerationSession) -> Sequence[PeerId]:
            span = route[hop].span
            holders = [server for server in self._servers.servers if server.span == span and server.is_serving]
            lost = [server.peer_id for server in holders]
            for server in holders:
                server.kill()
            starter.append(threading.Timer(_GAP_S, holders[0].start))
            starter[0].start()
            return lost

        result = run_with_loss(
            self._trial, model, LOSS_SCRIPT, Moment(token=token), act, case=f"gap at hop {hop} after token {token}"
        )
        for timer in starter:
            timer.join()
        return result

    def leave(self, model: SwarmModelForCausalLM, *, hop: int, token: int) -> LossResult:
        """SIGTERM, with somebody there to take the session over."""
        return run_with_leave(
            self._trial,
            model,
            LOSS_SCRIPT,
            Moment(token=token),
            hop=hop,
            case=f"hop {hop} leaves after token {token}",
        )


_Runner = Callable[[LossTrials, "TrialSwarm", FailoverSettings], Iterator[LossResult]]


def _run_kill(trials: LossTrials, trial: TrialSwarm, settings: FailoverSettings) -> Iterator[LossResult]:
    reference = trial.references[LOSS_SCRIPT.name]
    (part,) = reference.parts
    tokens = chosen_tokens(len(part.text_ids), len(part.new_ids), count=settings.num_tokens)
    for number, token in enumerate(tokens):
        trials.restore()
        with trial.connect() as model:
            # Of each third the second server is left for the next hop's turn, so three losses need one restoration.
            for hop in range(3):
                yield trials.kill(model, hops=[hop], token=token, in_step=(number + hop) % 2 == 1)


def _run_one(case: Callable[[LossTrials, SwarmModelForCausalLM], LossResult]) -> _Runner:
    def run(trials: LossTrials, trial: TrialSwarm, settings: FailoverSettings) -> Iterator[LossResult]:
        trials.restore()
        with trial.connect() as model:
            yield case(trials, model)

    return run


def _run_split(trials: LossTrials, trial: TrialSwarm, settings: FailoverSettings) -> Iterator[LossResult]:
    trials.restore()
    yield trials.replace_by_two(trial.connect, hop=1, token=9)


CASES: Final[Mapping[str, _Runner]] = {
    "undisturbed": _run_one(lambda trials, model: trials.undisturbed(model)),
    "kill": _run_kill,
    "freeze": _run_one(lambda trials, model: trials.freeze(model, hop=1, token=9)),
    "two": _run_one(lambda trials, model: trials.kill(model, hops=[0, 2], token=9, in_step=False)),
    "replacement": _run_one(lambda trials, model: trials.kill_and_kill_replacement(model, hop=1, token=20)),
    "split": _run_split,
    "gap": _run_one(lambda trials, model: trials.fill_gap(model, hop=1, token=9)),
    "leave": _run_one(lambda trials, model: trials.leave(model, hop=1, token=9)),
}


def check_cases(text: str) -> tuple[str, ...]:
    """`kill,gap` as names; all for an empty text. Raises BadInputError, naming those that exist, for others."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in CASES:
            raise BadInputError(f"there is no case {name!r}; choose from {', '.join(CASES)}")
    return names or tuple(CASES)


def measure_failover(
    trial: TrialSwarm, settings: FailoverSettings, *, report: ProgressReporter
) -> Mapping[str, list[LossResult]]:
    """Results by case. Raises FinalError when a server does not start again."""
    trials = LossTrials(trial)
    with trial.connect() as model:
        trials.undisturbed(model)
    results: dict[str, list[LossResult]] = {}
    for name in settings.cases:
        report.start(f"Case {name}", None, "")
        results[name] = []
        for result in CASES[name](trials, trial, settings):
            logger.info("%s: identical %s, stall %.2f s", result.case, result.is_identical, result.stall_s)
            results[name].append(result)
    report.finish()
    return results


def results_to_json(results: Mapping[str, Sequence[LossResult]]) -> list[dict[str, Any]]:
    """An entry for each case, with the single losses in it."""
    entries: list[dict[str, Any]] = []
    for name, losses in results.items():
        figures = vars(summarise_stalls(Stall(length_s=one.stall_s, kind=name) for one in losses))
        entries.append(
            {
                "case": name,
                "losses": len(losses),
                "identical": all(one.is_identical for one in losses),
                "rest_kept": all(one.is_rest_kept for one in losses),
                "wrongly_blamed": sum(len(one.wrongly_blamed) for one in losses),
                **{key: round(value, 3) for key, value in figures.items() if isinstance(value, float)},
                "recomputed_tokens": [
                    one.num_recomputed_tokens for one in losses if one.num_recomputed_tokens is not None
                ],
                "single": [
                    {
                        "loss": one.case,
                        "identical": one.is_identical,
                        "stall_s": round(one.stall_s, 3),
                        "failovers": one.outcome.num_failovers,
                        "rest_kept": one.is_rest_kept,
                        "wrongly_blamed": list(one.wrongly_blamed),
                        **({"error": one.outcome.error, "message": one.outcome.message} if one.outcome.message else {}),
                    }
                    for one in losses
                ],
            }
        )
    return entries
