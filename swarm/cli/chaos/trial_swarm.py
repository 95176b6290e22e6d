"""A whole swarm to be harmed, together with the right tokens of what will be played on it."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swarm.cli.chaos.reference import Reference, compute_references
from swarm.cli.chaos.scripts import Script
from swarm.cli.chaos.swarm_under_test import ServersUnderTest
from swarm.cli.local_swarm import LocalSwarm
from swarm.datatypes import Span
from swarm.errors import BadInputError

if TYPE_CHECKING:
    from swarm.client.remote_model import SwarmModelForCausalLM
    from swarm.models import ModelSource
    from swarm.models.progress import ProgressReporter

__all__ = ["TrialSwarm", "open_trial_swarm"]

_SERVER_ARGUMENTS: Final = ("--kv-memory", "256MiB", "--drain-timeout", "30")


@dataclass(frozen=True, kw_only=True)
class TrialSwarm:
    """A swarm to be harmed, all servers online and unused, and a client that has joined it."""

    source: ModelSource
    servers: ServersUnderTest
    references: Mapping[str, Reference]
    deadline_s: float
    """How long a step of a client may take, recoveries included."""
    connect: Callable[[], SwarmModelForCausalLM]
    """Another client; close it."""


@contextlib.contextmanager
def open_trial_swarm(
    model_name: str,
    spans: Sequence[Span],
    *,
    scripts: Sequence[Script],
    deadline_s: float,
    with_proxies: bool,
    report: ProgressReporter,
    num_threads: int = 1,
    log_folder: Path | None = None,
) -> Iterator[TrialSwarm]:
    """Start everything; on leaving, every process has ended.

    Args:
        model_name: as `swarm serve` takes it.
        spans: of each server.
        scripts: whose right tokens will be needed.
        deadline_s: how long a step of a client may take, recoveries included.
        with_proxies: whether lines can be cut, delayed and silenced.
        report: of what takes long.
        num_threads: CPU threads of each process.
        log_folder: where servers log what they do; None: nowhere.

    Raises:
        BadInputError: blocks that nobody serves, or that the model does not have.
        FinalError: a server does not start.
    """
    import torch

    from swarm.client.remote_model import SwarmModelForCausalLM
    from swarm.models import load_tokenizer, resolve_model

    torch.set_num_threads(num_threads)
    source = resolve_model(model_name, report=report)
    covered = {block for span in spans for block in range(span.start, span.end)}
    if covered != set(range(source.num_blocks)):
        raise BadInputError(f"the servers must hold exactly blocks 0:{source.num_blocks} of {source.name} together")
    references = compute_references(source, load_tokenizer(source.name), scripts, report)
    gc.collect()
    if log_folder is not None:
        log_folder.mkdir(parents=True, exist_ok=True)
    report.start(f"Starting {len(spans)} servers", None, "")
    with (
        tempfile.TemporaryDirectory(prefix="swarm-chaos-") as folder,
        LocalSwarm(source.name, (), num_threads=num_threads) as swarm,
        ServersUnderTest(
            swarm,
            folder=Path(folder),
            with_proxies=with_proxies,
            arguments=_SERVER_ARGUMENTS,
            log_folder=log_folder,
        ) as servers,
    ):
        swarm.start()
        for span in spans:
            servers.add(span)
        servers.wait_until_online()
        for server in servers.servers:
            server.note_baseline()

        def connect() -> SwarmModelForCausalLM:
            return SwarmModelForCausalLM.from_pretrained(
                source.name, initial_peers=[swarm.address], request_timeout_s=deadline_s
            )

        yield TrialSwarm(source=source, servers=servers, references=references, deadline_s=deadline_s, connect=connect)
