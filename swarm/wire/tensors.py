"""Tensors as bytes: a small self-describing header and the raw values, checked before any allocation.

Layout, little-endian:

    u8 dtype · u8 codec · u8 ndim · u8 zero · u32 dims[ndim] · u64 payload size · payload

bf16 travels as bf16 (numpy has no such type, so values move as bytes). Codec 0 is raw; further codecs
get further numbers, and a reader refuses those it does not know.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, NamedTuple

from swarm.errors import BadInputError
from swarm.wire.limits import MAX_TENSOR_BYTES, MAX_TENSOR_DIMS

if TYPE_CHECKING:
    import torch

__all__ = ["TensorHeader", "decode_tensor", "encode_tensor", "read_tensor_header"]

CODEC_RAW = 0
_DTYPE_BY_CODE = {1: "float32", 2: "bfloat16", 3: "float16", 4: "int64", 5: "int32", 6: "uint8"}
_CODE_BY_DTYPE = {name: code for code, name in _DTYPE_BY_CODE.items()}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1}
_FIXED = struct.Struct("<BBBB")
_SIZE = struct.Struct("<Q")


class TensorHeader(NamedTuple):
    """What a tensor on the wire claims to be; already checked against the limits and the bytes present."""

    dtype: str
    """torch dtype name, for example `bfloat16`."""
    shape: tuple[int, ...]
    payload_start: int
    """Offset of the values in the buffer."""
    payload_end: int
    """One past the values; the next tensor starts here."""


def encode_tensor(tensor: torch.Tensor) -> bytes:
    """Header and raw values of a tensor on any device. Raises ValueError for a dtype that does not travel."""
    name = str(tensor.dtype).removeprefix("torch.")
    code = _CODE_BY_DTYPE.get(name)
    if code is None:
        raise ValueError(f"tensors of {name} do not travel; convert to one of {', '.join(_CODE_BY_DTYPE)}")
    shape = tuple(tensor.shape)
    values = _raw_bytes(tensor)
    return b"".join(
        (
            _FIXED.pack(code, CODEC_RAW, len(shape), 0),
            struct.pack(f"<{len(shape)}I", *shape),
            _SIZE.pack(len(values)),
            values,
        )
    )


def _raw_bytes(tensor: torch.Tensor) -> bytes:
    import torch

    flat = tensor.detach().contiguous().cpu().reshape(-1)
    if flat.numel() == 0:
        return b""
    return flat.view(torch.uint8).numpy().tobytes()


def read_tensor_header(buffer: bytes | memoryview, offset: int = 0) -> TensorHeader:
    """Parse and check the tensor that starts at `offset`. Raises BadInputError saying what is wrong."""
    available = len(buffer) - offset
    if available < _FIXED.size:
        raise BadInputError(f"a tensor header needs {_FIXED.size} bytes, {available} are left in the message")
    code, codec, num_dims, _ = _FIXED.unpack_from(buffer, offset)
    dtype = _DTYPE_BY_CODE.get(code)
    if dtype is None:
        raise BadInputError(f"tensor dtype code {code} is unknown; the peer may run a newer version")
    if codec != CODEC_RAW:
        raise BadInputError(f"tensor codec {codec} is unknown; the peer may run a newer version")
    if num_dims > MAX_TENSOR_DIMS:
        raise BadInputError(f"a tensor of {num_dims} dimensions was sent; at most {MAX_TENSOR_DIMS} are allowed")
    header_bytes = _FIXED.size + 4 * num_dims + _SIZE.size
    if available < header_bytes:
        raise BadInputError(f"a tensor header needs {header_bytes} bytes, {available} are left in the message")
    shape: tuple[int, ...] = struct.unpack_from(f"<{num_dims}I", buffer, offset + _FIXED.size)
    (claimed_bytes,) = _SIZE.unpack_from(buffer, offset + header_bytes - _SIZE.size)
    expected_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if expected_bytes > MAX_TENSOR_BYTES:
        raise BadInputError(f"a tensor of {expected_bytes} bytes was sent; the limit is {MAX_TENSOR_BYTES}")
    if claimed_bytes != expected_bytes:
        raise BadInputError(f"a {dtype} tensor of shape {shape} has {expected_bytes} bytes, not {claimed_bytes}")
    payload_start = offset + header_bytes
    if len(buffer) - payload_start < expected_bytes:
        raise BadInputError(f"a tensor of {expected_bytes} bytes was announced, the message ends too early")
    return TensorHeader(dtype, shape, payload_start, payload_start + expected_bytes)


def decode_tensor(buffer: bytes | memoryview, header: TensorHeader) -> torch.Tensor:
    """The values of a checked tensor, as an own (writable) CPU tensor."""
    import torch

    dtype: torch.dtype = getattr(torch, header.dtype)
    if header.payload_end == header.payload_start:
        return torch.empty(header.shape, dtype=dtype)
    payload = bytearray(memoryview(buffer)[header.payload_start : header.payload_end])
    return torch.frombuffer(payload, dtype=dtype).reshape(header.shape)
