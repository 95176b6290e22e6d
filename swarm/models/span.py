"""Builds any span of any causal LM from transformers' own classes, reading only its tensors.

Idea: let the model's own decoder run, because it knows its masks, rotary embeddings and windows,
but cut it to the blocks of the span and swap the hidden states at both ends. The decoder is called
with a dummy `inputs_embeds`; a hook gives the first block the received hidden states instead, and
another takes the last block's output, so whatever the decoder does before and after its blocks
(embedding scales, final norm) has no effect.

Letters in shapes: B batch, T new tokens, P positions in the cache before this call, H hidden size.
"""

from __future__ import annotations

import inspect
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from swarm.datatypes import Span
from swarm.errors import BadInputError, UnsupportedModelError
from swarm.models.anatomy import Anatomy, DummyInput, cut_config, describe_architecture
from swarm.models.progress import ProgressReporter
from swarm.models.span_cache import SpanCache
from swarm.models.streaming import OnBlock, load_blocks
from swarm.models.support import layer_types_of, unsupported_reason
from swarm.weights.accounting import WeightAccount, count_weights
from swarm.weights.choice import format_for, hidden_dtype_for
from swarm.weights.precision import Precision

if TYPE_CHECKING:
    from swarm.models.source import ModelSource
    from swarm.weights.disk_cache import WeightCache
    from swarm.weights.formats import WeightFormat

__all__ = ["SpanModel", "default_weight_cache", "load_span"]

logger = logging.getLogger(__name__)

