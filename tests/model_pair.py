"""The same tiny model twice, and prompts to compare them on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swarm.models import ModelSource
from tests.local_blocks import LocalBlocks

__all__ = ["GREEDY", "LENGTHS", "Pair", "padded_batch", "prompt"]

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
LENGTHS = (12, 9, 5, 3)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One model, twice."""

    folder: Path
    """Where it is saved."""
    source: ModelSource
    local: Any
    """Transformers' own model, whole."""
    remote: Any
    """Ours over `blocks`."""
    blocks: LocalBlocks
    """Fresh ones per test, so that they record only that test's steps."""

    def generate(self, *args: Any, seed: int | None = None, **kwargs: Any) -> torch.Tensor:
        """Generate locally and remotely, demand the same ids, and return them."""
        results = []
        for model in (self.local, self.remote):
            if seed is not None:
                torch.manual_seed(seed)
            results.append(model.generate(*args, **kwargs))
        assert torch.equal(results[0], results[1])
        result: torch.Tensor = results[1]
        return result


def prompt(length: int = 12, *, seed: int = 1) -> torch.Tensor:
    """[1, length] token ids that depend only on `seed`."""
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of the four LENGTHS, row n of seed n, padded on the left, and their mask."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        ids[row, -length:] = prompt(length, seed=row)[0]
    return ids, (ids != 0).long()
