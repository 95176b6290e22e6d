"""What a token will take of the KV memory under a policy, before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swarm.kvcache.footprint import Footprint

if TYPE_CHECKING:
    from swarm.datatypes import ModelHash
    from swarm.kvpolicy.budget import BudgetCurve
    from swarm.kvpolicy.settings import KVPolicy
    from swarm.models.block_sizes import BlockSizes, ModelShape
    from swarm.weights import Precision

__all__ = ["UNLIMITED_POSITIONS", "plan_kv_bytes_per_token", "sizes_under"]

UNLIMITED_POSITIONS: Final = 2**20
"""For models that state no context length (bloom); memory is the limit then."""
_PAGE_TOKENS: Final = 16
_SCALE_BYTES: Final = 4
"""Of a stored row."""


def sizes_under(
    policy: KVPolicy,
    shape: ModelShape,
    precision: Precision,
    device: str,
    *,
    model_hash: ModelHash | None,
    max_positions: int | None,
) -> BlockSizes:
    """What blocks take on `device` when keys and values are kept by a policy.

    Args:
        model_hash: by which its calibration is found; None goes by defaults.
        max_positions: context length of the model; None is a long one.

    Raises:
        BadInputError: the model's calibration is damaged.
        MissingDependencyError: the precision needs a package on this device that is not installed.
    """
    from swarm.kvpolicy.calibration_file import find_curve
    from swarm.models.source import default_cache_dir
    from swarm.weights import hidden_dtype_for

    sizes = shape.sizes(precision, device)
    if not policy.compresses:
        return sizes
    kv_bytes = plan_kv_bytes_per_token(
        policy,
        shape,
        curve=find_curve(model_hash, cache_dir=default_cache_dir()) if model_hash is not None else None,
        max_positions=max_positions or UNLIMITED_POSITIONS,
        itemsize=hidden_dtype_for(precision, device).itemsize,
    )
    return sizes.with_kv_bytes(kv_bytes)


def plan_kv_bytes_per_token(
    policy: KVPolicy, shape: ModelShape, *, curve: BudgetCurve | None, max_positions: int, itemsize: int
) -> int:
    """Bytes that a block keeps of a token of a usual context, on average over the model's blocks.

    Sliding windows are not looked at: blocks that have one keep less.

    Args:
        curve: as measured on the model; None where it was not.
        itemsize: bytes of an uncompressed value.
    """
    from swarm.kvpolicy.layers import ModelShape as StoredModel
    from swarm.kvpolicy.layers import choose_curve

    heads, key_dim, value_dim = shape.kv_dims
    num_layers = len(shape.blocks)
    is_measured = policy.pruning is not None and policy.pruning.shape == "calibrated" and curve is not None
    if not is_measured or curve is None or curve.num_layers != num_layers:
        stored = StoredModel(
            num_layers=num_layers, num_kv_heads=heads, key_dim=key_dim, value_dim=value_dim, windows={}
        )
        curve = choose_curve(policy.pruning, stored, None)
    footprint = Footprint.with_fitting_pages(
        policy,
        curve,
        layers=tuple(range(num_layers)),
        num_kv_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        row_bytes=_row_bytes(policy, key_dim, value_dim),
        page_tokens=_PAGE_TOKENS,
        itemsize=itemsize,
        max_positions=max_positions,
        windows={},
    )
    return -(-footprint.bytes_per_token // num_layers)


def _row_bytes(policy: KVPolicy, key_dim: int, value_dim: int) -> int:
    settings = policy.quantisation
    if settings is None:
        return 2 * (key_dim + value_dim)
    return round(settings.key_bits * key_dim) // 8 + round(settings.value_bits * value_dim) // 8 + _SCALE_BYTES
