"""Sizes that are known before anything is loaded are those that loading gives."""

from __future__ import annotations

import pytest

from swarm.models.anatomy import dissect
from swarm.models.block_sizes import measure_model_shape
from swarm.weights import Precision, format_for
from swarm.weights.blocks import quantise_block
from tests.tiny_models import FAMILIES, NUM_BLOCKS, build_tiny_config, build_tiny_model


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.NF4, Precision.INT8])
def test_planned_sizes_are_the_loaded_ones(family: str, precision: Precision) -> None:
    """A plan that is wrong by a tenth loads for an hour and then fails; experts and odd shapes included."""
    sizes = measure_model_shape(build_tiny_config(family)).sizes(precision, "cpu")
    model = build_tiny_model(family)
    blocks = list(dissect(model, model.config.get_text_config(decoder=True)).stack)
    weight_format = format_for(precision, "cpu")
    assert sizes.num_blocks == NUM_BLOCKS
    for block, planned_bytes in zip(blocks, sizes.weight_bytes, strict=True):
        buffers_before = {name for name, _ in block.named_buffers()}
        if weight_format is not None:
            quantise_block(block, weight_format)
        parameters = sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
        stored = [tensor for name, tensor in block.named_buffers() if name not in buffers_before]
        assert planned_bytes == parameters + sum(tensor.numel() * tensor.element_size() for tensor in stored)
