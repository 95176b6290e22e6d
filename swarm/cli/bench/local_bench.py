"""What benchmarks of a whole local swarm share: starting it, one client process, the report's frame."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from swarm.cli.local_swarm import LocalServer, LocalSwarm, split_blocks

if TYPE_CHECKING:
    from swarm.client.remote_model import SwarmModelForCausalLM
    from swarm.models.progress import ProgressReporter

__all__ = ["BenchSwarm", "limit_threads", "open_bench_swarm", "report_to_json", "to_result"]

_STEP_DEADLINE_S: Final = 1800.0
"""A long prompt beside others takes minutes on one thread, and is to be measured, not given up."""


def limit_threads(num_threads: int) -> None:
    """Before torch is imported: threads that wait for work would count as CPU time."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)


@dataclass(frozen=True, kw_only=True)
class BenchSwarm:
    """A swarm that runs, and a client that has joined it."""

    servers: Sequence[LocalServer]
    model: SwarmModelForCausalLM

    @property
    def vocab_size(self) -> int:
        config: Any = self.model.config
        return int(config.get_text_config(decoder=True).vocab_size)


@contextlib.contextmanager
def open_bench_swarm(
    model_name: str, *, num_servers: int, num_threads: int, report: ProgressReporter
) -> Iterator[BenchSwarm]:
    """Servers that split the model evenly, each in a process of its own, and a client here.

    Raises:
        BadInputError: more servers than blocks.
        FinalError: a server does not start.
    """
    import torch

    from swarm.client.remote_model import SwarmModelForCausalLM
    from swarm.models import resolve_model

    torch.set_num_threads(num_threads)
    source = resolve_model(model_name, report=report)
    spans = split_blocks(source.num_blocks, num_servers)
    report.start("Starting servers", None, "")
    with LocalSwarm(source.name, spans, num_threads=num_threads) as swarm:
        swarm.start()
        servers = swarm.wait_until_online()
        # A server answers the look-ups, so no DHT daemon of the client's own runs beside it.
        with SwarmModelForCausalLM.from_pretrained(
            source.name, initial_peers=[servers[0].grpc_address], request_timeout_s=_STEP_DEADLINE_S
        ) as model:
            yield BenchSwarm(servers=servers, model=model)


def to_result(figures: Any) -> dict[str, Any]:
    """A dataclass of figures as an entry of `results`."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(figures).items()}


def report_to_json(bench: str, *, settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The object that `swarm bench NAME --json` prints."""
    from swarm.cli.machine import hardware_to_json, versions_to_json

    return {
        "bench": bench,
        "hardware": hardware_to_json(),
        "versions": versions_to_json(),
        "command": " ".join(["swarm", *sys.argv[1:]]),
        "settings": dict(settings),
        "results": [dict(result) for result in results],
    }
