"""How much worse a model predicts real text when its blocks' weights take few bits."""

from __future__ import annotations

import gzip
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from swarm.models import SpanModel
    from swarm.models.progress import ProgressReporter
    from swarm.models.source import ModelSource

__all__ = ["Quality", "compare_losses", "cut_windows", "measure_losses", "read_text"]

# Letters in shapes: W tokens of a window, V vocabulary.

_FIRST_SCORED = 1
"""The first token of a window has nothing before it."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of one precision on one text."""

    num_tokens: int
    """Predicted tokens."""
    perplexity: float
    perplexity_ratio: float
    """To that of fp32 blocks on the same tokens."""
    ratio_standard_error: float
    """From how much windows differ among themselves; 0 for fp32 itself."""


def read_text(path: Path | None) -> str:
    """Real text: a file (plain or .gz), or the language reference that comes with every Python.

    Raises:
        BadInputError: the file can not be read as UTF-8 text.
    """
    if path is None:
        return _python_reference()
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} can not be read as UTF-8 text: {error}") from error


def _python_reference() -> str:
    if importlib.util.find_spec("pydoc_data") is None:
        raise BadInputError("this Python comes without its language reference; give a text with --text")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cut_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, *, num_tokens: int, window_tokens: int
) -> list[torch.Tensor]:
    """Neighbouring windows [1, W] of the text's tokens, enough to predict `num_tokens`.

    Raises:
        BadInputError: the text is too short.
    """
    num_windows = math.ceil(num_tokens / (window_tokens - _FIRST_SCORED))
    # Texts are much longer than what is asked for, and tokenisers slow: eight characters a token are plenty.
    wanted: Any = tokenizer(text[: num_windows * window_tokens * 8], add_special_tokens=False, verbose=False)
    ids = torch.tensor(wanted["input_ids"], dtype=torch.long)
    if len(ids) < num_windows * window_tokens:
        raise BadInputError(
            f"the text has {len(ids)} tokens, and {num_windows * window_tokens} are wanted; "
            "give a longer one or lower --tokens"
        )
    return list(ids[: num_windows * window_tokens].view(num_windows, 1, window_tokens).unbind(0))


class _LocalBlocks(nn.Module):
    """Stands for the blocks of a client's model: runs a span of this process."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.__dict__["span"] = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        span: SpanModel = self.__dict__["span"]
        positions = torch.arange(hidden_states.shape[1], device=span.device).expand(hidden_states.shape[:2])
        hidden = span(hidden_states.to(span.dtype), positions).to(hidden_states.dtype)
        return (hidden,) if self.returns_tuple else hidden


@torch.inference_mode()
def measure_losses(
    source: ModelSource, spans: Mapping[str, SpanModel], windows: Sequence[torch.Tensor], report: ProgressReporter
) -> dict[str, list[float]]:
    """Mean loss (nats per token) of each window [1, W], for each of the named spans of all blocks."""
    from swarm.models import load_client_parts

    model: PreTrainedModel = load_client_parts(
        source, make_layer=lambda cls, returns_tuple: _LocalBlocks(returns_tuple), report=report
    )
    blocks = next(module for module in model.modules() if isinstance(module, _LocalBlocks))
    losses: dict[str, list[float]] = {name: [] for name in spans}
    report.start("reading text", len(windows) * len(spans), "windows")
    for ids in windows:
        for name, span in spans.items():
            blocks.__dict__["span"] = span
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            losses[name].append(float(nn.functional.cross_entropy(logits, ids[0, 1:])))
            report.advance(1)
    report.finish()
    return losses


def compare_losses(losses: Sequence[float], reference: Sequence[float], *, tokens_per_window: int) -> Quality:
    """Quality from the mean losses of equal windows under some precision and under fp32."""
    count = len(losses)
    differences = [ours - theirs for ours, theirs in zip(losses, reference, strict=True)]
    mean = sum(differences) / count
    variance = sum((value - mean) ** 2 for value in differences) / max(count - 1, 1)
    ratio = math.exp(mean)
    return Quality(
        num_tokens=count * tokens_per_window,
        perplexity=math.exp(sum(losses) / count),
        perplexity_ratio=ratio,
        ratio_standard_error=ratio * math.sqrt(variance / count),
    )
