"""A model on a CPU whose results for a token do not depend, by a single bit, on what is computed beside it.

A plain matrix product adds up in an order that depends on how many rows there are, and torch takes the ends of what it
shares out among threads another way than the rest. So a token's last bits depend on who shares its batch and on how
its prompt was cut. For exact sessions that is lost in rounding. Where sessions are compressed, a bit decides whether a
token is kept or dropped and which code a number gets; without this, one in five greedy answers of 80 tokens went on
otherwise after a server was lost (docs/kv-cache.md). For GPUs the same is known as batch-invariant inference; there we
do not have it.
"""

# Letters: n rows, H input and N output size of a matrix, W width of an activation's input.

from __future__ import annotations

import functools
import logging
from typing import Final

import psutil
import torch
from torch import nn
from torch.nn.functional import linear

from swarm.server.engine.packed_linear import (
    UNAVAILABLE,
    PackedLinear,
    are_alike,
    convert,
    count_bytes,
    find_plain,
    multiply_packed,
    pack,
    pack_large_linears,
)

__all__ = ["make_rows_independent", "pack_matrices"]

logger = logging.getLogger(__name__)
_SPEED_SHARE: Final = 0.125
"""Part of the free memory that packed copies of weights may take for speed alone."""
_ROWWISE_SHARE: Final = 0.5
"""Part of it that they may take where sessions are compressed."""
_DTYPES: Final = (torch.float32, torch.bfloat16)
_MANY_ROWS: Final = 200
_COMPANIES: Final = (2, 3, 5, 8, 16, 17, 33, 64, 100)
"""Numbers of rows among which each is compared with itself among _MANY_ROWS."""
_NUM_SINGLES: Final = 8
"""Rows that are tried alone."""
_VECTOR_NUMBERS: Final = 32
"""torch computes so many numbers at once, and what is left at an end one by one, by other functions."""
_ONE_THREAD_NUMBERS: Final = 1 << 14
"""So many it never shares out among threads."""

_OF_WHOLE_ROWS: Final = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.GLU, nn.MultiheadAttention)


def pack_matrices(model: nn.Module, *, for_compressing: bool, reserved_bytes: int) -> None:
    """What a server does with a model on its CPU, as far as free memory allows that nothing else is to take."""
    free_bytes = max(psutil.virtual_memory().available - reserved_bytes, 0)
    if for_compressing and make_rows_independent(model, max_bytes=int(free_bytes * _ROWWISE_SHARE)):
        return
    pack_large_linears(model, max_bytes=int(free_bytes * _SPEED_SHARE))


def make_rows_independent(model: nn.Module, *, max_bytes: int) -> bool:
    """Have CPU matrices in fp32 or bf16, and the activations, of `model` give each row the same bits in any company.

    Where gradients are wanted matrices work as before. Returns whether it was done; it is not where packed copies of
    the matrices would take more than `max_bytes`, or do not give that on this machine.
    """
    matrices = list(find_plain(model, _DTYPES))
    if not matrices:
        logger.info("the last bits of answers depend on who shares a batch: no matrix is in fp32 or bf16")
        return False
    if count_bytes(matrices) > max_bytes:
        logger.info("the last bits of answers depend on who shares a batch: no memory for packed copies of the weights")
        return False
    by_kind = {_kind_of(module): module for module in matrices}
    try:
        must_double = {kind: _find_how(module) for kind, module in by_kind.items()}
    except _NotRowwiseError as error:
        logger.info("the last bits of answers depend on who shares a batch: %s", error)
        return False
    convert(matrices, _RowwiseLinear)
    for module in matrices:
        assert isinstance(module, _RowwiseLinear)
        module.doubles_one_row = must_double[_kind_of(module)]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_activation(child):
                setattr(parent, name, _RowwiseActivation(child))
    return True


class _NotRowwiseError(Exception):
    """Packed products do not do here what they are for."""


def _kind_of(matrix: nn.Linear) -> tuple[torch.dtype, torch.Size]:
    """Matrices that are alike in this are multiplied alike."""
    return matrix.weight.dtype, matrix.weight.shape


class _RowwiseLinear(PackedLinear):
    """nn.Linear whose every output row depends on its own input row alone."""

    doubles_one_row: bool
    """Whether one row alone would be added up in another order than several."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return linear(input, self.weight, self.bias)
        if self.doubles_one_row and input.numel() == self.in_features:
            return _double(input, self.packed, self.bias)
        return multiply_packed(input, self.packed, self.bias)


def _double(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of one row [..., H], taken as one of two."""
    both = multiply_packed(input.reshape(1, -1).expand(2, -1), packed, bias)
    return both[:1].view(*input.shape[:-1], -1)


@torch.inference_mode()
def _find_how(module: nn.Linear) -> bool:
    """Whether one row alone must be doubled; raises _NotRowwiseError where packed products are no use for it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_MANY_ROWS, module.in_features, generator=generator).to(module.weight.dtype)
    try:
        packed = pack(module.weight.detach())
        every = multiply_packed(rows, packed, module.bias)
        if not are_alike(every, linear(rows, module.weight, module.bias)):
            raise _NotRowwiseError("packed products are wrong")
        for count in _COMPANIES:
            some = multiply_packed(rows[-count:].contiguous(), packed, module.bias)
            if not torch.equal(some, every[-count:]):
                raise _NotRowwiseError("packed products depend on the number of rows")
        singles = [rows[index : index + 1].contiguous() for index in range(_NUM_SINGLES)]
        if all(torch.equal(multiply_packed(row, packed, module.bias)[0], every[i]) for i, row in enumerate(singles)):
            return False
        if all(torch.equal(_double(row, packed, module.bias)[0], every[i]) for i, row in enumerate(singles)):
            return True
    except UNAVAILABLE as error:
        raise _NotRowwiseError(f"packed products are not available: {error}") from error
    raise _NotRowwiseError("packed products of one row differ")


def _is_activation(module: nn.Module) -> bool:
    """Whether it is a function of single numbers."""
    where = type(module).__module__
    if where not in ("torch.nn.modules.activation", "transformers.activations") or isinstance(module, _OF_WHOLE_ROWS):
        return False
    return next(module.parameters(), None) is None


class _RowwiseActivation(nn.Module):
    """An activation function [..., W] that torch does not share out among threads in the middle of a row."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        width = input.shape[-1]
        if _are_shares_whole(width, torch.get_num_threads()):
            return self.function(input)  # type: ignore[no-any-return]
        num_rows = max(1, _ONE_THREAD_NUMBERS // width) if width % _VECTOR_NUMBERS == 0 else 1
        rows = input.reshape(-1, width)
        if len(rows) <= num_rows:
            return self.function(input)  # type: ignore[no-any-return]
        return torch.cat([self.function(block) for block in rows.split(num_rows)]).view(input.shape)


@functools.cache
def _are_shares_whole(width: int, num_threads: int) -> bool:
    """Whether any number of rows is shared out among any number of threads in whole vectors."""
    return all(width % (_VECTOR_NUMBERS * count) == 0 for count in range(1, num_threads + 1))
