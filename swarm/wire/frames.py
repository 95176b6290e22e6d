"""Frames: one protobuf header and the tensors that belong to it, as one gRPC message.

Tensors stay outside of protobuf because a bytes field is copied twice on its way; at 1 MiB raw framing
took half the time in trials (docs/architecture.md).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from swarm.errors import BadInputError
from swarm.wire.limits import MAX_HEADER_BYTES
from swarm.wire.tensors import TensorHeader, decode_tensor, encode_tensor, read_tensor_header

if TYPE_CHECKING:
    import torch

__all__ = ["Frame", "decode_frame", "encode_frame"]

_LENGTH = struct.Struct("<I")
_Header = TypeVar("_Header", bound=Message)


class Frame(NamedTuple):
    """A received message whose tensors are checked but not yet allocated."""

    body: bytes
    tensors: tuple[TensorHeader, ...]

    def tensor(self, index: int) -> torch.Tensor:
        """Allocate and fill tensor `index`."""
        return decode_tensor(self.body, self.tensors[index])


def encode_frame(header: Message, tensors: Sequence[torch.Tensor] = ()) -> bytes:
    """One message from a header and its tensors."""
    header_bytes = header.SerializeToString()
    return b"".join((_LENGTH.pack(len(header_bytes)), header_bytes, *(encode_tensor(tensor) for tensor in tensors)))


def decode_frame(
    body: bytes, header_type: type[_Header], *, max_tensors: int = 1, max_header_bytes: int = MAX_HEADER_BYTES
) -> tuple[_Header, Frame]:
    """Split a message; every claim in it is checked, nothing of tensor size is allocated.

    Raises BadInputError for anything that is not a well-formed frame of at most `max_tensors` tensors.
    """
    if len(body) < _LENGTH.size:
        raise BadInputError(f"a message of {len(body)} bytes is too short to be a frame")
    (header_size,) = _LENGTH.unpack_from(body)
    if header_size > max_header_bytes or header_size > len(body) - _LENGTH.size:
        raise BadInputError(f"a frame announces a header of {header_size} bytes in a message of {len(body)}")
    offset = _LENGTH.size + header_size
    header = header_type()
    try:
        header.ParseFromString(body[_LENGTH.size : offset])
    except DecodeError as error:
        raise BadInputError(f"a frame's header is not a {header_type.DESCRIPTOR.name}") from error
    tensors: list[TensorHeader] = []
    while offset < len(body):
        if len(tensors) == max_tensors:
            raise BadInputError(f"a frame carries more than {max_tensors} tensors")
        tensor = read_tensor_header(body, offset)
        tensors.append(tensor)
        offset = tensor.payload_end
    return header, Frame(body, tuple(tensors))
