"""Finds the stack of blocks inside transformers' own model classes, and cuts it to size.

Nothing here knows an architecture. The stack is the outermost module list that is as long as the
config says there are blocks; the decoder is the nearest module around it whose forward takes
`inputs_embeds`. Models are cut while they are still on the meta device, before any weight is read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from swarm.datatypes import Span
from swarm.errors import UnsupportedModelError

__all__ = [
    "Anatomy",
    "BlockStack",
    "DummyInput",
    "cut_config",
    "derive_class",
    "describe_architecture",
    "dissect",
    "keep_span",
    "poisoned",
    "put_stack",
]

_BLOCK_NUMBER_NAMES = ("layer_idx", "layer_id")
"""What modules inside blocks call the number of their block."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where the blocks sit in one model."""

    decoder: nn.Module
    """Runs the stack: prepares masks and rotary embeddings and calls one block after the other."""
    stack_owner: nn.Module
    """Holds the stack as one of its attributes; the decoder itself or a module inside it."""
    stack_name: str
    """Name of that attribute."""
    stack: nn.ModuleList
    """The blocks."""


class BlockStack(nn.ModuleList):
    """Blocks that are always wanted whole.

    Decoders loop over `layers[:num_hidden_layers]`. A plain ModuleList answers that by building a
    new ModuleList, at every token; this one answers with itself.
    """

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self
        return super().__getitem__(index)


def describe_architecture(config: PreTrainedConfig) -> str:
    """The name people know a model type by, for messages."""
    return str(getattr(config, "model_type", "") or type(config).__name__)


def dissect(model: PreTrainedModel, config: PreTrainedConfig) -> Anatomy:
    """Find the blocks of `model`.

    Raises:
        UnsupportedModelError: no module list has as many entries as `config` (the text part of the
            model's config) states blocks, or nothing around it takes `inputs_embeds`.
    """
    num_blocks = config.num_hidden_layers
    decoder = model.get_decoder()
    root = decoder if isinstance(decoder, nn.Module) else model
    found = next(_module_lists_of_length(root, num_blocks), None)
    if found is None:
        raise UnsupportedModelError(
            f"{describe_architecture(config)} has no list of {num_blocks} blocks, as its config promises, "
            "so it can not be cut into spans"
        )
    ancestors, name, stack = found
    for ancestor in reversed(ancestors):
        if "inputs_embeds" in inspect.signature(ancestor.forward).parameters:
            return Anatomy(decoder=ancestor, stack_owner=ancestors[-1], stack_name=name, stack=stack)
    raise UnsupportedModelError(
        f"{describe_architecture(config)} can not be run from hidden states (its decoder takes no inputs_embeds)"
    )


def _module_lists_of_length(root: nn.Module, length: int) -> Iterator[tuple[list[nn.Module], str, nn.ModuleList]]:
    """(ancestors from root down, attribute name, list) of every fitting module list, outermost first."""
    level: list[list[nn.Module]] = [[root]]
    while level:
        next_level: list[list[nn.Module]] = []
        for ancestors in level:
            for name, child in ancestors[-1].named_children():
                if isinstance(child, nn.ModuleList) and len(child) == length:
                    yield ancestors, name, child
                next_level.append([*ancestors, child])
        level = next_level


def put_stack(anatomy: Anatomy, blocks: list[nn.Module]) -> Anatomy:
    """Put `blocks` in the place of the stack."""
    stack = BlockStack(blocks)
    setattr(anatomy.stack_owner, anatomy.stack_name, stack)
    return replace(anatomy, stack=stack)


def cut_config(config: PreTrainedConfig, span: Span) -> None:
    """Make the config of a loaded model tell of the blocks of `span` only.

    Decoders look up per-block settings in the config (`config.layer_types[i]`), so everything that
    lists one value per block is cut. Not before loading: buffers are computed from the whole list.
    """
    num_blocks = config.num_hidden_layers
    overridden: dict[str, Any] = {}
    for name, value in _per_block_lists(config, num_blocks):
        cut = value[span.start : span.end]
        if isinstance(getattr(type(config), name, None), property):
            overridden[name] = cut
        else:
            setattr(config, name, cut)
    if overridden:
        # A property would compute its list again, for blocks [0, n).
        config.__class__ = type(type(config).__name__, (type(config),), overridden)
    config.num_hidden_layers = len(span)


