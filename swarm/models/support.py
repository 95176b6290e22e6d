"""Says which models would be served wrongly, and why, from their config alone."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig

from swarm.errors import UnsupportedModelError
from swarm.models.anatomy import describe_architecture
from swarm.models.loading import model_class_of
from swarm.models.span_cache import CACHEABLE_LAYER_TYPES

__all__ = ["layer_types_of", "unsupported_reason"]


def layer_types_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """The kind of attention of every block, as transformers names them ("full_attention", …)."""
    text_config: Any = config.get_text_config(decoder=True)
    layer_types = getattr(text_config, "layer_types", None) or getattr(text_config, "layers_block_type", None)
    if layer_types is not None:
        return tuple(layer_types)
    # The same guesses that transformers' own caches make for configs without the list.
    if getattr(text_config, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(text_config, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    else:
        kind = "full_attention"
    return (kind,) * int(text_config.num_hidden_layers)


def unsupported_reason(config: PreTrainedConfig) -> str | None:
    """Why this architecture can not be served in spans; None if nothing speaks against it.

    There is no list of architectures: these are features that spans can not carry. What passes
    here may still be refused by the self-test of a loaded span.
    """
    name = describe_architecture(config)
    text_config: Any = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder model; only decoder-only language models can be served"
    if not isinstance(getattr(text_config, "num_hidden_layers", None), int):
        return f"{name} does not say how many blocks it has (num_hidden_layers)"
    try:
        model_class = model_class_of(config, AutoModelForCausalLM)
    except UnsupportedModelError as error:
        return str(error)
    if getattr(text_config, "hidden_size_per_layer_input", None):
        return f"{name} feeds token ids into every block, which servers never see; it can not be served in spans"
    if getattr(text_config, "num_kv_shared_layers", None) or "reuse" in (
        getattr(text_config, "kv_sharing_modes", None) or ()
    ):
        return f"{name} shares keys and values between blocks, which a cut between servers would separate"
    if getattr(text_config, "is_causal", True) is False or getattr(text_config, "use_bidirectional_attention", None):
        return f"{name} attends to later tokens too, so it can not generate step by step"
    rewindable = CACHEABLE_LAYER_TYPES
    odd = sorted(set(layer_types_of(config)) - rewindable)
    if odd:
        return (
            f"{name} has blocks of type {', '.join(odd)}, whose state can not be rewound to an earlier position; "
            "such models are not supported yet"
        )
    if getattr(model_class, "_is_stateful", False):
        return (
            f"{name} keeps a recurrent state that can not be rewound to an earlier position; "
            "such models are not supported yet"
        )
    if "past_key_values" not in inspect.signature(model_class.forward).parameters:
        return f"{name} keeps no KV cache in transformers, so it can not generate step by step"
    return None
