"""Frames carry tensors exactly, and nothing hostile gets past their checks."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BadInputError
from swarm.pb import session_pb2 as pb
from swarm.wire.frames import decode_frame, encode_frame
from swarm.wire.limits import MAX_HEADER_BYTES, MAX_TENSOR_BYTES
from swarm.wire.tensors import encode_tensor, read_tensor_header

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


def make_frame(*tensors: torch.Tensor) -> bytes:
    return encode_frame(pb.SessionRequest(step=pb.Step(epoch=1, step=2)), list(tensors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (1,), (), (2, 3, 4, 1)])
def test_tensors_travel_bit_exactly(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Token identity over hops needs every bit, in bf16 too."""
    tensor = (torch.randn(shape) * 100).to(dtype)
    header, frame = decode_frame(make_frame(tensor), pb.SessionRequest)
    received = frame.tensor(0)
    assert header.step.step == 2
    assert received.dtype == dtype and received.shape == tensor.shape
    assert torch.equal(received, tensor)


def test_bf16_takes_two_bytes_a_value() -> None:
    """bf16 must not be widened on its way."""
    assert len(encode_tensor(torch.zeros(1000, dtype=torch.bfloat16))) < 2 * 1000 + 32


def test_a_strided_view_arrives_as_its_values() -> None:
    """Rows are often views into a larger batch."""
    tensor = torch.arange(24.0).reshape(4, 6).t()[1:3]
    _, frame = decode_frame(make_frame(tensor), pb.SessionRequest)
    assert torch.equal(frame.tensor(0), tensor)


def test_a_received_tensor_can_be_written_to() -> None:
    """Some layers work in place; memory of the message must not be touched."""
    body = make_frame(torch.ones(3))
    _, frame = decode_frame(body, pb.SessionRequest)
    frame.tensor(0).zero_()
    assert torch.equal(frame.tensor(0), torch.ones(3))


def tensor_header(*, code: int = 1, codec: int = 0, dims: tuple[int, ...] = (2,), size: int = 8) -> bytes:
    return struct.pack(f"<BBBB{len(dims)}IQ", code, codec, len(dims), 0, *dims, size)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (tensor_header(code=99) + bytes(8), "dtype code 99"),
        (tensor_header(codec=7) + bytes(8), "codec 7"),
        (tensor_header(dims=(1,) * 9) + bytes(8), "9 dimensions"),
        (tensor_header(dims=(2**31, 2**31), size=8) + bytes(8), "limit"),
        (tensor_header(dims=(2**32 - 1, 0), size=8) + bytes(8), "has 0 bytes, not 8"),
        (tensor_header(size=4) + bytes(8), "has 8 bytes, not 4"),
        (tensor_header() + bytes(7), "ends too early"),
        (b"\x01\x00", "needs 4 bytes"),
        (b"\x01\x00\x02\x00\x01", "needs 20 bytes"),
    ],
)
def test_impossible_tensor_headers_are_refused_with_the_reason(data: bytes, said: str) -> None:
    """A peer's claims about size are checked before any memory is taken."""
    with pytest.raises(BadInputError, match=said):
        read_tensor_header(data)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x01",
        struct.pack("<I", MAX_HEADER_BYTES + 1) + bytes(10),
        struct.pack("<I", 100) + bytes(10),
        struct.pack("<I", 4) + b"\xff\xff\xff\xff",
    ],
)
def test_malformed_frames_are_refused(body: bytes) -> None:
    """Garbage is one clear error, not a crash of the stream's handler."""
    with pytest.raises(BadInputError):
        decode_frame(body, pb.SessionRequest)


def test_more_tensors_than_expected_are_refused() -> None:
    """Only what the message type allows is parsed."""
    with pytest.raises(BadInputError, match="more than 1"):
        decode_frame(make_frame(torch.ones(1), torch.ones(1)), pb.SessionRequest, max_tensors=1)


@given(st.binary(max_size=200))
def test_random_bytes_never_do_more_than_raise_bad_input(body: bytes) -> None:
    """Whatever arrives, the worst outcome is a refusal."""
    try:
        _, frame = decode_frame(body, pb.SessionRequest)
    except BadInputError:
        return
    assert sum(tensor.payload_end - tensor.payload_start for tensor in frame.tensors) <= MAX_TENSOR_BYTES
