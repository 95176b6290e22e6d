"""Stateless runs over all blocks, with a backward pass: every request can be repeated on any server."""

# Letters: T tokens of all sequences, H hidden size.

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swarm.client.adapter_choice import adapter_hash_on
from swarm.client.config import ClientConfig
from swarm.client.peer_health import PeerHealth
from swarm.client.route_finder import RouteFinder
from swarm.client.session.blame import Blame
from swarm.client.transport.channels import ServerChannels
from swarm.client.transport.liveness import look_for_life, watch_over
from swarm.client.transport.unary import run_blocks
from swarm.datatypes import Hop, ModelHash, Route, Span
from swarm.errors import BadInputError, DeadlineError, RetryElsewhereError

__all__ = ["ForwardTrace", "RunAllBlocks", "StatelessRunner", "hops_between"]

logger = logging.getLogger(__name__)
_RETRY_PAUSE_S = 0.25
_HEALTH_TIMEOUT_S = 2.0

RunCoroutine = Callable[[Coroutine[Any, Any, Any]], Any]


@dataclass(frozen=True)
class ForwardTrace:
    """What a forward run leaves for its backward pass."""

    runs: Sequence[tuple[Span, torch.Tensor]]
    """Span and inputs [T, H] of each run, in block order."""
    outputs: torch.Tensor
    """[T, H]"""


@dataclass
class _Attempts:
    """The attempts at one piece of work."""

    deadline_s: float
    blame: Blame
    num_failed: int = 0
    hop: Hop | None = None
    """Who is being asked; None before anybody is."""


class StatelessRunner:
    """Runs whole sequences hop by hop through the client, which so keeps what backward needs."""

    def __init__(
        self,
        *,
        model_hash: ModelHash,
        finder: RouteFinder,
        channels: ServerChannels,
        health: PeerHealth,
        config: ClientConfig,
    ) -> None:
        self._model_hash = model_hash
        self._finder = finder
        self._channels = channels
        self._health = health
        self._config = config

    async def forward(self, hidden: torch.Tensor, counts: Sequence[int]) -> ForwardTrace:
        """Run [T, H] through all blocks; a hop that fails is replaced, what was done before it is kept."""
        runs: list[tuple[Span, torch.Tensor]] = []
        end = self._finder.num_blocks
        start = 0
        attempts = self._new_attempts()
        while start < end:
            async with self._one_attempt(attempts):
                for hop in await self._hops(start, end, attempts):
                    attempts.hop = hop
                    output = await self._run(hop, counts, hidden, None)
                    runs.append((hop.span, hidden))
                    hidden, start = output, hop.end
        return ForwardTrace(runs=runs, outputs=hidden)

    async def backward(self, trace: ForwardTrace, gradient: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The gradient [T, H] of the first inputs, given that of the outputs."""
        for span, inputs in reversed(trace.runs):
            gradient = await self._backward_span(span, inputs, gradient, counts)
        return gradient

    async def _backward_span(
        self, span: Span, inputs: torch.Tensor, gradient: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """Gradient of one run's inputs; where several servers serve its blocks now, theirs are recomputed."""
        attempts = self._new_attempts()
        while True:
            async with self._one_attempt(attempts):
                hops = await self._hops(span.start, span.end, attempts)
                hidden = [inputs]
                for hop in hops[:-1]:
                    attempts.hop = hop
                    hidden.append(await self._run(hop, counts, hidden[-1], None))
                result = gradient
                for hop, hop_inputs in zip(reversed(hops), reversed(hidden), strict=True):
                    attempts.hop = hop
                    result = await self._run(hop, counts, hop_inputs, result)
                return result

    async def _run(
        self, hop: Hop, counts: Sequence[int], hidden: torch.Tensor, gradient: torch.Tensor | None
    ) -> torch.Tensor:
        result = await watch_over(
            hop.peer_id,
            run_blocks(
                self._channels.to(hop.server),
                hop,
                self._model_hash,
                counts,
                hidden,
                gradient,
                adapter=adapter_hash_on(hop.server, self._config.adapter),
                timeout_s=self._config.step_timeout_s,
            ),
            lambda: look_for_life(self._channels, hop.server, self._health, timeout_s=_HEALTH_TIMEOUT_S),
        )
        self._health.record_success(hop.peer_id)
        return result

    async def _hops(self, start: int, end: int, attempts: _Attempts) -> list[Hop]:
        attempts.hop = None
        wait_s = max(min(self._config.no_route_wait_s, attempts.deadline_s - time.monotonic()), 0.0)
        # After a failure what was looked up before may be out of date.
        route = await self._finder.find(wait_s=wait_s, fresh=attempts.num_failed > 0)
        return hops_between(route, start, end)

    def _new_attempts(self) -> _Attempts:
        return _Attempts(
            deadline_s=time.monotonic() + self._config.request_timeout_s,
            blame=Blame(health=self._health, channels=self._channels, use_push=False),
        )

    @contextlib.asynccontextmanager
    async def _one_attempt(self, attempts: _Attempts) -> AsyncIterator[None]:
        """Swallow what another server may mend, after blaming the hop and a pause; the caller tries again."""
        try:
            yield
        except (RetryElsewhereError, BadInputError) as error:
            logger.info("a stateless run failed: %s", error)
            attempts.num_failed += 1
            if isinstance(error, BadInputError):
                if attempts.hop is None or attempts.blame.weigh(attempts.hop, error) is error:
                    raise
            elif attempts.hop is not None:
                await attempts.blame.record(attempts.hop, error)
            if time.monotonic() + _RETRY_PAUSE_S >= attempts.deadline_s:
                raise DeadlineError(
                    f"the run could not be finished within {self._config.request_timeout_s:g} s; last: {error}"
                ) from error
            await asyncio.sleep(_RETRY_PAUSE_S)


def hops_between(route: Route, start: int, end: int) -> list[Hop]:
    """The part of a route that covers [start, end)."""
    return [
        Hop(server=hop.server, span=Span(start=max(hop.start, start), end=min(hop.end, end)))
        for hop in route.hops
        if hop.start < end and hop.end > start
    ]


class RunAllBlocks(torch.autograd.Function):
    """Sequences through all remote blocks as one differentiable operation."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        counts: Sequence[int],
        runner: StatelessRunner,
        run: RunCoroutine,
    ) -> torch.Tensor:
        """hidden: [T, H]; `run` executes a coroutine on the client's loop and waits."""
        trace: ForwardTrace = run(runner.forward(hidden.detach(), counts))
        ctx.trace, ctx.counts, ctx.runner, ctx.run = trace, counts, runner, run
        return trace.outputs.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        result: torch.Tensor = ctx.run(ctx.runner.backward(ctx.trace, gradient.contiguous(), ctx.counts))
        return result.to(gradient.dtype), None, None, None
