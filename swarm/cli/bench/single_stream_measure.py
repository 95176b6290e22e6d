"""Measures single-stream decoding of the demo model: by transformers alone, and over 1, 2, … hops.

All cases are set up first and then measured in turns, so that what else happens on the machine meets
all of them alike. Each figure is the median over the rounds, but for those that are called best.

Wall time outside the blocks: a chain's blocks do the same work as the local model's, one after the
other. So the time that a token spends in the chain (from the client's hand to the client's hand), less
the time that it spends in the local model's blocks, is what the hops add: sockets, framing, waking
processes up. Within a round the median over tokens is taken, because a token that the machine interrupts
tells nothing about hops; on a busy machine the best token (the shortest of all rounds) tells more.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from swarm.cli.bench.cpu_time import CpuClock
from swarm.cli.local_swarm import LocalSwarm, split_blocks
from swarm.errors import FinalError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from swarm.models import ModelSource
    from swarm.models.progress import ProgressReporter

__all__ = ["BlockTimer", "CaseFigures", "measure", "summarise"]

LOCAL = "transformers"


@dataclass(frozen=True, kw_only=True)
class CaseFigures:
    """Medians over the rounds of one case."""

    case: str
    """`transformers`, or `N hops`."""
    num_hops: int
    """0 for plain transformers."""
    wall_ms_per_token: float
    """Median time between two tokens of a round."""
    cpu_ms_per_token: float
    """User and system time of all processes that take part, over the tokens after the first."""
    client_cpu_ms_per_token: float
    """Of that, the client's; for plain transformers, all."""
    cpu_ratio_to_local: float
    """Median over rounds of the ratio to plain transformers in the same round."""
    wall_ratio_to_local: float
    wall_ms_in_blocks_per_token: float
    """Median time in all blocks, hops included."""
    wall_ms_outside_blocks_per_hop: float | None
    """(time in all blocks - that of plain transformers) / hops, median over rounds; None without hops."""
    wall_ms_outside_blocks_per_hop_best: float | None
    """The same between the quickest tokens of all rounds."""
    is_same_tokens: bool
    """Whether every round gave plain transformers' tokens."""

    def to_json(self) -> dict[str, Any]:
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
            if value is not None
        }


@dataclass(frozen=True, kw_only=True)
class _Case:
    name: str
    num_hops: int
    generate: Callable[..., torch.Tensor]
    clock: CpuClock
    blocks: BlockTimer


@dataclass(frozen=True, kw_only=True)
class _Round:
    """Per token: medians, but for the CPU times, which are means, and the quickest time in the blocks."""

    wall_ms: float
    cpu_ms: float
    client_cpu_ms: float
    in_blocks_ms: float
    in_blocks_best_ms: float
    token_ids: tuple[int, ...]


