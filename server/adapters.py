"""Loads the LoRA adapters that a server's operator offers beside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.datatypes import AdapterInfo

if TYPE_CHECKING:
    from swarm.models import SpanModel
    from swarm.models.adapters.source import AdapterSource
    from swarm.models.progress import ProgressReporter

__all__ = ["load_adapters", "open_adapters"]


def open_adapters(folders: Mapping[str, Path], *, report: ProgressReporter | None = None) -> list[AdapterSource]:
    """Find adapters, by name, and check their files; quick, so that mistakes are told before weights are read.

    Raises BadInputError, ModelNotFoundError, ModelFilesError or UnsupportedModelError, as `open_adapter`.
    """
    if not folders:
        return []
    from swarm.models.adapters.source import open_adapter

    return [open_adapter(name, folder, report=report) for name, folder in folders.items()]


def load_adapters(
    model: SpanModel, sources: Sequence[AdapterSource], *, num_blocks: int, report: ProgressReporter | None = None
) -> tuple[AdapterInfo, ...]:
    """Put adapters beside the blocks of a span; what sessions may choose then. Raises as `AdapterBank.add`."""
    if not sources:
        return ()
    from swarm.models.adapters.bank import AdapterBank

    bank = AdapterBank(model, num_blocks=num_blocks)
    if report is not None:
        report.start("Loading adapters", len(sources), "adapters")
    for source in sources:
        bank.add(source)
        if report is not None:
            report.advance(1)
    if report is not None:
        report.finish()
    return bank.adapters
