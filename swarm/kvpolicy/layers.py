"""Puts a policy together for a model: what every layer is kept by, whatever layers a server holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from swarm.errors import BadInputError
from swarm.kvpolicy.budget import BudgetCurve, default_curve, linear_curve, pyramidinfer_curve, uniform_curve
from swarm.kvpolicy.calibration_file import Calibration
from swarm.kvpolicy.packing import BitLayout
from swarm.kvpolicy.reference_cache import LayerSettings
from swarm.kvpolicy.row_codecs import Axes, RawCodec, RowCodec, TokenCodec, hadamard_axes, mix_equal_widths, plan_widths
from swarm.kvpolicy.scorers import build_scorer
from swarm.kvpolicy.settings import KVPolicy, PruningSettings

__all__ = ["ModelShape", "build_codec", "build_layers", "choose_curve"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a policy needs to know of a model."""

    num_layers: int
    """Of the whole model."""
    num_kv_heads: int
    key_dim: int
    value_dim: int
    windows: Mapping[int, int]
    """Positions a query sees, itself included, of those absolute layers that have a sliding window."""


def build_layers(
    policy: KVPolicy, shape: ModelShape, calibration: Calibration | None, layers: Sequence[int]
) -> dict[int, LayerSettings]:
    """What to keep some absolute layers by; the same for a layer whoever else is in `layers`.

    Raises:
        BadInputError: the calibration is of a model of another shape.
    """
    if calibration is not None:
        _check_fit(shape, calibration)
    curve = choose_curve(policy.pruning, shape, calibration)
    scorer = build_scorer(policy.pruning.scorer if policy.pruning is not None else "window", calibration)
    return {
        layer: LayerSettings(
            layer=layer,
            policy=policy,
            curve=curve,
            scorer=scorer,
            codec=build_codec(policy, shape, calibration, layer),
            num_kv_heads=shape.num_kv_heads,
            window=shape.windows.get(layer, 0),
        )
        for layer in layers
    }


def _check_fit(shape: ModelShape, calibration: Calibration) -> None:
    seen = (calibration.curve.num_layers, *calibration.key_mean.shape[1:], calibration.value_mean.shape[-1])
    expected = (shape.num_layers, shape.num_kv_heads, shape.key_dim, shape.value_dim)
    if seen != expected:
        raise BadInputError(
            f"the calibration is of {seen[0]} layers and {seen[1]} KV heads of {seen[2]} + {seen[3]} numbers, the"
            f" model has {expected[0]} and {expected[1]} of {expected[2]} + {expected[3]}; run `swarm calibrate` on it"
        )


def choose_curve(pruning: PruningSettings | None, shape: ModelShape, calibration: Calibration | None) -> BudgetCurve:
    """The curve that a policy's shape means for a model."""
    if pruning is None or pruning.shape == "uniform":
        return uniform_curve(shape.num_layers, shape.num_kv_heads)
    if pruning.shape == "pyramidinfer":
        return pyramidinfer_curve(shape.num_layers, shape.num_kv_heads, floor=0.9, recent_share=pruning.recent_share)
    if pruning.shape == "linear":
        return linear_curve(shape.num_layers, shape.num_kv_heads, slope=0.9)
    if calibration is None:
        return default_curve(shape.num_layers, shape.num_kv_heads)
    return calibration.curve


def build_codec(policy: KVPolicy, shape: ModelShape, calibration: Calibration | None, layer: int) -> RowCodec:
    """What a layer's rows are written with; all layers' rows have one size."""
    settings = policy.quantisation
    if settings is None:
        return RawCodec(shape.key_dim, shape.value_dim)
    if not settings.is_calibrated:
        calibration = None
    if calibration is None:
        keys, values = (
            hadamard_axes(shape.num_kv_heads, shape.key_dim),
            hadamard_axes(shape.num_kv_heads, shape.value_dim),
        )
        key_sizes, value_sizes = [1.0] * shape.key_dim, [1.0] * shape.value_dim
    else:
        keys = _axes(calibration.key_mean[layer], calibration.key_axes[layer])
        values = _axes(calibration.value_mean[layer], calibration.value_axes[layer])
        key_sizes, value_sizes = list(calibration.key_sizes), list(calibration.value_sizes)
    key_widths = plan_widths(key_sizes, settings.key_bits)
    value_widths = plan_widths(value_sizes, settings.value_bits)
    if calibration is not None:
        keys = mix_equal_widths(keys, key_sizes, key_widths)
        values = mix_equal_widths(values, value_sizes, value_widths)
    return TokenCodec(keys, values, BitLayout(key_widths), BitLayout(value_widths))


def _axes(mean: torch.Tensor, decode: torch.Tensor) -> Axes:
    # Double, because keys are a thousand times wider along their first axis than along their last.
    encode = torch.linalg.inv(decode.double()).float()
    return Axes(mean=mean.float(), encode=encode, decode=decode.float())
