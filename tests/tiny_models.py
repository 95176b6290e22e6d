"""Tiny random models of every family that must work, small enough to build inside a test.

Six blocks, fp32, a sliding window of 8 where the family has one, weights spread over several
safetensors shards, so that reading only some tensors can be told from reading all of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "NUM_BLOCKS", "VOCAB_SIZE", "build_tiny_config", "build_tiny_model", "save_tiny_model"]

NUM_BLOCKS = 6
VOCAB_SIZE = 128
HIDDEN_SIZE = 32
SLIDING_WINDOW = 8
MAX_POSITIONS = 512

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ALTERNATING_WINDOWS = ["sliding_attention", "full_attention"] * (NUM_BLOCKS // 2)


def _family(model_type: str, **settings: Any) -> Callable[[], PreTrainedConfig]:
    """A builder of `model_type`'s tiny config: common sizes, then `settings`; None drops a common one."""

    def build() -> PreTrainedConfig:
        merged = {key: value for key, value in {**_COMMON, **settings}.items() if value is not None}
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **merged)
        config.dtype = torch.float32
        return config

    return build


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _family("llama"),
    "mistral": _family("mistral", sliding_window=SLIDING_WINDOW),
    "qwen2": _family("qwen2", head_dim=None),
    "qwen3": _family("qwen3"),
    "qwen3_moe": _family(
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "mixtral": _family("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "gemma2": _family(
        "gemma2",
        sliding_window=SLIDING_WINDOW,
        query_pre_attn_scalar=8,
        layer_types=_ALTERNATING_WINDOWS,
        tie_word_embeddings=True,
    ),
    "gemma3_text": _family(
        "gemma3_text",
        sliding_window=SLIDING_WINDOW,
        query_pre_attn_scalar=8,
        layer_types=_ALTERNATING_WINDOWS,
        tie_word_embeddings=True,
    ),
    "phi3": _family("phi3", head_dim=None, sliding_window=SLIDING_WINDOW),
    "olmo2": _family("olmo2", head_dim=None),
    "olmoe": _family("olmoe", head_dim=None, num_experts=4, num_experts_per_tok=2, intermediate_size=16),
    "gpt_neox": _family("gpt_neox", head_dim=None, num_key_value_heads=None),
    "gpt_oss": _family(
        "gpt_oss",
        sliding_window=SLIDING_WINDOW,
        layer_types=_ALTERNATING_WINDOWS,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": MAX_POSITIONS // 32,
        },
    ),
    "deepseek_v3": _family(
        "deepseek_v3",
        head_dim=None,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "granite": _family(
        "granite",
        head_dim=None,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
    "starcoder2": _family("starcoder2", head_dim=None, sliding_window=SLIDING_WINDOW),
    "cohere2": _family(
        "cohere2",
        head_dim=None,
        sliding_window=SLIDING_WINDOW,
        layer_types=_ALTERNATING_WINDOWS,
        tie_word_embeddings=True,
    ),
    "glm4": _family("glm4"),
    "falcon": _family(
        "falcon",
        head_dim=None,
        intermediate_size=None,
        num_key_value_heads=None,
        num_kv_heads=2,
        new_decoder_architecture=True,
        tie_word_embeddings=True,
    ),
    "bloom": _family(
        "bloom",
        head_dim=None,
        intermediate_size=None,
        num_key_value_heads=None,
        max_position_embeddings=None,
        tie_word_embeddings=True,
    ),
}
"""Builders of tiny configs by transformers model type."""


def build_tiny_config(family: str) -> PreTrainedConfig:
    """The tiny config of a family named in FAMILIES."""
    return FAMILIES[family]()


def build_tiny_model(family: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A whole tiny causal LM, in eval mode, with weights that depend only on `seed`.

    Weights are larger than transformers' default so that every block visibly changes the result. `settings` replace
    those of the family's tiny config.
    """
    config = build_tiny_config(family)
    config.update(settings)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                # Variance-preserving matrices, a bit larger than that so that errors do not hide.
                torch.nn.init.normal_(parameter, std=1.2 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    return model


def save_tiny_model(
    family: str, folder: Path, *, seed: int = 0, num_shards: int = 3, **settings: Any
) -> PreTrainedModel:
    """Write a tiny model to `folder` as config and about `num_shards` safetensors shards, and return it.

    Shards never fall below one tensor, so very large `num_shards` give fewer files.
    """
    model = build_tiny_model(family, seed=seed, **settings)
    size_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size=max(1, math.ceil(size_bytes / num_shards * 1.02)))
    return model
