"""Models that spans can not carry are refused by name and reason, from their config alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from swarm.datatypes import Span
from swarm.errors import UnsupportedModelError
from swarm.models.source import resolve_model
from swarm.models.span import load_span
from swarm.models.support import layer_types_of, unsupported_reason
from tests.tiny_models import FAMILIES, build_tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_must_work_are_not_refused(family: str) -> None:
    """A refusal that is too broad would be as bad as none."""
    config = build_tiny_config(family)
    assert unsupported_reason(config) is None
    assert len(layer_types_of(config)) == 6


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("t5", {}, "encoder-decoder"),
        ("gemma3n_text", {}, "token ids into every block|shares keys and values"),
        ("mamba", {}, "can not be rewound"),
        ("qwen3_next", {}, "linear_attention.*can not be rewound"),
        ("rwkv", {}, "can not be rewound"),
        ("openai-gpt", {}, "no KV cache"),
        ("vit", {}, "no text generation model|how many blocks"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "later tokens"),
    ],
)
def test_others_are_refused_with_name_and_reason(model_type: str, settings: dict[str, Any], reason: str) -> None:
    """The operator learns what the obstacle is, before gigabytes are fetched."""
    sentence = unsupported_reason(AutoConfig.for_model(model_type, **settings))
    assert sentence is not None
    assert sentence.startswith(model_type)
    assert re.search(reason, sentence), sentence


def test_loading_a_refused_model_raises_the_reason(tmp_path: Path) -> None:
    """The refusal stands before any tensor is read: there are no weights here at all."""
    AutoConfig.for_model("mamba").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    source = resolve_model(str(tmp_path), cache_dir=tmp_path / "cache")
    with pytest.raises(UnsupportedModelError, match=r"mamba .* can not be rewound"):
        load_span(source, Span(start=0, end=1))
