"""From a precision and a device to how weights are stored and computed with there."""

from __future__ import annotations

import torch

from swarm.weights.formats import WeightFormat
from swarm.weights.precision import Precision

__all__ = ["format_for", "hidden_dtype_for"]


def format_for(
    precision: Precision, device: torch.device | str, *, double_quantised: bool = False
) -> WeightFormat | None:
    """How large matrices are stored; None where they simply are floats (fp32 and bf16).

    Args:
        double_quantised: quantise NF4's scales too (CUDA only): 0.52 instead of 0.56 bytes per weight.

    Raises:
        MissingDependencyError: a GPU's 4-bit and 8-bit weights need bitsandbytes, which is not there.
    """
    if precision in (Precision.FP32, Precision.BF16):
        return None
    # Each kind is imported when it is wanted: bitsandbytes is optional and takes seconds.
    if torch.device(device).type == "cpu":
        if precision is Precision.NF4:
            from swarm.weights.packed_int4 import packed_int4_format

            return packed_int4_format()
        from swarm.weights.packed_int8 import packed_int8_format

        return packed_int8_format()
    from swarm.weights.bitsandbytes_formats import BitsAndBytesInt8, BitsAndBytesNf4

    return BitsAndBytesNf4(double_quantised=double_quantised) if precision is Precision.NF4 else BitsAndBytesInt8()


def hidden_dtype_for(precision: Precision, device: torch.device | str) -> torch.dtype:
    """Of hidden states, norms and everything that is not in few bits.

    With few bits, CPUs compute the rest in fp32, which costs them nothing; GPUs in bf16.
    """
    if precision is Precision.FP32:
        return torch.float32
    if precision is Precision.BF16:
        return torch.bfloat16
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
