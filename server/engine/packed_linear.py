"""Large matrices in oneDNN's packed layout for the small batches of decoding on a CPU.

For 4 to 32 rows a plain matrix product repacks the weights at every call, which costs more than the
multiplication; packed once, 8 sessions took two thirds of the time (docs/performance.md). One row is faster
unpacked, and long inputs are as fast, so both layouts are kept: this trades memory for speed, and is done only
while memory is plentiful. The packed operators are private to torch; this is the one file that meets them,
and it checks result and speed on the machine at hand before it uses them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

import torch
from torch import nn
from torch.nn.functional import linear

__all__ = [
    "UNAVAILABLE",
    "PackedLinear",
    "are_alike",
    "convert",
    "count_bytes",
    "find_plain",
    "multiply_packed",
    "pack",
    "pack_large_linears",
]

logger = logging.getLogger(__name__)
_MIN_ROWS = 3
_MAX_ROWS = 48
_MIN_WEIGHTS = 2**19
"""Smaller matrices stay in the processor's cache and gain nothing."""
_TYPICAL_ROWS = 8
UNAVAILABLE: Final = (AttributeError, NotImplementedError, RuntimeError, TypeError)
"""What torch raises where it lacks the packed operators."""
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 1e-2


class PackedLinear(nn.Linear):
    """nn.Linear with a second, packed copy of its weights; made by `convert`, which changes an instance's class."""

    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        num_rows = input.numel() // self.in_features
        if _MIN_ROWS <= num_rows <= _MAX_ROWS and not torch.is_grad_enabled():
            return multiply_packed(input, self.packed, self.bias)
        return linear(input, self.weight, self.bias)


def multiply_packed(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What linear gives, [..., out], by what `pack` gave."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
    return output


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A packed copy. Raises one of UNAVAILABLE where torch has none."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    return packed


def pack_large_linears(model: nn.Module, *, max_bytes: int) -> int:
    """Give the large fp32 CPU matrices of `model` a packed copy, at most `max_bytes` in all; says how many got one.

    Does nothing where the packed operators are missing, wrong, or no faster.
    """
    chosen: list[nn.Linear] = []
    size_bytes = 0
    for module in find_plain(model):
        if module.weight.numel() < _MIN_WEIGHTS:
            continue
        size_bytes += module.weight.numel() * 4
        if size_bytes > max_bytes:
            break
        chosen.append(module)
    if not chosen or not _is_worth_it(chosen[:8]):
        return 0
    convert(chosen, PackedLinear)
    return len(chosen)


def find_plain(model: nn.Module, dtypes: Collection[torch.dtype] = (torch.float32,)) -> Iterable[nn.Linear]:
    """The matrices of a model that can be packed, if of one of these dtypes."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in dtypes and module.weight.device.type == "cpu":
            yield module


def count_bytes(modules: Iterable[nn.Linear]) -> int:
    """What packed copies of matrices take, nearly."""
    return sum(module.weight.numel() * module.weight.element_size() for module in modules)


def convert(modules: Sequence[nn.Linear], kind: type[PackedLinear]) -> None:
    """Give matrices packed copies, and to use them as `kind` does."""
    for module in modules:
        packed = pack(module.weight.detach())
        module.__class__ = kind
        module.packed = packed
    logger.info("%d matrices (%d MiB) have a packed copy", len(modules), count_bytes(modules) >> 20)


def are_alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether a packed product is what the plain one is, but for rounding."""
    tolerance = _TOLERANCE if right.dtype is torch.float32 else _HALF_TOLERANCE
    if torch.allclose(left, right, rtol=tolerance, atol=tolerance * float(right.abs().max())):
        return True
    logger.warning("packed matrices give other results on this machine and are not used")
    return False


@torch.inference_mode()
def _is_worth_it(sample: list[nn.Linear]) -> bool:
    """Whether packing is right and faster here; on several matrices, so that they do not all stay in cache."""
    try:
        packed = [pack(module.weight.detach()) for module in sample]
        inputs = [torch.randn(_TYPICAL_ROWS, module.in_features) for module in sample]

        def run_plain() -> list[torch.Tensor]:
            return [linear(rows, module.weight, module.bias) for rows, module in zip(inputs, sample, strict=True)]

        def run_packed() -> list[torch.Tensor]:
            return [
                multiply_packed(rows, copy, module.bias)
                for rows, copy, module in zip(inputs, packed, sample, strict=True)
            ]

        if not all(are_alike(left, right) for left, right in zip(run_packed(), run_plain(), strict=True)):
            return False
        return _best_time_s(run_packed) < 0.9 * _best_time_s(run_plain)
    except UNAVAILABLE as error:
        logger.info("packed matrices are not available: %s", error)
        return False


def _best_time_s(run: Callable[[], object]) -> float:
    best_s = float("inf")
    for _ in range(7):
        started_s = time.thread_time()
        run()
        best_s = min(best_s, time.thread_time() - started_s)
    return best_s
