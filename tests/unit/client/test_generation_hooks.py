"""What assisted generation is told of candidates that there is no room for."""

from __future__ import annotations

import torch

from swarm.client.generation_hooks import bounded_candidates


def candidates(input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.cat((input_ids, torch.tensor([[7, 8, 9]])), dim=1), torch.zeros(1, 3, 11)


def test_fewer_candidates_have_fewer_logits() -> None:
    """transformers compares each candidate with its own logits."""
    ids, logits = bounded_candidates(candidates, 100, lambda columns: 2, torch.tensor([[1, 2]]))
    assert ids.tolist() == [[1, 2, 7, 8]]
    assert logits is not None and logits.shape == (1, 2, 11)


def test_no_candidates_have_no_logits() -> None:
    """Of a tensor without columns transformers takes all columns, and fails when it samples."""
    ids, logits = bounded_candidates(candidates, 100, lambda columns: 0, torch.tensor([[1, 2]]))
    assert ids.tolist() == [[1, 2]]
    assert logits is None
