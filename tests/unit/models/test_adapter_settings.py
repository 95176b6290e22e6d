"""What of an adapter's config is understood, and what is refused by name."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest

from swarm.errors import ModelFilesError, UnsupportedModelError
from swarm.models.adapters.settings import LoraSettings, read_settings


def read(**config: Any) -> LoraSettings:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    return read_settings(json.dumps(settings).encode(), where="adapter_config.json")


def test_scale() -> None:
    """A wrong factor gives fluent text of another model: nothing but a comparison would show it."""
    assert read().scale_of("model.layers.0.mlp.up_proj", 4) == 2.0
    assert read(use_rslora=True).scale_of("model.layers.0.mlp.up_proj", 4) == 4.0
    assert read(rank_pattern={"up_proj": 16}).scale_of("model.layers.0.mlp.up_proj", 16) == 0.5
    assert read(use_rslora=True, lora_alpha=3).scale_of("x", 2) == pytest.approx(3 / math.sqrt(2))


def test_alpha_by_pattern() -> None:
    """As in PEFT: a pattern fits a whole name or its end after a dot, and the first that fits counts."""
    settings = read(alpha_pattern={r"layers\.[0-9]+\.self_attn.q_proj": 16, "q_proj": 32, "k_proj": 64})
    assert settings.scale_of("model.layers.11.self_attn.q_proj", 4) == 4.0
    assert settings.scale_of("model.layers.11.cross.q_proj", 4) == 8.0
    assert settings.scale_of("model.layers.0.self_attn.k_proj", 4) == 16.0
    assert settings.scale_of("model.layers.0.self_attn.fk_proj", 4) == 2.0


def test_target_modules() -> None:
    """A list is compared; a regular expression is somebody's program, and the tensors say it better."""
    assert read(target_modules=["q_proj"]).targets("model.layers.0.self_attn.q_proj")
    assert not read(target_modules=["q_proj"]).targets("model.layers.0.self_attn.fq_proj")
    assert read(target_modules=r"(a+)+$").targets("model.layers.0.self_attn.q_proj")
    assert read(target_modules="all-linear").targets("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "bias"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "experts"),
        ({"trainable_token_indices": [1, 2]}, "embeddings"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"some_later_trick": {"on": 1}}, "some_later_trick"),
    ],
)
def test_what_would_be_served_wrongly_is_refused(setting: dict[str, Any], complaint: str) -> None:
    """An adapter that is applied only in part answers nonsense; one that is refused can be trained again."""
    with pytest.raises(UnsupportedModelError, match=complaint):
        read(**setting)


def test_peft_defaults_are_understood() -> None:
    """Whatever today's PEFT writes for a plain LoRA must load, including the features it names and leaves off."""
    from peft import LoraConfig

    config: Any = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    settings = read_settings(json.dumps(written, default=str).encode(), where="adapter_config.json")
    assert (settings.rank, settings.alpha, settings.target_modules) == (16, 32.0, frozenset({"q_proj"}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"peft_type": "LORA", "r": 0}',
        b'{"peft_type": "LORA", "r": true}',
        b'{"peft_type": "LORA", "r": 99999999}',
        b'{"peft_type": "LORA", "lora_alpha": NaN}',
        b'{"peft_type": "LORA", "lora_alpha": 1e400}',
        b'{"peft_type": "LORA", "rank_pattern": {"q": "four"}}',
        b'{"peft_type": "LORA", "alpha_pattern": ["q"]}',
        b'{"peft_type": "LORA", "target_modules": [1]}',
        b" " * (2**20 + 1),
    ],
)
def test_damaged_configs(data: bytes) -> None:
    """A config comes from the network as often as not."""
    with pytest.raises(ModelFilesError, match=r"adapter_config\.json"):
        read_settings(data, where="adapter_config.json")


@pytest.mark.parametrize("pattern", ["(", "a)|(b", "(a+)+$", "(?:x*)*y", ".*.*.*.*.*q", "q" * 300, "(?i)q_proj"])
def test_patterns_that_could_take_forever(pattern: str) -> None:
    """A hostile pattern must not hang a server that loads the adapter, nor a broken one crash it."""
    started_s = time.monotonic()
    with pytest.raises(UnsupportedModelError, match="alpha_pattern"):
        read(alpha_pattern={pattern: 2}).scale_of("a" * 400, 2)
    assert time.monotonic() - started_s < 10
