"""A server runs just the blocks a route asks of it, with the same numbers as if it held no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.datatypes import Span
from swarm.errors import BadInputError
from swarm.models import load_span, resolve_model
from swarm.models.narrowed import narrow
from tests.tiny_models import save_tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "gpt_oss"])
def test_parts_of_a_span_chain_to_the_whole(family: str, tmp_path: Path) -> None:
    """Overlapping servers are the normal case: routes join them at any block."""
    save_tiny_model(family, tmp_path)
    whole = load_span(resolve_model(str(tmp_path)), Span(start=0, end=6))
    hidden = torch.randn(1, 20, whole.hidden_size)
    positions = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        expected = whole(hidden, positions)
        parts = [narrow(whole, Span(start=start, end=end)) for start, end in ((0, 1), (1, 4), (4, 6))]
        caches = [part.new_cache() for part in parts]
        outputs = []
        for start, end in ((0, 9), (9, 10), (10, 20)):
            chunk = hidden[:, start:end]
            for part, cache in zip(parts, caches, strict=True):
                chunk = part(chunk, positions[:, start:end], cache=cache)
            outputs.append(chunk)
        assert torch.allclose(torch.cat(outputs, dim=1), expected, atol=1e-4)
        assert torch.equal(whole(hidden, positions), expected), "the whole span must not be changed by its parts"
        without_middle = parts[2](parts[0](hidden, positions), positions)
        assert not torch.allclose(without_middle, expected, atol=1e-2)


def test_a_part_outside_the_span_is_refused(tmp_path: Path) -> None:
    """A request for blocks that are not here must not run others instead."""
    save_tiny_model("llama", tmp_path)
    part = load_span(resolve_model(str(tmp_path)), Span(start=1, end=4))
    assert narrow(part, Span(start=1, end=4)) is part
    with pytest.raises(BadInputError, match="outside"):
        narrow(part, Span(start=0, end=2))