_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class SpanModel(nn.Module):
    """Blocks [a, b) of a model, as one module from hidden states to hidden states.

    In eval mode, without gradients for its parameters, differentiable with respect to its input.
    Calls from several threads wait for each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        *,
        span: Span,
        layer_types: tuple[str, ...],
        dtype: torch.dtype | None = None,
        weight_format: WeightFormat | None = None,
    ) -> None:
        """Not for callers; use `load_span`. `dtype` None takes that of the model's first parameter."""
        super().__init__()
        self.model = model
        self.span = span
        self.dtype = model.dtype if dtype is None else dtype
        """Of hidden states, and of all weights that are not in few bits."""
        self.weight_format = weight_format
        """How large matrices are stored; None where they are floats of `dtype`."""
        self.layer_types = layer_types
        """The kind of attention of each block of the span ("full_attention", "sliding_attention", …)."""
        # Outside the module registry: these are parts of self.model.
        self.__dict__["_decoder"] = anatomy.decoder
        self.__dict__["_blocks"] = anatomy.stack
        self.__dict__["_stack_place"] = (anatomy.stack_owner._modules, anatomy.stack_name)
        parameters = inspect.signature(anatomy.decoder.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._dummy_input = DummyInput()
        self._lock = threading.Lock()
        self.hidden_in: torch.Tensor | None = None
        """Input of the call under way, for what stands in the place of a block."""
        self.hidden_out: torch.Tensor | None = None
        """Output of the call under way, once the last block has run."""
        self.output_arity = 0
        """How many values a block returns as a tuple; 0 when it returns the bare tensor. Known after a call."""
        anatomy.stack[0].register_forward_pre_hook(self._feed_first_block, with_kwargs=True)
        anatomy.stack[-1].register_forward_hook(self._take_last_output)

    def __repr__(self) -> str:
        return f"<SpanModel {self.architecture} blocks {self.span} {self.dtype} on {self.device}>"

    @property
    def config(self) -> PreTrainedConfig:
        """The config of this span: like the model's, but `num_hidden_layers` is the span's length."""
        config: PreTrainedConfig = self.model.config.get_text_config(decoder=True)
        return config

    @property
    def architecture(self) -> str:
        """Transformers' name of the model type, for people."""
        return describe_architecture(self.model.config)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of blocks in the span."""
        return len(self.span)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks themselves; modules inside with a `layer_idx` count from 0 at the span's start."""
        blocks: nn.ModuleList = self.__dict__["_blocks"]
        return blocks

    @property
    def precision(self) -> Precision | None:
        """What is announced of the weights; None for floats that have no name there (fp16, fp64)."""
        if self.weight_format is not None:
            return self.weight_format.precision
        return {torch.float32: Precision.FP32, torch.bfloat16: Precision.BF16}.get(self.dtype)

    @property
    def tolerance(self) -> float:
        """How far two ways to compute the same hidden states may differ, relative to their size."""
        if self.weight_format is not None:  # products round their inputs and outputs to 16 bit
            return _TOLERANCES[torch.bfloat16]
        return _TOLERANCES.get(self.dtype, _TOLERANCES[torch.bfloat16])

    @property
    def device(self) -> torch.device:
        return self.model.device

    def count_weights(self) -> WeightAccount:
        """How many weights the blocks have, and how many bytes they take."""
        return count_weights(self.blocks)

    @property
    def attention(self) -> str:
        """Name of the attention function in use ("sdpa", "eager", or one registered with transformers)."""
        return str(self.config._attn_implementation)

    @property
    def supports_custom_attention(self) -> bool:
        """Whether blocks call whatever function is registered under `attention` with AttentionInterface.

        Families with attention code of their own (falcon, bloom, …) do not: they only run with a
        SpanCache, one session at a time.
        """
        return bool(type(self.model)._can_set_attn_implementation())

    def set_attention(self, name: str) -> None:
        """Change the attention function: "sdpa", "eager", or a name registered with AttentionInterface.

        Under a name that has no mask function registered beside it, no mask is built at all.

        Raises:
            UnsupportedModelError: the family does not let its attention be replaced, or not by this.
        """
        if name == self.attention:
            return
        if not self.supports_custom_attention:
            raise UnsupportedModelError(
                f"{self.architecture} has attention code of its own, so its attention stays {self.attention}"
            )
        try:
            self.model.set_attn_implementation(name)
        except ValueError as error:
            raise UnsupportedModelError(f"{self.architecture} does not run with the attention {name}") from error

    def new_cache(self) -> SpanCache:
        """An empty cache for one call sequence."""
        return SpanCache(self.layer_types)

    def forward(
        self,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        *,
        cache: SpanCache | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the span's blocks.

        Args:
            hidden: [B, T, H], in the span's dtype and on its device.
            position_ids: [B, T] int64, absolute positions. With a cache and no padding they continue
                it: P, P + 1, … Families that take no positions (bloom) count from the cache instead.
            cache: from `new_cache`; extended by T positions. None runs the T tokens by themselves.
            attention_mask: [B, P + T], 1 for tokens and 0 for padding; None if there is no padding.

        Returns:
            [B, T, H], same dtype and device.
        """
        return self.forward_through(self.blocks, hidden, position_ids, cache=cache, attention_mask=attention_mask)

    def forward_through(
        self,
        stack: nn.ModuleList,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        *,
        cache: SpanCache | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `forward`, with `stack` in the place of the span's blocks (see `narrowed`)."""
        arguments: dict[str, Any] = {"past_key_values": cache.kv} if cache is not None else {}
        if self._takes_positions:
            arguments["position_ids"] = position_ids
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        owner, name = self.__dict__["_stack_place"]
        with self._lock:
            self.hidden_in = hidden
            owner[name] = stack
            try:
                self.__dict__["_decoder"](
                    inputs_embeds=self._dummy_input(hidden),
                    use_cache=cache is not None,
                    **arguments,
                )
                output = self.hidden_out
            finally:
                self.hidden_in = self.hidden_out = None
                owner[name] = self.blocks
        assert output is not None, "the decoder did not run its last block"
        return output

    def _feed_first_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.hidden_in is None:  # someone calls a block by itself
            return None
        if args:
            return (self.hidden_in, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.hidden_in}

    def _take_last_output(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.hidden_out = output[0] if isinstance(output, tuple) else output
        self.output_arity = len(output) if isinstance(output, tuple) else 0


def load_span(
    source: ModelSource,
    span: Span,
    *,
    weights: Precision | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    weight_cache: WeightCache | None = None,
    double_quantised: bool = False,
    on_block: OnBlock | None = None,
    report: ProgressReporter | None = None,
) -> SpanModel:
    """Build blocks [a, b) of a model, fetching and reading only their tensors, a few blocks at a time.

    Takes no more memory than the result, the largest block, and half a GiB.

    Args:
        source: from `resolve_model`.
        span: within [0, source.num_blocks).
        weights: how precisely large matrices are kept; None keeps them as floats of `dtype`.
        dtype: of hidden states and of weights that are not in few bits. None takes fp32, or what suits
            `weights` and the device.
        attention: name of the attention function; None takes the best one that the family supports.
        weight_cache: where blocks in few bits are kept for the next start; None keeps none.
        double_quantised: quantise NF4's scales too (on CUDA).
        on_block: may move a block's weights elsewhere as soon as they are there (see swarm.models.offload).
        report: told about downloads, conversions and loading.

    Raises:
        BadInputError: `span` reaches outside the model.
        UnsupportedModelError: the architecture would be run wrongly; the message names it and says why.
        ModelFilesError: files are missing or damaged, or lack tensors of these blocks.
        DownloadError: files could not be fetched.
        MissingDependencyError: `weights` need a package on this device that is not installed.
    """
    if span.end > source.num_blocks:
        raise BadInputError(f"blocks {span} are outside {source.name}, which has blocks 0:{source.num_blocks}")
    reason = unsupported_reason(source.config)
    if reason is not None:
        raise UnsupportedModelError(reason)
    weight_format = None
    if weights is not None:
        weight_format = format_for(weights, device, double_quantised=double_quantised)
        dtype = dtype or hidden_dtype_for(weights, device)
    dtype = dtype or torch.float32

    layer_types = layer_types_of(source.config)[span.start : span.end]
    model, anatomy = load_blocks(
        source,
        span,
        dtype=dtype,
        device=torch.device(device),
        weight_format=weight_format,
        weight_cache=weight_cache,
        on_block=on_block,
        report=report,
    )
    cut_config(model.config.get_text_config(decoder=True), span)
    loaded = SpanModel(model, anatomy, span=span, layer_types=layer_types, dtype=dtype, weight_format=weight_format)
    loaded.eval()
    if attention is not None:
        loaded.set_attention(attention)
    return loaded


def default_weight_cache(cache_dir: Path | None = None, *, max_bytes: int | None = None) -> WeightCache:
    """Where blocks in few bits are kept between starts: beside the converted models, see `default_cache_dir`.

    Args:
        max_bytes: None allows a fifth of the disk's free space, 0 keeps nothing.
    """
    from swarm.models.source import default_cache_dir
    from swarm.weights.disk_cache import WeightCache

    return WeightCache((cache_dir or default_cache_dir()) / "weights", max_bytes=max_bytes)
