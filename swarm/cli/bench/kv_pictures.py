"""Draws the pictures of docs/kv-cache.md from measured figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from swarm.errors import MissingDependencyError

if TYPE_CHECKING:
    from swarm.cli.bench.kv_figures import KVFigures
    from swarm.kvpolicy.budget import BudgetCurve

__all__ = ["draw_pictures"]

_OURS: Final = ("pyramid", "gear", "gear-2bit", "pyramid+gear", "smallest", "twentieth")


def draw_pictures(folder: Path, figures: Sequence[KVFigures], curve: BudgetCurve | None) -> list[Path]:
    """SVG files in `folder`: divergence against the ratio, and budgets by layer and head where there is a curve.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("--plot needs matplotlib; pip install matplotlib") from error
    # The same figures give the same bytes, so that a new picture means new figures.
    mpl.rcParams["svg.hashsalt"] = "swarm"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "kv-quality.svg"]
    _draw_quality(Figure(figsize=(7, 4), layout="constrained"), paths[0], figures)
    if curve is not None:
        paths.append(folder / "kv-budgets.svg")
        _draw_budgets(Figure(figsize=(7, 2.6), layout="constrained"), paths[1], curve)
    return paths


def _draw_quality(figure: Any, path: Path, figures: Sequence[KVFigures]) -> None:
    axes = figure.subplots()
    for place, each in enumerate(sorted(figures, key=lambda each: (each.times_smaller, each.mean_kl_nats))):
        height = max(each.mean_kl_nats, 1e-5)
        # Labels above and below in turns, as neighbours are often close.
        is_above = place % 2 == 0
        color = "tab:gray" if "random" in each.policy else "tab:blue" if each.policy in _OURS else "tab:orange"
        axes.errorbar([each.times_smaller], [height], yerr=[each.mean_kl_nats_error], fmt="o", capsize=3, color=color)
        axes.annotate(
            each.policy,
            (each.times_smaller, height),
            (5, 4 if is_above else -10),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.set_xlabel(f"times smaller than a 16-bit full cache, {figures[0].context_tokens} tokens")
    axes.set_ylabel("KL(full || compressed), nats a token")
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def _draw_budgets(figure: Any, path: Path, curve: BudgetCurve) -> None:
    axes = figure.subplots()
    ratio = 0.25
    num_heads = len(curve.shares[0])
    shares = [[curve.share(layer, head, ratio) for layer in range(curve.num_layers)] for head in range(num_heads)]
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.set_yticks(range(num_heads))
    axes.set_title(f"share of its tokens that a head keeps where the model keeps {ratio:.0%}", fontsize=10)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, metadata={"Date": None})
