"""Several models loaded at once in one process, as by a notebook and a server beside it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import PreTrainedModel

from swarm.datatypes import Span
from swarm.models import load_span, resolve_model
from tests.tiny_models import save_tiny_model


def test_loads_in_threads_leave_transformers_as_it_was(tmp_path: Path) -> None:
    """It patches its own classes while it loads; overlapping loads would lose the ties of weights for good."""
    save_tiny_model("gemma2", tmp_path)
    source = resolve_model(str(tmp_path))
    tie_weights = PreTrainedModel.tie_weights

    def load(index: int) -> None:
        load_span(source, Span(start=index % 2, end=2), dtype=torch.float32, device="cpu")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(load, range(16)))
    assert PreTrainedModel.tie_weights is tie_weights
