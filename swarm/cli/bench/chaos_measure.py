"""Runs sessions on a swarm while servers are harmed by plan, and reports what became of both."""

from __future__ import annotations

import collections
import gc
import itertools
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from swarm.cli.chaos.census import find_leaks, find_processes, survivors, take_census
from swarm.cli.chaos.faults import FaultSettings, plan_faults
from swarm.cli.chaos.injector import FaultRecord, Injector
from swarm.cli.chaos.playing import Outcome, play
from swarm.cli.chaos.reference import Reference
from swarm.cli.chaos.scripts import SCRIPTS, choose_scripts
from swarm.cli.chaos.stalls import FaultWindow, Stall, find_stalls, summarise_stalls
from swarm.cli.chaos.swarm_under_test import ServersUnderTest
from swarm.cli.chaos.trial_swarm import open_trial_swarm
from swarm.datatypes import Span

if TYPE_CHECKING:
    from swarm.client.remote_model import SwarmModelForCausalLM
    from swarm.models.progress import ProgressReporter

__all__ = ["ChaosReport", "ChaosSettings", "measure_chaos"]

logger = logging.getLogger(__name__)
_LEAK_TIMEOUT_S: Final = 100.0
"""A session whose client could not say goodbye is kept for a minute."""
_ALLOWANCE: Final = 24
"""Descriptors and threads that a server may hold more than before the first session: it keeps a connection to each
other server, and its pools of threads grow to a fixed size."""
_CLOSE_TIMEOUT_S: Final = 30.0
_PAUSE_AFTER_ERROR_S: Final = 2.0
"""As a person would wait before trying again."""
_MAX_LISTED: Final = 50
_HUNG_AFTER_S: Final = 60.0
"""How long after its deadline a session is given up on."""


@dataclass(frozen=True, kw_only=True)
class ChaosSettings:
    """One run."""

    seed: int
    duration_s: float
    """Sessions begin before this."""
    num_clients: int
    deadline_s: float
    """Of a session's step."""
    faults: FaultSettings
    script_names: tuple[str, ...] = ()
    """Sessions to choose from; empty for all."""


@dataclass(frozen=True, kw_only=True)
class ChaosReport:
    """What came of it."""

    outcomes: Sequence[Outcome]
    records: Sequence[FaultRecord]
    leaks: Sequence[str]
    problems: Sequence[str]
    """Of the servers: what ended or failed without having been told to."""
    growth: Mapping[str, int]
    """How many more open files and threads a server had in the end than before the first session, at most."""
    num_hung: int
    """Sessions that neither ended nor failed by their deadline."""
    min_margin: float
    started_s: float

    @property
    def is_clean(self) -> bool:
        """Whether every promise was kept."""
        broken = [one for one in self.outcomes if one.num_wrong_tokens or one.is_late or one.is_untyped]
        return not (broken or self.leaks or self.problems or self.num_hung)

    def to_results(self) -> list[dict[str, Any]]:
        """One entry for all, and one for each kind of fault."""
        stalls = self._stalls()
        faults = collections.Counter(one.fault.kind.value for one in self.records if one.began_s is not None)
        errors = collections.Counter(one.error for one in self.outcomes if one.error)
        whole: dict[str, Any] = {
            "case": "all",
            "sessions": len(self.outcomes),
            "sessions_by_script": dict(collections.Counter(one.script for one in self.outcomes)),
            "tokens": sum(one.num_tokens for one in self.outcomes),
            "wrong_tokens": sum(one.num_wrong_tokens for one in self.outcomes),
            "faults": sum(faults.values()),
            "faults_left_out": sum(bool(one.why_left_out) for one in self.records),
            "recoveries": sum(one.num_failovers for one in self.outcomes),
            "typed_errors": {name: errors[name] for name in sorted(errors)},
            "untyped_errors": sum(one.is_untyped for one in self.outcomes),
            "late_errors": sum(one.is_late for one in self.outcomes),
            "hung_sessions": self.num_hung,
            **_rounded(stalls),
            "reference_min_margin": round(self.min_margin, 4),
            **self.growth,
            "leaks": list(self.leaks),
            "problems": list(self.problems),
            "bad_sessions": [self._describe(one) for one in self.outcomes if one.error or one.num_wrong_tokens][
                :_MAX_LISTED
            ],
            "log": [self._log_line(one) for one in self.records],
        }
        kinds = [
            {
                "case": kind,
                "faults": count,
                **_rounded([stall for stall in stalls if stall.kind == kind]),
            }
            for kind, count in sorted(faults.items())
        ]
        return [whole, *kinds]

    def _stalls(self) -> list[Stall]:
        end_s = max((one.ended_s for one in self.outcomes), default=0.0)
        windows = [
            FaultWindow(kind=one.fault.kind.value, began_s=one.began_s, ended_s=one.ended_s or end_s)
            for one in self.records
            if one.began_s is not None
        ]
        return [stall for one in self.outcomes for stall in find_stalls(one.gaps, windows)]

    def _describe(self, one: Outcome) -> dict[str, Any]:
        return {
            "script": one.script,
            "client": one.client,
            "from_s": round(one.started_s - self.started_s, 2),
            "to_s": round(one.ended_s - self.started_s, 2),
            "error": one.error,
            "message": one.message,
        }

    def _log_line(self, one: FaultRecord) -> str:
        if one.began_s is None:
            return f"{one.fault}: left out, {one.why_left_out or 'the run was over'}"
        ended = "" if one.ended_s is None else f", over at {one.ended_s - self.started_s:.2f} s"
        return f"{one.fault}: hit server {one.server} at {one.began_s - self.started_s:.2f} s{ended}"


