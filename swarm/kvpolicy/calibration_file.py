"""What was measured about a model once: its budget curve, its scorer and the axes of its keys and values, in one file.

A safetensors file whose header carries the curve and the model's hash, so the curve can be read without torch. Files
for some models come with the package; `swarm calibrate` writes others beside the converted models.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from swarm.errors import BadInputError
from swarm.kvpolicy.budget import BudgetCurve

if TYPE_CHECKING:
    import torch

    from swarm.datatypes import ModelHash

__all__ = [
    "TENSOR_NAMES",
    "Calibration",
    "calibration_path",
    "find_calibration",
    "find_curve",
    "read_calibration",
    "read_curve",
    "write_calibration",
]

FORMAT: Final = "swarm-kv-2"
_SHIPPED: Final = Path(__file__).parent / "calibrations"
_MAX_HEADER_BYTES: Final = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `swarm calibrate` measured, by absolute layer: L layers, Hk KV heads, D and Dv dimensions."""

    model_hash: str
    curve: BudgetCurve
    key_sizes: Sequence[float]
    """[D] Variance of keys along their axes by rank, over the whole model."""
    value_sizes: Sequence[float]
    """[Dv] Likewise, of values."""
    scorer_weights: torch.Tensor = field(repr=False)
    """[L, hidden size + 1, Hk] float16: logarithm of a token's importance from the attention module's input and 1."""
    received_mean: torch.Tensor = field(repr=False)
    """[L, Hk] float32: mean logarithm of the attention a token gets from a window of later queries."""
    received_weight: torch.Tensor = field(repr=False)
    """[L, Hk] float32: how much attention beyond that mean counts, beside the scorer's guess."""
    key_mean: torch.Tensor = field(repr=False)
    """[L, Hk, D] float32"""
    key_axes: torch.Tensor = field(repr=False)
    """[L, Hk, D, D] float16; row i is the i-th axis, as long as keys are wide along it."""
    value_mean: torch.Tensor = field(repr=False)
    """[L, Hk, Dv] float32"""
    value_axes: torch.Tensor = field(repr=False)
    """[L, Hk, Dv, Dv] float16"""


TENSOR_NAMES: Final = (
    "scorer_weights",
    "received_mean",
    "received_weight",
    "key_mean",
    "key_axes",
    "value_mean",
    "value_axes",
)
"""Fields of a Calibration that are tensors, as the file names them."""


def calibration_path(folder: Path, model_hash: ModelHash | str) -> Path:
    """Where the calibration of a model lies in a folder of them."""
    return folder / f"{str(model_hash)[:32]}.safetensors"


def find_calibration(model_hash: ModelHash | str, *, cache_dir: Path | None = None) -> Calibration | None:
    """The user's own measurement, else the one that comes with the package, else None.

    Raises:
        BadInputError: there is a file, but it is damaged or of another model.
    """
    path = _locate(model_hash, cache_dir)
    return read_calibration(path, model_hash=model_hash) if path is not None else None


def find_curve(model_hash: ModelHash | str, *, cache_dir: Path | None = None) -> BudgetCurve | None:
    """As `find_calibration`, but the curve alone and without torch."""
    path = _locate(model_hash, cache_dir)
    return read_curve(path, model_hash=model_hash) if path is not None else None


def _locate(model_hash: ModelHash | str, cache_dir: Path | None) -> Path | None:
    folders = ([cache_dir / "kv"] if cache_dir is not None else []) + [_SHIPPED]
    paths = [calibration_path(folder, model_hash) for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def read_curve(path: Path, *, model_hash: ModelHash | str | None = None) -> BudgetCurve:
    """The budget curve of a calibration file.

    Raises:
        BadInputError: it is no such file, or of another model than `model_hash`.
    """
    return _parse(path, model_hash).curve


@dataclass(frozen=True)
class _Header:
    model_hash: str
    curve: BudgetCurve
    key_sizes: tuple[float, ...]
    value_sizes: tuple[float, ...]


def _parse(path: Path, model_hash: ModelHash | str | None) -> _Header:
    try:
        with path.open("rb") as file:
            (size_bytes,) = struct.unpack("<Q", file.read(8))
            if size_bytes > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size_bytes} bytes")
            metadata: dict[str, Any] = json.loads(file.read(size_bytes))["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}, not {FORMAT}")
        ratios = tuple(float(ratio) for ratio in json.loads(metadata["ratios"]))
        shares = tuple(
            tuple(tuple(float(share) for share in row) for row in heads) for heads in json.loads(metadata["shares"])
        )
        recent = tuple(
            tuple(tuple(int(count) for count in row) for row in heads) for heads in json.loads(metadata["recent"])
        )
        header = _Header(
            metadata["model_hash"],
            BudgetCurve(ratios=ratios, shares=shares, recent=recent),
            tuple(float(size) for size in json.loads(metadata["key_sizes"])),
            tuple(float(size) for size in json.loads(metadata["value_sizes"])),
        )
        if not all(0 < size < math.inf for size in (*header.key_sizes, *header.value_sizes)):
            raise ValueError("sizes of axes that are not above 0")
    except OSError as error:
        raise BadInputError(f"the calibration {path} can not be read ({error.strerror})") from error
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, struct.error) as error:
        raise BadInputError(
            f"{path} is no usable calibration ({error}); measure it again with `swarm calibrate`"
        ) from error
    if model_hash is not None and header.model_hash != model_hash:
        raise BadInputError(
            f"{path} was measured on the model {header.model_hash[:12]}, not on {str(model_hash)[:12]};"
            " measure this one with `swarm calibrate`"
        )
    return header


