"""Random LoRA adapters of tiny models, made and applied by PEFT, whose results are the reference."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

__all__ = ["LINEARS", "peft_model", "save_raw_adapter", "save_tiny_adapter"]

LINEARS: dict[str, Sequence[str]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3": ("q_proj", "v_proj", "down_proj"),
    "gemma2": ("q_proj", "o_proj", "gate_proj"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt_neox": ("query_key_value", "dense", "dense_4h_to_h"),
    "qwen3_moe": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "deepseek_v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "bloom": ("query_key_value", "dense_h_to_4h"),
}
"""What an adapter of a family may adapt; the last two kinds have odd attention, or none that can share a batch."""


def save_tiny_adapter(model: PreTrainedModel, folder: Path, *, seed: int, **settings: Any) -> Any:
    """Write an adapter of `model` to `folder`, and return PEFT's own model with it, in eval mode.

    Both matrices are random, large enough to change every token. `settings` are those of a LoraConfig.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**({"r": 4, "lora_alpha": 8} | settings)))
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.15)
        adapted.save_pretrained(str(folder))
    return adapted.eval()


def peft_model(model: PreTrainedModel, folder: Path) -> Any:
    """`model` with the adapter in `folder`, as PEFT loads it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def save_raw_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter folder with exactly these tensors, under PEFT's prefix, and these settings over sound ones."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    return folder
