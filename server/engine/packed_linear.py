"""Large matrices in oneDNN's packed layout for the small batches of decoding on a CPU.

For 4 to 32 rows a plain matrix product repacks the weights at every call, which costs more than the
multiplication; packed once, 8 sessions took two thirds of the time (docs/performance.md). One row is faster
unpacked, and so are long inputs, so both layouts are kept: this trades memory for speed, and is done only
while memory is plentiful. The packed operators are private to torch; this is the one file that meets them,
and it checks result and speed on the machine at hand before it uses them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

__all__ = ["pack_large_linears"]

logger = logging.getLogger(__name__)
_MIN_ROWS = 3
_MAX_ROWS = 48
_MIN_WEIGHTS = 2**19
"""Smaller matrices stay in the processor's cache and gain nothing."""
_TYPICAL_ROWS = 8
_TOLERANCE = 1e-4


class _PackedLinear(nn.Linear):
    """nn.Linear with a second, packed copy of its weights; made by changing an instance's class."""

    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        num_rows = input.numel() // self.in_features
        if _MIN_ROWS <= num_rows <= _MAX_ROWS and not torch.is_grad_enabled():
            return _packed_linear(input, self.packed, self.bias)
        return linear(input, self.weight, self.bias)


def _packed_linear(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
    return output


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    return packed


def pack_large_linears(model: nn.Module, *, max_bytes: int) -> int:
    """Give the large fp32 CPU matrices of `model` a packed copy, at most `max_bytes` in all; says how many got one.

    Does nothing where the packed operators are missing, wrong, or no faster.
    """
    chosen: list[nn.Linear] = []
    size_bytes = 0
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.numel() < _MIN_WEIGHTS:
            continue
        if module.weight.dtype is not torch.float32 or module.weight.device.type != "cpu":
            continue
        size_bytes += module.weight.numel() * 4
        if size_bytes > max_bytes:
            break
        chosen.append(module)
    if not chosen or not _is_worth_it(chosen[:8]):
        return 0
    for module in chosen:
        packed = _pack(module.weight.detach())
        module.__class__ = _PackedLinear
        module.packed = packed
    logger.info("%d matrices (%d MiB) have a packed copy", len(chosen), size_bytes >> 20)
    return len(chosen)


@torch.inference_mode()
def _is_worth_it(sample: list[nn.Linear]) -> bool:
    """Whether packing is right and faster here; on several matrices, so that they do not all stay in cache."""
    try:
        packed = [_pack(module.weight.detach()) for module in sample]
        inputs = [torch.randn(_TYPICAL_ROWS, module.in_features) for module in sample]

        def run_plain() -> list[torch.Tensor]:
            return [linear(rows, module.weight, module.bias) for rows, module in zip(inputs, sample, strict=True)]

        def run_packed() -> list[torch.Tensor]:
            return [
                _packed_linear(rows, copy, module.bias)
                for rows, copy, module in zip(inputs, packed, sample, strict=True)
            ]

        for left, right in zip(run_plain(), run_packed(), strict=True):
            if not torch.allclose(left, right, rtol=_TOLERANCE, atol=_TOLERANCE * float(left.abs().max())):
                logger.warning("packed matrices give other results on this machine and are not used")
                return False
        return _best_time_s(run_packed) < 0.9 * _best_time_s(run_plain)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        logger.info("packed matrices are not available: %s", error)
        return False


def _best_time_s(run: Callable[[], object]) -> float:
    best_s = float("inf")
    for _ in range(7):
        started_s = time.thread_time()
        run()
        best_s = min(best_s, time.thread_time() - started_s)
    return best_s