@functools.lru_cache(maxsize=4)
def _read_cached(path: Path, mtime_ns: int) -> Calibration:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = _parse(path, None)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise BadInputError(f"{path} is damaged ({error}); measure it again with `swarm calibrate`") from error
    missing = [name for name in TENSOR_NAMES if name not in tensors]
    if missing:
        raise BadInputError(f"{path} lacks {missing[0]}; measure it again with `swarm calibrate`")
    calibration = Calibration(
        model_hash=header.model_hash,
        curve=header.curve,
        key_sizes=header.key_sizes,
        value_sizes=header.value_sizes,
        **{name: tensors[name] for name in TENSOR_NAMES},
    )
    _check_shapes(path, calibration)
    _check_numbers(path, calibration)
    return calibration


def read_calibration(path: Path, *, model_hash: ModelHash | str | None = None) -> Calibration:
    """All of a calibration file.

    Raises: as `read_curve`.
    """
    _parse(path, model_hash)
    return _read_cached(path, path.stat().st_mtime_ns)


def _check_shapes(path: Path, calibration: Calibration) -> None:
    num_layers = calibration.curve.num_layers
    num_heads = len(calibration.curve.shares[0])
    key_dim, value_dim = len(calibration.key_sizes), len(calibration.value_sizes)
    hidden_rows = calibration.scorer_weights.shape[1] if calibration.scorer_weights.ndim == 3 else 0
    expected = {
        "scorer_weights": (num_layers, hidden_rows, num_heads),
        "received_mean": (num_layers, num_heads),
        "received_weight": (num_layers, num_heads),
        "key_mean": (num_layers, num_heads, key_dim),
        "key_axes": (num_layers, num_heads, key_dim, key_dim),
        "value_mean": (num_layers, num_heads, value_dim),
        "value_axes": (num_layers, num_heads, value_dim, value_dim),
    }
    for name, shape in expected.items():
        seen = tuple(getattr(calibration, name).shape)
        if seen != shape:
            raise BadInputError(
                f"{name} of {path} is {list(seen)}, but its curve says {list(shape)};"
                " measure it again with `swarm calibrate`"
            )


def _check_numbers(path: Path, calibration: Calibration) -> None:
    import torch

    for name in TENSOR_NAMES:
        numbers = getattr(calibration, name)
        is_usable = numbers.is_floating_point() and bool(numbers.isfinite().all())
        if is_usable and name.endswith("_axes"):
            # Codes are read back through the inverse.
            is_usable = not bool(torch.linalg.inv_ex(numbers.double()).info.any())
        if not is_usable:
            raise BadInputError(f"{name} of {path} can not be computed with; measure it again with `swarm calibrate`")


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file in one move; OSError when the disk refuses."""
    from safetensors.torch import save

    from swarm.models.fingerprint import write_atomically

    metadata = {
        "format": FORMAT,
        "model_hash": calibration.model_hash,
        "ratios": json.dumps(calibration.curve.ratios),
        "shares": json.dumps([[[round(s, 4) for s in row] for row in heads] for heads in calibration.curve.shares]),
        "recent": json.dumps(calibration.curve.recent),
        "key_sizes": json.dumps([float(f"{size:.4g}") for size in calibration.key_sizes]),
        "value_sizes": json.dumps([float(f"{size:.4g}") for size in calibration.value_sizes]),
    }
    tensors = {name: getattr(calibration, name).contiguous() for name in TENSOR_NAMES}
    write_atomically(path, _sort_header(save(tensors, metadata=metadata)))


def _sort_header(data: bytes) -> bytes:
    """The same safetensors file with its header in alphabetical order, so that equal calibrations are equal files."""
    (size_bytes,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + size_bytes]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + size_bytes :]