class BlockTimer:
    """Notes how long each forward pass is inside the blocks."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        """Hooks on to the first and the last block, which may be the same module."""
        self.passes_s: list[float] = []
        self._entered_s = 0.0
        first.register_forward_pre_hook(self._enter)
        last.register_forward_hook(self._leave)

    def _enter(self, *_: object) -> None:
        self._entered_s = time.perf_counter()

    def _leave(self, *_: object) -> None:
        self.passes_s.append(time.perf_counter() - self._entered_s)


class _Stamps:
    """A streamer that reads the clocks at every token, the prompt left out."""

    def __init__(self, clock: CpuClock) -> None:
        self._clock = clock
        self._has_prompt = False
        self.wall_s: list[float] = []
        self.first_cpu_s = self.last_cpu_s = (0.0, 0.0)

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.wall_s.append(time.perf_counter())
        if len(self.wall_s) == 1:
            self.first_cpu_s = self.read_cpu()

    def end(self) -> None:
        self.last_cpu_s = self.read_cpu()

    def read_cpu(self) -> tuple[float, float]:
        return self._clock.own_s(), self._clock.others_s()


def measure(
    *,
    hop_counts: Sequence[int],
    num_rounds: int,
    num_prompt_tokens: int,
    num_new_tokens: int,
    report: ProgressReporter,
) -> list[CaseFigures]:
    """Figures of plain transformers and of chains of each length in `hop_counts`, all on this machine.

    Raises:
        MissingDependencyError: without psutil, or without hivemind.
        FinalError: a server does not start.
    """
    import torch

    from swarm.client.remote_layer import RemoteLayer
    from swarm.client.remote_model import SwarmModelForCausalLM
    from swarm.models import DEMO_MODEL, resolve_model

    torch.set_num_threads(1)
    source = resolve_model(DEMO_MODEL, report=report)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1000, 40_000, (1, num_prompt_tokens), generator=generator)
    chains = [split_blocks(source.num_blocks, num_hops) for num_hops in hop_counts]
    report.start("Starting servers", None, "")
    with contextlib.ExitStack() as stack:
        swarm = stack.enter_context(
            LocalSwarm(source.name, [span for chain in chains for span in chain], num_threads=1)
        )
        swarm.start()
        local, local_blocks = _open_local(source)
        num_online = 0

        def show(now_online: int) -> None:
            nonlocal num_online
            report.advance(now_online - num_online)
            num_online = now_online

        report.start("Servers online", sum(hop_counts), "servers")
        servers = swarm.wait_until_online(show)
        cases = [_Case(name=LOCAL, num_hops=0, generate=local, clock=CpuClock([]), blocks=local_blocks)]
        for num_hops in hop_counts:
            members, servers = servers[:num_hops], servers[num_hops:]
            model = stack.enter_context(
                SwarmModelForCausalLM.from_pretrained(
                    source.name,
                    # A server answers the look-ups, so no DHT daemon of the client's own runs beside it.
                    initial_peers=[members[0].grpc_address],
                    allowed_peers=frozenset(member.peer_id for member in members),
                )
            )
            clock = CpuClock([member.pid for member in members])
            name = f"{num_hops} hop{'s' if num_hops > 1 else ''}"
            chain = next(module for module in model.modules() if isinstance(module, RemoteLayer))
            blocks = BlockTimer(chain, chain)
            cases.append(_Case(name=name, num_hops=num_hops, generate=model.generate, clock=clock, blocks=blocks))
        return _run(cases, input_ids, num_rounds=num_rounds, num_new_tokens=num_new_tokens, report=report)


def _open_local(source: ModelSource) -> tuple[Callable[..., torch.Tensor], BlockTimer]:
    import torch
    from transformers import AutoModelForCausalLM

    from swarm.models.anatomy import dissect

    source.ensure_tensors()
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, local_files_only=True)
    stack = dissect(model, model.config.get_text_config(decoder=True)).stack
    return model.generate, BlockTimer(stack[0], stack[-1])


def _run(
    cases: Sequence[_Case], input_ids: torch.Tensor, *, num_rounds: int, num_new_tokens: int, report: ProgressReporter
) -> list[CaseFigures]:
    report.start("Warming up", len(cases), "cases")
    for case in cases:
        _run_once(case, input_ids, num_new_tokens=8)
        report.advance(1)
    report.start("Measuring", num_rounds * len(cases), "runs")
    rounds: dict[str, list[_Round]] = {case.name: [] for case in cases}
    for _ in range(num_rounds):
        for case in cases:
            rounds[case.name].append(_run_once(case, input_ids, num_new_tokens=num_new_tokens))
            report.advance(1)
    report.finish()
    return [summarise(case.name, case.num_hops, rounds[case.name], rounds[LOCAL]) for case in cases]


def _run_once(case: _Case, input_ids: torch.Tensor, *, num_new_tokens: int) -> _Round:
    import torch

    stamps = _Stamps(case.clock)
    case.blocks.passes_s.clear()
    output = case.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        # Every round has the same number of tokens, whatever the model says.
        min_new_tokens=num_new_tokens,
        max_new_tokens=num_new_tokens,
        streamer=stamps,
    )
    num_timed = len(stamps.wall_s) - 1
    if num_timed < 1:
        raise FinalError(f"{case.name} gave {num_timed + 1} tokens instead of {num_new_tokens}")
    gaps_s = [later - earlier for earlier, later in zip(stamps.wall_s, stamps.wall_s[1:], strict=False)]
    # The first pass is the prompt's; a last one may follow whose token is not used.
    passes_s = case.blocks.passes_s[1 : 1 + num_timed]
    own_s, others_s = (last - first for first, last in zip(stamps.first_cpu_s, stamps.last_cpu_s, strict=True))
    return _Round(
        wall_ms=statistics.median(gaps_s) * 1e3,
        cpu_ms=(own_s + others_s) / num_timed * 1e3,
        client_cpu_ms=own_s / num_timed * 1e3,
        in_blocks_ms=statistics.median(passes_s) * 1e3,
        in_blocks_best_ms=min(passes_s) * 1e3,
        token_ids=tuple(output[0, input_ids.shape[1] :].tolist()),
    )


def summarise(case: str, num_hops: int, rounds: Sequence[_Round], local: Sequence[_Round]) -> CaseFigures:
    """Medians of a case's rounds, and of their ratios to plain transformers' rounds."""
    median = statistics.median
    pairs = list(zip(rounds, local, strict=True))
    outside_ms = outside_best_ms = None
    if num_hops:
        outside_ms = median([(one.in_blocks_ms - base.in_blocks_ms) / num_hops for one, base in pairs])
        best_ms, local_best_ms = (min(one.in_blocks_best_ms for one in side) for side in (rounds, local))
        outside_best_ms = (best_ms - local_best_ms) / num_hops
    return CaseFigures(
        case=case,
        num_hops=num_hops,
        wall_ms_per_token=median([one.wall_ms for one in rounds]),
        cpu_ms_per_token=median([one.cpu_ms for one in rounds]),
        client_cpu_ms_per_token=median([one.client_cpu_ms for one in rounds]),
        cpu_ratio_to_local=median([one.cpu_ms / base.cpu_ms for one, base in pairs]),
        wall_ratio_to_local=median([one.wall_ms / base.wall_ms for one, base in pairs]),
        wall_ms_in_blocks_per_token=median([one.in_blocks_ms for one in rounds]),
        wall_ms_outside_blocks_per_hop=outside_ms,
        wall_ms_outside_blocks_per_hop_best=outside_best_ms,
        is_same_tokens=all(one.token_ids == base.token_ids for one, base in pairs),
    )
