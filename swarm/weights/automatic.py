"""Chooses a precision for an operator who named none, and says why in one sentence.

GPUs serve NF4: their memory is what a swarm is short of. CPUs have memory, so there only precisions that keep the
published weights without loss are candidates, and the faster one on the machine at hand is taken: people compare a
server's answers with those of the published model, and nobody's answers should change because nothing was said.
How fast int8 and nf4 are here is measured too, and told, for those who want the speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from swarm.errors import MissingDependencyError
from swarm.weights.choice import format_for
from swarm.weights.formats import MatrixShape
from swarm.weights.matrix import QuantisedMatrix
from swarm.weights.precision import Precision

__all__ = ["AutomaticChoice", "choose_automatically", "measure_relative_times"]

_MAX_FEATURES = 2048
"""A larger matrix would take longer to try and rank precisions no differently."""
_WEIGHTS_IN_ALL = 1 << 24
"""More than any processor's cache holds as fp32: while serving, weights come from memory."""
_ROW_COUNTS = (1, 8, 64)
"""One session, several, and a piece of a prompt."""
_MUST_GAIN = 0.9
"""Share of fp32's time that another precision must stay under; smaller gains are noise."""


class AutomaticChoice(NamedTuple):
    """What `auto` stands for on one device."""

    precision: Precision
    reason: str
    """One sentence for the operator."""


def choose_automatically(
    device: torch.device | str,
    *,
    hidden_size: int,
    published_dtype: torch.dtype | None = None,
    measure: Callable[[int], Mapping[Precision, Mapping[int, float]]] | None = None,
) -> AutomaticChoice:
    """A precision for this device and model. Takes under two seconds on a CPU, no time elsewhere.

    Args:
        hidden_size: of the model; what is measured is a layer of this width.
        published_dtype: of the weights in the checkpoint; None if unknown.
        measure: stands for `measure_relative_times`, in tests.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        try:
            format_for(Precision.NF4, device)
        except MissingDependencyError:
            return AutomaticChoice(
                Precision.BF16, "bf16, because 4-bit weights need bitsandbytes: pip install 'swarm-inference[cuda]'"
            )
        return AutomaticChoice(Precision.NF4, "nf4, so that as many blocks as possible fit the GPU")
    if kind != "cpu":
        return AutomaticChoice(Precision.BF16, f"bf16, because there are no 4-bit weights for {kind} devices")
    times = (measure or measure_relative_times)(hidden_size)
    means = {precision: _geometric_mean(list(by_rows.values())) for precision, by_rows in times.items()}
    is_lossless = published_dtype is torch.bfloat16
    chosen = Precision.FP32
    if is_lossless and has_bf16_units() and means.get(Precision.BF16, 1.0) < _MUST_GAIN:
        chosen = Precision.BF16
    others = ", ".join(
        f"{precision} {1 / max(times[precision][1], 1e-9):.1f}"
        for precision in (Precision.BF16, Precision.INT8, Precision.NF4)
        if precision is not chosen and precision in times
    )
    return AutomaticChoice(
        chosen,
        f"{chosen}, which keeps the published weights as they are; against fp32, one layer of this width decodes "
        f"{others} times as fast on this CPU",
    )


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 numbers by itself."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


@torch.inference_mode()
def measure_relative_times(hidden_size: int) -> dict[Precision, dict[int, float]]:
    """CPU time of one square layer's product at each precision, relative to fp32's, by number of rows."""
    width = max(min(hidden_size, _MAX_FEATURES), 16)
    shape = MatrixShape(width, width)
    weight = torch.randn(width, width)
    num_copies = max(_WEIGHTS_IN_ALL // shape.num_weights, 1)
    times_s: dict[Precision, dict[int, float]] = {}
    for precision in (Precision.FP32, Precision.BF16, Precision.INT8, Precision.NF4):
        products = _products(precision, weight, shape, num_copies)
        times_s[precision] = {count: _time_s(products, torch.randn(count, width)) for count in _ROW_COUNTS}
    fp32_s = times_s[Precision.FP32]
    return {
        precision: {count: time_s / max(fp32_s[count], 1e-9) for count, time_s in by_rows.items()}
        for precision, by_rows in times_s.items()
        if precision is not Precision.FP32
    }


def _products(
    precision: Precision, weight: torch.Tensor, shape: MatrixShape, num_copies: int
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The same product with copies of the weight that lie apart in memory."""
    weight_format = format_for(precision, "cpu")
    if weight_format is None:
        dtype = torch.float32 if precision is Precision.FP32 else torch.bfloat16
        copies = [weight.to(dtype, copy=True) for _ in range(num_copies)]
        return [lambda rows, copy=copy: linear(rows.to(copy.dtype), copy) for copy in copies]  # type: ignore[misc]
    tensors = weight_format.encode(weight)
    return [
        QuantisedMatrix(weight_format, shape, {name: tensor.clone() for name, tensor in tensors.items()}).multiply
        for _ in range(num_copies)
    ]


def _time_s(products: list[Callable[[torch.Tensor], torch.Tensor]], rows: torch.Tensor) -> float:
    """CPU seconds of this thread for one product, the best of a few rounds; few, where one takes long."""
    # Another thread's work would count if torch had several; the ratio of two precisions stands all the same.
    sample = products if len(rows) == 1 else products[:2]
    best_s = float("inf")
    for _ in range(3):
        started_s = time.process_time()
        for product in sample:
            product(rows)
        best_s = min(best_s, (time.process_time() - started_s) / len(sample))
    return best_s


def _geometric_mean(values: list[float]) -> float:
    product = 1.0
    for value in values:
        product *= max(value, 1e-9)
    mean: float = product ** (1 / max(len(values), 1))
    return mean
