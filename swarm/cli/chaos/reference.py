"""The tokens that plain transformers gives for the scripts: what every session must get, whatever happens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarm.cli.chaos.scripts import Script
    from swarm.models import ModelSource
    from swarm.models.progress import ProgressReporter

__all__ = ["GREEDY", "Part", "Reference", "compute_references"]

GREEDY: Mapping[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
"""An end token would end some sessions early; here all are as long as they say."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one turn adds to a history."""

    start: int
    """Position from which it continues, after what was taken back."""
    text_ids: Sequence[int]
    new_ids: Sequence[int]
    """The right answer."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The right course of one script."""

    parts: Sequence[Part]
    min_margin: float
    """Least difference of the two best logits over all tokens: how far rounding is from changing an answer. Infinite
    for beams, where it is not looked at."""

    @property
    def max_length(self) -> int:
        return max(part.start + len(part.text_ids) + len(part.new_ids) for part in self.parts)


def compute_references(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, scripts: Sequence[Script], report: ProgressReporter
) -> dict[str, Reference]:
    """By the scripts' names; the model is loaded whole, in fp32, in this process, and is gone afterwards."""
    import torch
    from transformers import AutoModelForCausalLM

    report.start("Running the scripts with plain transformers", len(scripts), "scripts")
    source.ensure_tensors()
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, local_files_only=True)
    references: dict[str, Reference] = {}
    for script in scripts:
        references[script.name] = _run(model, tokenizer, script)
        report.advance(1)
    report.finish()
    return references


def _run(model: Any, tokenizer: PreTrainedTokenizerBase, script: Script) -> Reference:
    import torch

    history: list[int] = []
    parts: list[Part] = []
    margins: list[float] = []
    for turn in script.turns:
        start = len(history) - turn.num_taken_back
        text_ids = _encode(tokenizer, turn.text, is_first=not history)
        history = [*history[:start], *text_ids]
        input_ids = torch.tensor([history])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' remarks on generation settings are not ours
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=turn.num_new_tokens,
                num_beams=script.num_beams,
                return_dict_in_generate=True,
                output_logits=script.num_beams == 1,
                **GREEDY,
            )
        new_ids: list[int] = output.sequences[0, len(history) :].tolist()
        if script.num_beams == 1:
            best = torch.cat(output.logits).topk(2).values
            margins.append(float((best[:, 0] - best[:, 1]).min()))
        history = [*history, *new_ids]
        parts.append(Part(start=start, text_ids=text_ids, new_ids=new_ids))
    return Reference(parts=parts, min_margin=min(margins, default=float("inf")))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, is_first: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=is_first)["input_ids"]
    return [int(token_id) for token_id in ids]
