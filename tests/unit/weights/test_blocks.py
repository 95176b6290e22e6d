"""Which parts of a block go into few bits, and that the rest stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from swarm.server.engine.packed_linear import pack_large_linears
from swarm.weights.accounting import count_weights
from swarm.weights.blocks import empty_like_targets, find_targets, module_tensors, put_tensors, quantise_block
from swarm.weights.experts import QuantisedExperts
from swarm.weights.linear import QuantisedLinear
from swarm.weights.packed_int4 import packed_int4_format
from swarm.weights.packed_int8 import packed_int8_format


class Experts(nn.Module):
    """As transformers writes them: all experts in one parameter, one taken out at a time."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up_proj = nn.Parameter(torch.randn(3, 64, 96) if is_transposed else torch.randn(3, 96, 64))
        self.bias = nn.Parameter(torch.randn(3, 96))

    def forward(self, hidden: torch.Tensor, expert: int) -> torch.Tensor:
        index = torch.tensor(expert)
        if self.is_transposed:
            return hidden @ self.up_proj[index] + self.bias[index]
        return nn.functional.linear(hidden, self.up_proj[index]) + self.bias[index]


class OddLinear(nn.Linear):
    """Computes something of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Block(nn.Module):
    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.q_proj = nn.Linear(64, 64, bias=True)
        self.gate = nn.Linear(64, 64)  # a router, by its name
        self.odd = OddLinear(64, 64)
        self.tiny = nn.Linear(64, 4)
        self.experts = Experts(is_transposed)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


@pytest.mark.parametrize("make", [packed_int4_format, packed_int8_format])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_only_large_plain_matrices_are_replaced(make: Any, is_transposed: bool) -> None:
    """An error in a router sends tokens to other experts; in a norm, it is in every number after it."""
    block: Any = Block(is_transposed)
    before = {name: tensor.clone() for name, tensor in module_tensors(block).items()}
    num_weights = count_weights(block).num_weights
    assert quantise_block(block, make()) == 64 * 64 + 3 * 96 * 64
    assert isinstance(block.q_proj, QuantisedLinear)
    assert isinstance(block.experts.up_proj, QuantisedExperts)
    for name in ("norm.weight", "gate.weight", "odd.weight", "tiny.weight", "q_proj.bias", "experts.bias", "table"):
        assert torch.equal(module_tensors(block)[name], before[name]), name
    account = count_weights(block)
    assert account.num_weights == num_weights
    assert account.num_quantised == 64 * 64 + 3 * 96 * 64
    tensors = (tensor for name, tensor in module_tensors(block).items() if name != "table")
    assert account.size_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_multiply_as_before(is_transposed: bool) -> None:
    """Families write their products in two ways, and most of a mixture's weights are in them."""
    block = Block(is_transposed)
    hidden = torch.randn(5, 64, requires_grad=True)
    with torch.no_grad():
        expected = [block.experts(hidden, expert) for expert in range(3)]
    quantise_block(block, packed_int8_format())
    for expert in range(3):
        found = block.experts(hidden, expert)
        difference = (found - expected[expert]).detach()
        assert float(difference.abs().max()) < 3e-2 * float(expected[expert].abs().max())
        found.sum().backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_experts_refuse_what_they_can_not_do() -> None:
    """A family that multiplies in another way must fail at once, in the self-test, not answer nonsense."""
    block = Block()
    quantise_block(block, packed_int8_format())
    stand_in: Any = block.experts.up_proj
    for operation in (lambda: torch.randn(2, 96) @ stand_in[0], lambda: torch.bmm(torch.randn(1, 2, 64), stand_in[0])):
        with pytest.raises(TypeError):
            operation()


def test_an_empty_block_takes_the_tensors_of_a_full_one() -> None:
    """How blocks come out of the disk cache: the choice depends on modules alone."""
    full, empty = Block(), Block()
    quantise_block(full, packed_int4_format())
    with torch.device("meta"):
        empty = Block()
    empty_like_targets(empty, packed_int4_format())
    assert list(find_targets(empty)) == []
    put_tensors(empty, module_tensors(full))
    hidden = torch.randn(3, 64)
    assert torch.equal(empty.q_proj(hidden), full.q_proj(hidden))
    assert torch.equal(empty.experts(hidden, 1), full.experts(hidden, 1))
    assert not any(tensor.is_meta for tensor in module_tensors(empty).values())


@pytest.mark.parametrize("damage", ["lacks one", "has one more", "other shape", "other kind"])
def test_tensors_of_another_block_are_refused_whole(damage: str) -> None:
    """A stored block that does not fit must not be put in by half."""
    full, other = Block(), Block()
    quantise_block(full, packed_int4_format())
    quantise_block(other, packed_int4_format())
    tensors = dict(module_tensors(full))
    if damage == "lacks one":
        del tensors["norm.weight"]
    elif damage == "has one more":
        tensors["extra"] = torch.zeros(1)
    elif damage == "other shape":
        tensors["q_proj.codes"] = tensors["q_proj.codes"][:32]
    else:
        tensors["q_proj.codes"] = tensors["q_proj.codes"].float()
    before = other.q_proj(torch.ones(1, 64))
    with pytest.raises(ValueError, match="tensor"):
        put_tensors(other, tensors)
    assert torch.equal(other.q_proj(torch.ones(1, 64)), before)


def test_weights_that_are_no_numbers_are_named() -> None:
    """NaN in a checkpoint would become an ordinary code, and plausible nonsense."""
    block = Block()
    with torch.no_grad():
        block.q_proj.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="q_proj"):
        quantise_block(block, packed_int4_format())


def test_quantised_layers_get_no_packed_copy() -> None:
    """A packed fp32 copy beside them would take back eight times what was saved."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    quantise_block(model, packed_int8_format())
    assert pack_large_linears(model, max_bytes=1 << 30) == 0