def measure_chaos(
    model_name: str,
    spans: Sequence[Span],
    settings: ChaosSettings,
    *,
    report: ProgressReporter,
    num_threads: int = 1,
    log_folder: Path | None = None,
) -> ChaosReport:
    """Harm a swarm of `spans` by the plan of the seed. Raises as open_trial_swarm and plan_faults do."""
    plan = plan_faults(settings.seed, spans, settings.faults)
    scripts = [one for one in SCRIPTS if not settings.script_names or one.name in settings.script_names]
    with open_trial_swarm(
        model_name,
        spans,
        scripts=scripts,
        deadline_s=settings.deadline_s,
        with_proxies=True,
        report=report,
        num_threads=num_threads,
        log_folder=log_folder,
    ) as trial:
        threads_before = set(threading.enumerate())
        injector = Injector(trial.servers, plan, restart_s=settings.faults.restart_s)
        report.start("Harming the swarm", round(settings.duration_s), "s")
        model = trial.connect()
        crowd = _Crowd(model, trial.references, settings)
        closing = threading.Thread(target=model.close, name="close-model", daemon=True)
        del model  # what it holds is to be gone when it is closed
        try:
            injector.start()
            crowd.start()
            for _ in range(round(settings.duration_s)):
                time.sleep(1.0)
                report.advance(1)
            report.start("Letting sessions finish", None, "")
            num_hung = crowd.wait()
            injector.stop()
        finally:
            # A client that hangs must not keep us from saying so.
            closing.start()
            closing.join(_CLOSE_TIMEOUT_S)
            is_closed = not closing.is_alive()
            del closing
            crowd.forget_model()
        report.start("Looking for leaks", None, "")
        leaks = [] if is_closed else ["the client does not close"]
        leaks += [] if num_hung else _client_leaks(threads_before)
        leaks += _server_leaks(trial.servers)
        growth = _growth(trial.servers)
        families = [process for server in trial.servers.servers for process in server.processes]
        families += [one for server in trial.servers.servers if server.pid for one in find_processes(server.pid)]
        sockets = {path for server in trial.servers.servers for path in server.sockets}
    leaks += survivors(families, timeout_s=20.0)
    leaks += [f"file {path} is left" for path in sorted(sockets) if path.exists()]
    return ChaosReport(
        outcomes=list(crowd.outcomes),
        records=injector.records,
        leaks=leaks,
        problems=injector.problems,
        growth=growth,
        num_hung=num_hung,
        min_margin=min(reference.min_margin for reference in trial.references.values()),
        started_s=injector.started_s,
    )