def _per_block_lists(config: PreTrainedConfig, num_blocks: int) -> Iterator[tuple[str, list[Any] | tuple[Any, ...]]]:
    names = {name for name in vars(config) if not name.startswith("_")}
    properties = {name for name, _ in inspect.getmembers(type(config), lambda member: isinstance(member, property))}
    # Properties that every config has are about other things, and some warn when they are read.
    for name in sorted(names | (properties - set(dir(PreTrainedConfig)))):
        # Lists of token ids may happen to be as long as the stack.
        if "token" in name or name == "architectures":
            continue
        try:
            value = getattr(config, name)
        except Exception:  # a property of a foreign class that does not apply here
            continue
        if isinstance(value, list | tuple) and len(value) == num_blocks:
            yield name, value


def keep_span(model: PreTrainedModel, config: PreTrainedConfig, span: Span) -> Anatomy:
    """Cut `model` (on the meta device) to the blocks of `span`, numbered from 0.

    Every module with weights outside the stack gives way to one without: embeddings answer zeros,
    everything else hands its input on. The config stays whole, see `cut_config`.
    """
    anatomy = dissect(model, config)
    blocks = list(anatomy.stack)[span.start : span.end]
    for index, block in enumerate(blocks, start=span.start):
        modules: list[Any] = list(block.modules())
        for module in modules:
            # Block 7 of the model is the first to use the cache of a span that starts at 7.
            for name in _BLOCK_NUMBER_NAMES:
                if getattr(module, name, None) == index:
                    setattr(module, name, index - span.start)
    _empty_outside(model, anatomy.stack)
    # Nothing is left that could be tied.
    model.all_tied_weights_keys = {}
    return put_stack(anatomy, blocks)


def _empty_outside(module: nn.Module, stack: nn.ModuleList) -> None:
    for name, child in list(module.named_children()):
        if child is stack:
            continue
        if any(descendant is stack for descendant in child.modules()):
            _empty_outside(child, stack)
        elif isinstance(child, nn.Embedding):
            setattr(module, name, _ZeroEmbedding(child.embedding_dim, child.weight.dtype))
        elif next(child.parameters(), None) is not None:
            setattr(module, name, _PassThrough())


class _StandIn(nn.Module):
    """Stands where weights are missing; its answers must never matter."""

    is_poisoned = False


class _ZeroEmbedding(_StandIn):
    """Answers zeros that fit beside anything: what a block receives comes from elsewhere."""

    def __init__(self, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.dtype = dtype

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # One position only: some position embeddings are asked with a mask that is longer than the input.
        fill = math.nan if self.is_poisoned else 0.0
        return torch.full((1, 1, self.embedding_dim), fill, device=ids.device, dtype=self.dtype)


class _PassThrough(_StandIn):
    """Hands its first argument on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = args[0] if args else next(iter(kwargs.values()))
        if self.is_poisoned and isinstance(value, torch.Tensor) and value.is_floating_point():
            return torch.full_like(value, math.nan)
        return value


@contextmanager
def poisoned(model: nn.Module) -> Iterator[None]:
    """Let everything that stands for missing weights, and the dummy input, be NaN instead of zero."""
    stand_ins = [module for module in model.modules() if isinstance(module, _StandIn)]
    for stand_in in stand_ins:
        stand_in.is_poisoned = True
    try:
        yield
    finally:
        for stand_in in stand_ins:
            stand_in.is_poisoned = False


class DummyInput(_StandIn):
    """Makes the `inputs_embeds` of a decoder whose blocks get their input from elsewhere."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # Memory of its own, because some decoders scale what they are given in place.
        return torch.full_like(hidden, math.nan if self.is_poisoned else 0.0, requires_grad=False)


def derive_class(base: type[PreTrainedModel], alter: Callable[[PreTrainedModel], None]) -> type[PreTrainedModel]:
    """A subclass of `base` that calls `alter(model)` at the end of its constructor.

    `from_pretrained` builds models on the meta device and then reads what the model still has; a
    model altered in its constructor is therefore the way to read a part of a checkpoint.
    """

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        base.__init__(self, config, *args, **kwargs)
        alter(self)

    # transformers finds features of a class by its module's source and picks losses by its name.
    namespace = {
        "__init__": __init__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        # Tensors of other blocks are in the same files; that is no reason for a warning.
        "_keys_to_ignore_on_load_unexpected": ["."],
    }
    return type(base.__name__, (base,), namespace)
