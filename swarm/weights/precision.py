"""How precisely a server keeps its weights: the names, their order, and what each promises."""

from __future__ import annotations

import enum

from swarm.errors import BadInputError

__all__ = ["AUTO", "Precision", "at_least", "parse_precision"]

AUTO = "auto"
"""What an operator says to leave the choice to the device; see swarm.weights.automatic."""


class Precision(enum.Enum):
    """A promise about the error of the weights, not about how their bits are laid out.

    That two servers of one precision answer with the same bits is promised by none of them.
    """

    FP32 = "fp32"
    """32-bit floats; published weights without any loss."""
    BF16 = "bf16"
    """16-bit floats (8 bits of fraction); published weights without loss where they were published so."""
    INT8 = "int8"
    """One byte per weight, one scale per output."""
    NF4 = "nf4"
    """Four bits per weight, with an error no larger than NF4's (QLoRA, arXiv 2305.14314) in blocks of 64.

    NF4's own codes on CUDA; evenly spaced codes with fitted scales on CPUs, whose kernels know no others.
    """

    def __str__(self) -> str:
        return self.value


_RANKS = {Precision.NF4: 0, Precision.INT8: 1, Precision.BF16: 2, Precision.FP32: 3}


def parse_precision(name: str) -> Precision:
    """The precision of this name.

    Raises:
        BadInputError: there is none; the message names those that exist.
    """
    try:
        return Precision(name)
    except ValueError:
        known = ", ".join(precision.value for precision in Precision)
        raise BadInputError(f"{name!r} is no precision of weights; there are {known}") from None


def at_least(announced: Precision | str, demanded: Precision | str) -> bool:
    """Whether weights announced as `announced` are as precise as `demanded`, or more.

    A name that this version does not know (a newer server's) is never precise enough.

    Raises:
        BadInputError: `demanded` is no precision.
    """
    floor = demanded if isinstance(demanded, Precision) else parse_precision(demanded)
    try:
        return _RANKS[Precision(announced)] >= _RANKS[floor]
    except ValueError:
        return False
