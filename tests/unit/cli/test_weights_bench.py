"""How the weights benchmark turns losses into a ratio that can be trusted."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest

from swarm.cli.bench.weights_quality import compare_losses, cut_windows, read_text
from swarm.errors import BadInputError
from tests.tiny_tokenizer import save_tiny_tokenizer


def test_ratios_come_from_the_same_windows() -> None:
    """Windows differ far more among themselves than precisions do: only differences within a window tell."""
    reference = [1.0, 3.0, 5.0, 2.0]
    quality = compare_losses([loss + 0.05 for loss in reference], reference, tokens_per_window=511)
    assert quality.num_tokens == 4 * 511
    assert quality.perplexity_ratio == pytest.approx(math.exp(0.05))
    assert quality.ratio_standard_error == pytest.approx(0.0, abs=1e-9)
    uneven = compare_losses([1.1, 3.0, 5.0, 2.0], reference, tokens_per_window=511)
    assert uneven.ratio_standard_error == pytest.approx(math.exp(0.025) * 0.025)


def test_text_comes_with_python_or_from_a_file(tmp_path: Path) -> None:
    """The default needs no download; a file of one's own may be packed."""
    assert len(read_text(None)) > 200_000
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"packed words"))
    assert read_text(tmp_path / "a.txt") == "some words"
    assert read_text(tmp_path / "b.gz") == "packed words"
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xfa")
    for name in ("bad", "missing"):
        with pytest.raises(BadInputError, match=name):
            read_text(tmp_path / name)


def test_a_text_that_is_too_short_is_said(tmp_path: Path) -> None:
    """A figure from fewer tokens than asked for would pass for a better one."""
    tokenizer = save_tiny_tokenizer(tmp_path)
    with pytest.raises(BadInputError, match="--tokens"):
        cut_windows(tokenizer, "a few words", num_tokens=1000, window_tokens=100)
    windows = cut_windows(tokenizer, "a few words " * 500, num_tokens=300, window_tokens=100)
    assert len(windows) == 4
    assert all(window.shape == (1, 100) for window in windows)