class _Crowd:
    """Clients, each in a thread, that play one script after the other until the time is over."""

    def __init__(
        self, model: SwarmModelForCausalLM, references: Mapping[str, Reference], settings: ChaosSettings
    ) -> None:
        self._model: SwarmModelForCausalLM | None = model
        self._references = references
        self._settings = settings
        self.outcomes: list[Outcome] = []
        self._threads = [
            threading.Thread(target=self._live, args=(client,), name=f"client {client}", daemon=True)
            for client in range(settings.num_clients)
        ]
        self._until_s = 0.0

    def start(self) -> None:
        self._until_s = time.monotonic() + self._settings.duration_s
        for thread in self._threads:
            thread.start()

    def forget_model(self) -> None:
        """Once clients have ended, so that nothing of it stays in memory."""
        self._model = None

    def wait(self) -> int:
        """Until all have ended; how many hang."""
        # A script has a few turns, and each may take up to its deadline once or twice.
        deadline_s = self._until_s + 3 * self._settings.deadline_s + _HUNG_AFTER_S
        for thread in self._threads:
            thread.join(max(deadline_s - time.monotonic(), 0.0))
        return sum(thread.is_alive() for thread in self._threads)

    def _live(self, client: int) -> None:
        settings = self._settings
        for number in itertools.count():
            script = next(itertools.islice(choose_scripts(settings.seed, client, settings.script_names), number, None))
            if time.monotonic() >= self._until_s:
                return
            reference = self._references[script.name]
            assert self._model is not None
            outcome = play(self._model, script, reference, client=client, deadline_s=settings.deadline_s)
            self.outcomes.append(outcome)
            if outcome.error or outcome.num_wrong_tokens:
                logger.warning("client %d, %s: %s %s", client, script.name, outcome.error, outcome.message)
                time.sleep(_PAUSE_AFTER_ERROR_S)


def _client_leaks(threads_before: set[threading.Thread]) -> list[str]:
    """Threads of the client that are still there after a while."""
    deadline_s = time.monotonic() + 20.0
    while time.monotonic() < deadline_s:
        gc.collect()  # gRPC ends its thread with the last of its objects
        left = [
            thread
            for thread in threading.enumerate()
            if thread not in threads_before and thread.is_alive() and not thread.name.startswith("output of ")
        ]
        if not left:
            return []
        time.sleep(0.2)
    return [f"the client's thread {thread.name!r} is left" for thread in left]


def _growth(servers: ServersUnderTest) -> dict[str, int]:
    """The most that any server has more than before the first session."""
    files, threads = [0], [0]
    for server in servers.servers:
        pid, before = server.pid, server.baseline
        if pid is not None and before is not None and server.is_serving:
            now = take_census(pid)
            files.append(now.num_files - before.num_files)
            threads.append(now.num_threads - before.num_threads)
    return {"files_grown_max": max(files), "threads_grown_max": max(threads)}


def _server_leaks(servers: ServersUnderTest) -> list[str]:
    leaks: list[str] = []
    deadline_s = time.monotonic() + _LEAK_TIMEOUT_S
    for server in servers.servers:
        pid = server.pid
        if pid is None or not server.is_serving:
            continue
        leaks += find_leaks(
            server.name,
            server.baseline,
            pid=pid,
            grpc_address=server.direct_address,
            allowance=_ALLOWANCE,
            timeout_s=max(deadline_s - time.monotonic(), 1.0),
        )
    return leaks


def _rounded(stalls: Sequence[Stall]) -> dict[str, float | int | None]:
    figures = vars(summarise_stalls(stalls))
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
