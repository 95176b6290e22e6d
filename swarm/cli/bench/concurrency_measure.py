"""Measures how a swarm's work per token falls when more clients decode at the same time.

Only decoding is timed: all clients take their first token, wait for each other, and then decode the same
number of tokens. Numbers of clients are measured in turns, and ratios are taken within a round, so that
what else happens on the machine meets all of them alike.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.cli.bench.cpu_time import CpuClock
from swarm.cli.bench.decoding_client import DecodingClient, random_prompt
from swarm.cli.bench.local_bench import BenchSwarm
from swarm.cli.bench.server_account import ServerAccount, ask_servers

if TYPE_CHECKING:
    from swarm.models.progress import ProgressReporter

__all__ = ["ConcurrencyFigures", "ConcurrencyRound", "measure_concurrency", "summarise_concurrency"]

_BARRIER_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class ConcurrencyRound:
    """One measurement of one number of clients."""

    num_clients: int
    num_tokens: int
    """Decoded by all clients together while the clocks ran."""
    wall_s: float
    client_wall_s: Sequence[float]
    """Of each client, from the common start to its last token."""
    server_cpu_s: float
    client_cpu_s: float
    """Of the one process in which all clients run."""
    num_server_tokens: int
    """Tokens that all servers ran: each counts once per server."""
    num_batches: int
    """Engine steps of all servers."""
    account: ServerAccount
    """At the end, sessions still open."""

    @property
    def tokens_per_server_cpu_s(self) -> float:
        return self.num_tokens / self.server_cpu_s


@dataclass(frozen=True, kw_only=True)
class ConcurrencyFigures:
    """Medians over the rounds of one number of clients; memory is that of the last round."""

    num_clients: int
    tokens_per_s: float
    """Of all clients together."""
    tokens_per_s_per_client: float
    """Median over the clients."""
    slowest_client_tokens_per_s: float
    server_cpu_ms_per_token: float
    """User and system time of all servers."""
    all_cpu_ms_per_token: float
    """The clients' process included."""
    tokens_per_server_cpu_s: float
    ratio_to_one_client: float | None
    """Tokens per CPU second of the servers, against one client in the same round; None when not measured."""
    sessions_per_batch: float
    """Mean tokens in an engine step."""
    kv_used_bytes: int
    kv_wasted_bytes: int
    kv_wasted_ratio: float
    """Wasted to used."""
    kv_shared_bytes: int
    num_spills: int


def measure_concurrency(
    swarm: BenchSwarm,
    *,
    client_counts: Sequence[int],
    num_rounds: int,
    num_prompt_tokens: int,
    num_new_tokens: int,
    has_head: bool,
    report: ProgressReporter,
) -> list[ConcurrencyFigures]:
    """Figures of each of `client_counts`, in that order.

    Raises MissingDependencyError without psutil, and what sessions raise.
    """
    crowd = _Crowd(swarm, num_prompt_tokens=num_prompt_tokens, has_head=has_head)
    report.start("Warming up", None, "")
    crowd.run(max(client_counts), num_new_tokens=4)
    report.start("Measuring", num_rounds * len(client_counts), "runs")
    rounds: list[list[ConcurrencyRound]] = []
    for _ in range(num_rounds):
        rounds.append([])
        for num_clients in client_counts:
            rounds[-1].append(crowd.run(num_clients, num_new_tokens=num_new_tokens))
            report.advance(1)
    report.finish()
    return summarise_concurrency(rounds)


