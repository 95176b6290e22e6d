"""Builds the client's part of a model: all of it except the blocks, which one remote layer stands for.

The model stays transformers' own class, so generation, embedding scales, final norm and logit
scales are its own code; only its stack of blocks becomes a stack of one module that sends hidden
states away and gets them back.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from swarm.datatypes import Span
from swarm.errors import UnsupportedModelError
from swarm.models.anatomy import Anatomy, cut_config, derive_class, dissect, put_stack
from swarm.models.checkpoint import block_of_tensor
from swarm.models.loading import load_model, model_class_of
from swarm.models.progress import ProgressReporter
from swarm.models.support import unsupported_reason

if TYPE_CHECKING:
    from swarm.models.source import ModelSource

__all__ = ["NO_MASK_ATTENTION", "RemoteLayerFactory", "load_client_parts"]

logger = logging.getLogger(__name__)

RemoteLayerFactory = Callable[[type[nn.Module], bool], nn.Module]
"""Called as (class of the first block, whether blocks return tuples); gives the remote layer."""

NO_MASK_ATTENTION = "swarm_remote"
"""Name of the client's attention in its config: one without a mask function, so no mask is built."""


def load_client_parts(
    source: ModelSource,
    *,
    make_layer: RemoteLayerFactory,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    auto_class: Any = AutoModelForCausalLM,
    report: ProgressReporter | None = None,
) -> PreTrainedModel:
    """Transformers' own model with one remote layer for its blocks; reads no tensor of any block.

    The remote layer is called as the model calls its blocks: hidden states [B, T, H] first, the
    rest as keywords (`position_ids` and `past_key_values` or `layer_past` in most families, but
    bloom gives no positions). `attention_mask` is None where the family uses transformers' mask
    functions. It answers hidden states of the same shape, in a tuple if it was told that blocks
    return tuples. Attributes that the decoder reads from blocks are answered by the first block.

    `config.num_hidden_layers` of the result is 1, as is the length of every per-block list; the
    real number is `source.num_blocks`.

    Args:
        source: from `resolve_model`.
        make_layer: gives the remote layer, see RemoteLayerFactory.
        auto_class: AutoModelForCausalLM, or another one such as AutoModelForSequenceClassification;
            weights of a head that the checkpoint does not have are then initialised at random.
        report: told about downloads and conversions.

    Raises: as `load_span`.
    """
    reason = unsupported_reason(source.config)
    if reason is not None:
        raise UnsupportedModelError(reason)
    config = copy.deepcopy(source.config)
    found: list[tuple[Anatomy, _StackStandIn]] = []

    def cut(model: PreTrainedModel) -> None:
        anatomy = dissect(model, model.config.get_text_config(decoder=True))
        stand_in = _StackStandIn(anatomy.stack[0])
        found.append((put_stack(anatomy, [stand_in]), stand_in))

    base_class = model_class_of(config, auto_class)
    head_may_be_new = auto_class is not AutoModelForCausalLM
    base_prefix = f"{base_class.base_model_prefix}."
    model = load_model(
        source,
        derive_class(base_class, cut),
        config,
        lambda name: block_of_tensor(name) is None,
        dtype=dtype,
        what="embeddings and head",
        may_lack=lambda name: head_may_be_new and not name.startswith(base_prefix),
        report=report,
    )
    anatomy, stand_in = found[-1]
    cut_config(model.config.get_text_config(decoder=True), Span(start=0, end=1))
    nn.Module.to(model, torch.device(device))
    model.eval()
    _adopt_generation_config(model, source)
    if type(model)._can_set_attn_implementation():
        for module_config in (model.config, model.config.get_text_config(decoder=True)):
            module_config._attn_implementation_internal = NO_MASK_ATTENTION
    stand_in.remote = make_layer(type(stand_in.original), _blocks_return_tuples(anatomy.decoder, model))
    return model


class _StackStandIn(nn.Module):
    """The only block of a client's model: calls the remote layer, and otherwise looks like block 0."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Not a submodule: it stays on the meta device and its weights are never read.
        self.__dict__["original"] = original
        self.remote: nn.Module = nn.Identity()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.remote(*args, **kwargs)


class _TensorReturningProbe(nn.Module):
    """Returns its input as it is, whatever else it is given."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def _blocks_return_tuples(decoder: nn.Module, model: PreTrainedModel) -> bool:
    """Whether the decoder takes the first element of what its blocks return.

    Found by trying, since annotations are wrong in several families: given a tensor instead of a
    tuple, such a decoder takes its first row, and loses the batch dimension.
    """
    stand_in = next(module for module in model.modules() if isinstance(module, _StackStandIn))
    stand_in.remote = _TensorReturningProbe()
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    ids = torch.zeros(2, 3, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        inputs = torch.zeros(2, 3, embedding(ids).shape[-1], dtype=model.dtype, device=model.device)
        position_ids = torch.arange(3, device=model.device).expand(2, 3)
        try:
            output = decoder(inputs_embeds=inputs, position_ids=position_ids, use_cache=False, return_dict=True)
        except (RuntimeError, IndexError, ValueError):
            return True
    return bool(output.last_hidden_state.ndim != 3)


def _adopt_generation_config(model: PreTrainedModel, source: ModelSource) -> None:
    """What `from_pretrained` with a folder would do: it is called with tensors here."""
    if not model.can_generate() or not (source.folder / "generation_config.json").is_file():
        return
    generating: Any = model
    generating.generation_config = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
