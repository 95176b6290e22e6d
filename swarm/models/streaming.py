"""Fills the blocks of a span a few at a time, putting each into few bits before the next ones are read.

A skeleton of the model is made first: everything but the blocks, which stay on the meta device. Blocks are then read
through the model's own class, cut to just these few, and only their tensors move into the skeleton. So whatever
transformers does to a checkpoint (renamed tensors, stacked experts) happens here too, and never more than a few
blocks are in memory as they were published. Blocks found in the disk cache are not read from the checkpoint at all.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from swarm.datatypes import Span
from swarm.errors import ModelFilesError
from swarm.models.anatomy import Anatomy, derive_class, keep_span, put_stack
from swarm.models.checkpoint import block_of_tensor
from swarm.models.loading import load_model, model_class_of
from swarm.models.progress import ProgressReporter, SilentProgress
from swarm.weights.blocks import empty_like_targets, module_tensors, put_tensors, quantise_block
from swarm.weights.disk_cache import BlockKey
from swarm.weights.experts import QuantisedExperts
from swarm.weights.linear import QuantisedLinear

if TYPE_CHECKING:
    from swarm.models.source import ModelSource
    from swarm.weights.disk_cache import WeightCache
    from swarm.weights.formats import WeightFormat

__all__ = ["OnBlock", "load_blocks"]

OnBlock = Callable[[int, nn.Module], None]

logger = logging.getLogger(__name__)

_TOGETHER_BYTES = 192 << 20
"""Of blocks read at once, unless one is larger: cutting the class anew for each small block would take most time."""


def load_blocks(
    source: ModelSource,
    span: Span,
    *,
    dtype: torch.dtype,
    device: torch.device,
    weight_format: WeightFormat | None = None,
    weight_cache: WeightCache | None = None,
    on_block: OnBlock | None = None,
    report: ProgressReporter | None = None,
) -> tuple[PreTrainedModel, Anatomy]:
    """The model cut to `span`, on `device`, without gradients; its config still tells of all blocks.

    Args:
        dtype: of all weights that `weight_format` does not store.
        weight_format: for large matrices; None keeps them in `dtype`.
        weight_cache: of blocks in `weight_format`; not used without one.
        on_block: told of each block as soon as it has its weights, with its number within the span; it may take
            them away again, so that a span can be loaded that does not fit.

    Raises: as `load_model`.
    """
    report = report or SilentProgress()
    model, anatomy, blocks = _make_skeleton(source, span, dtype)
    loader = _BlockLoader(
        source, span, blocks, dtype=dtype, device=device, weight_format=weight_format, on_block=on_block
    )
    missing = list(range(len(span)))
    if weight_cache is not None and weight_format is not None:
        report.start(f"looking for stored blocks {span}", len(span), "blocks")
        missing = []
        for index in range(len(span)):
            if not loader.fill_from_cache(index, weight_cache):
                missing.append(index)
            report.advance(1)
        logger.info("%d of %d blocks were stored", len(span) - len(missing), len(span))
    if missing:
        wanted = {span.start + index for index in missing}
        source.ensure_tensors(lambda name: block_of_tensor(name) in wanted, report=report)
        report.start(f"loading blocks {span}", len(missing), "blocks")
        for together in _neighbours(missing, loader.num_together):
            loader.fill_from_source(together, weight_cache)
            report.advance(len(together))
    report.finish()
    anatomy = put_stack(anatomy, blocks)
    if any(isinstance(module, QuantisedExperts) for module in model.modules()):
        # The other implementations multiply with all experts' weights as one tensor.
        model.set_experts_implementation("eager")
    model.requires_grad_(False)
    nn.Module.to(model, device)
    return model, anatomy


def _leave_block(index: int, block: nn.Module) -> None:
    pass


def _make_skeleton(
    source: ModelSource, span: Span, dtype: torch.dtype
) -> tuple[PreTrainedModel, Anatomy, list[nn.Module]]:
    """A model that is whole except for its blocks, and these, which have no values yet."""
    blocks: list[nn.Module] = []
    found: list[Anatomy] = []

    def cut(model: PreTrainedModel) -> None:
        anatomy = keep_span(model, model.config.get_text_config(decoder=True), span)
        blocks.extend(anatomy.stack)
        found.append(put_stack(anatomy, [nn.Identity() for _ in anatomy.stack]))

    config = copy.deepcopy(source.config)
    cls = derive_class(model_class_of(config, AutoModelForCausalLM), cut)
    model = load_model(source, cls, config, lambda name: False, dtype=dtype, what="no blocks")
    return model, found[-1], blocks


def _neighbours(indices: list[int], most: int) -> Iterator[list[int]]:
    """Runs of consecutive numbers, none longer than `most`."""
    run: list[int] = []
    for index in indices:
        if run and (index != run[-1] + 1 or len(run) == most):
            yield run
            run = []
        run.append(index)
    if run:
        yield run


class _BlockLoader:
    """Gives values to the blocks of a skeleton."""

    def __init__(
        self,
        source: ModelSource,
        span: Span,
        blocks: list[nn.Module],
        *,
        dtype: torch.dtype,
        device: torch.device,
        weight_format: WeightFormat | None,
        on_block: OnBlock | None,
    ) -> None:
        self._source = source
        self._on_block = on_block or _leave_block
        self._span = span
        self._blocks = blocks
        self._dtype = dtype
        self._device = device
        self._format = weight_format
        largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
        self.num_together = max(_TOGETHER_BYTES // max(largest * dtype.itemsize, 1), 1)
        if weight_format is not None:
            for block in blocks:
                empty_like_targets(block, weight_format)

    def fill_from_cache(self, index: int, weight_cache: WeightCache) -> bool:
        """Whether the block was in the cache, and has its values now."""
        if self._format is None:
            return False
        key = self._key(index, self._format)
        tensors = weight_cache.read(key)
        if tensors is None:
            return False
        try:
            put_tensors(self._blocks[index], {name: tensor.to(self._device) for name, tensor in tensors.items()})
        except ValueError as error:
            logger.warning("blocks of %s look otherwise than those in the cache: %s", self._source.name, error)
            weight_cache.forget(key)
            return False
        self._on_block(index, self._blocks[index])
        return True

    def fill_from_source(self, indices: list[int], weight_cache: WeightCache | None) -> None:
        """Read consecutive blocks from the checkpoint."""
        start = self._span.start
        part = Span(start=start + indices[0], end=start + indices[-1] + 1)
        # On a CPU, quantising starts from what was published, and only the rest becomes fp32.
        widens = self._format is not None and self._dtype is torch.float32
        read = _read_blocks(self._source, part, None if widens else self._dtype)
        for index in indices:
            block = read.pop(0)
            nn.Module.to(block, self._device)
            if self._format is not None:
                try:
                    quantise_block(block, self._format)
                except ValueError as error:
                    raise ModelFilesError(
                        f"block {start + index} of {self._source.name} can not be used: {error}; fetch the model again"
                    ) from error
                if widens:
                    _widen_rest(block)
            tensors = module_tensors(block)
            put_tensors(self._blocks[index], tensors)
            if self._format is not None and weight_cache is not None:
                weight_cache.write(self._key(index, self._format), tensors)
            self._on_block(index, self._blocks[index])

    def _key(self, index: int, weight_format: WeightFormat) -> BlockKey:
        return BlockKey(
            model_hash=self._source.model_hash,
            block=self._span.start + index,
            format_name=weight_format.name,
            rest=str(self._dtype).removeprefix("torch."),
        )


def _read_blocks(source: ModelSource, part: Span, dtype: torch.dtype | None) -> list[nn.Module]:
    """These blocks of the checkpoint, and nothing around them."""
    found: list[Anatomy] = []

    def cut(model: PreTrainedModel) -> None:
        found.append(keep_span(model, model.config.get_text_config(decoder=True), part))

    config = copy.deepcopy(source.config)
    load_model(
        source,
        derive_class(model_class_of(config, AutoModelForCausalLM), cut),
        config,
        lambda name: block_of_tensor(name) in part,
        dtype=dtype,
        what=f"blocks {part}",
        first_block=part.start,
    )
    return list(found[-1].stack)


def _widen_rest(block: nn.Module) -> None:
    """Make everything fp32 that is not in few bits."""
    for module in block.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        if isinstance(module, QuantisedLinear | QuantisedExperts):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module._buffers[name] = buffer.float()