class _Crowd:
    """Runs clients, each in a thread and a session of its own."""

    def __init__(self, swarm: BenchSwarm, *, num_prompt_tokens: int, has_head: bool) -> None:
        self._swarm = swarm
        self._has_head = has_head
        self._num_prompt_tokens = num_prompt_tokens
        self._addresses = [server.grpc_address for server in swarm.servers]
        self._clock = CpuClock([server.pid for server in swarm.servers])
        self._num_prompts = 0

    def run(self, num_clients: int, *, num_new_tokens: int) -> ConcurrencyRound:
        """`num_new_tokens` are those after the first."""
        started, ended = _Reading(), _Reading()
        before: list[ServerAccount] = []
        after: list[ServerAccount] = []

        def read_start() -> None:
            before.append(ask_servers(self._addresses))
            self._read(started)

        def read_end() -> None:
            self._read(ended)
            after.append(ask_servers(self._addresses))

        # Prompts are never used twice: a shared prefix would flatter the figures.
        seeds = range(self._num_prompts, self._num_prompts + num_clients)
        self._num_prompts += num_clients
        start = threading.Barrier(num_clients, action=read_start, timeout=_BARRIER_TIMEOUT_S)
        end = threading.Barrier(num_clients, action=read_end, timeout=_BARRIER_TIMEOUT_S)

        def live(seed: int) -> float:
            """The time of this client's last token."""
            try:
                return self._live(seed, num_new_tokens, start, end)
            except BaseException:
                start.abort()  # nobody waits for one that has failed
                end.abort()
                raise

        with ThreadPoolExecutor(num_clients, thread_name_prefix="bench-client") as pool:
            futures = [pool.submit(live, seed) for seed in seeds]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return ConcurrencyRound(
            num_clients=num_clients,
            num_tokens=num_clients * num_new_tokens,
            wall_s=ended.wall_s - started.wall_s,
            client_wall_s=[future.result() - started.wall_s for future in futures],
            server_cpu_s=ended.server_cpu_s - started.server_cpu_s,
            client_cpu_s=ended.client_cpu_s - started.client_cpu_s,
            num_server_tokens=after[0].num_tokens - before[0].num_tokens,
            num_batches=after[0].num_batches - before[0].num_batches,
            account=after[0],
        )

    def _live(self, seed: int, num_new_tokens: int, start: threading.Barrier, end: threading.Barrier) -> float:
        prompt = random_prompt(self._num_prompt_tokens, vocab_size=self._swarm.vocab_size, seed=seed)
        max_length = self._num_prompt_tokens + num_new_tokens + 1
        with DecodingClient(self._swarm.model, max_length=max_length, has_head=self._has_head) as client:
            client.prefill(prompt)
            start.wait()
            client.decode(num_new_tokens)
            end.wait()
            return client.stamps_s[-1]

    def _read(self, reading: _Reading) -> None:
        reading.server_cpu_s = self._clock.others_s()
        reading.client_cpu_s = self._clock.own_s()
        reading.wall_s = time.perf_counter()


@dataclass
class _Reading:
    """All clocks at one moment."""

    wall_s: float = 0.0
    server_cpu_s: float = 0.0
    client_cpu_s: float = 0.0


def summarise_concurrency(rounds: Sequence[Sequence[ConcurrencyRound]]) -> list[ConcurrencyFigures]:
    """Medians over rounds, each of which holds the same numbers of clients in the same order."""
    figures: list[ConcurrencyFigures] = []
    for column in zip(*rounds, strict=True):
        ratios = [
            one.tokens_per_server_cpu_s / alone.tokens_per_server_cpu_s
            for one, turn in zip(column, rounds, strict=True)
            for alone in turn
            if alone.num_clients == 1
        ]
        account = column[-1].account

        def median(figure: Callable[[ConcurrencyRound], float], column: Sequence[ConcurrencyRound] = column) -> float:
            return statistics.median(figure(one) for one in column)

        figures.append(
            ConcurrencyFigures(
                num_clients=column[0].num_clients,
                tokens_per_s=median(lambda one: one.num_tokens / one.wall_s),
                tokens_per_s_per_client=median(
                    lambda one: one.num_tokens / one.num_clients / statistics.median(one.client_wall_s)
                ),
                slowest_client_tokens_per_s=median(
                    lambda one: one.num_tokens / one.num_clients / max(one.client_wall_s)
                ),
                server_cpu_ms_per_token=median(lambda one: one.server_cpu_s / one.num_tokens * 1e3),
                all_cpu_ms_per_token=median(lambda one: (one.server_cpu_s + one.client_cpu_s) / one.num_tokens * 1e3),
                tokens_per_server_cpu_s=median(lambda one: one.tokens_per_server_cpu_s),
                ratio_to_one_client=statistics.median(ratios) if ratios else None,
                sessions_per_batch=median(lambda one: one.num_server_tokens / max(one.num_batches, 1)),
                kv_used_bytes=account.kv_used_bytes,
                kv_wasted_bytes=account.kv_wasted_bytes,
                kv_wasted_ratio=account.kv_wasted_bytes / max(account.kv_used_bytes, 1),
                kv_shared_bytes=account.kv_shared_bytes,
                num_spills=account.num_spills,
            )
        )
    return figures
