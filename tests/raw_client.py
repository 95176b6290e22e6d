"""A client that says whatever a test wants, well-formed or not, over real gRPC."""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import torch

from swarm.datatypes import ServerInfo
from swarm.pb import node_pb2
from swarm.pb import session_pb2 as pb
from swarm.wire.frames import Frame, decode_frame, encode_frame
from swarm.wire.limits import PROTOCOL_VERSION, channel_options
from swarm.wire.methods import FORWARD, HEALTH, INFO, PUSH, SESSION

__all__ = ["RawClient", "RawStream", "step_frame", "step_message"]

_TIMEOUT_S = 20.0


class RawStream:
    """One bidirectional stream."""

    def __init__(self, channel: grpc.Channel, method: str) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = channel.stream_stream(method)(self._messages(), timeout=_TIMEOUT_S)

    def _messages(self) -> Iterator[bytes]:
        while (body := self._outgoing.get()) is not None:
            yield body

    def send(self, body: bytes) -> None:
        """Any bytes at all."""
        self._outgoing.put(body)

    def receive(self) -> tuple[pb.SessionReply, Frame] | None:
        """The next reply; None when the server ended the stream. Raises grpc.RpcError."""
        body = self.receive_body()
        return None if body is None else decode_frame(body, pb.SessionReply)

    def receive_body(self) -> bytes | None:
        """The next reply as it came; None when the server ended the stream. Raises grpc.RpcError."""
        body: bytes | None = next(self._call, None)
        return body

    def failure(self) -> pb.Failure:
        """The next reply, which must be a refusal."""
        reply = self.receive()
        assert reply is not None and reply[0].HasField("failure"), reply
        return reply[0].failure

    def close(self) -> None:
        """Say goodbye and wait for the server to end the stream; harmless when it has ended."""
        self.send(encode_frame(pb.SessionRequest(close=pb.Close())))
        self._outgoing.put(None)
        with contextlib.suppress(grpc.RpcError):
            while self.receive() is not None:
                pass

    def hang_up(self) -> None:
        """Leave without a word."""
        self._outgoing.put(None)
        self._call.cancel()


class RawClient:
    """Talks to one server. Use it in a `with` block, which closes what is open at its end."""

    def __init__(self, server: ServerInfo) -> None:
        self.server = server
        self._channel = grpc.insecure_channel(server.addresses[0], options=channel_options())
        self._streams: list[RawStream] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.close()
        self._channel.close()

    def stream(self, method: str = SESSION) -> RawStream:
        """A new stream, on which nothing has been said."""
        stream = RawStream(self._channel, method)
        self._streams.append(stream)
        return stream

    def push_stream(self) -> RawStream:
        """A stream as another server would open it."""
        return self.stream(PUSH)

    def open_message(self, **fields: Any) -> pb.Open:
        """A proper open over all of the server's blocks, with `fields` set differently."""
        proper: dict[str, Any] = {
            "session_id": os.urandom(16),
            "epoch": 1,
            "model_hash": self.server.model_hash,
            "start": self.server.span.start,
            "end": self.server.span.end,
            "max_length": 64,
            "max_sequences": 1,
            "protocol": PROTOCOL_VERSION,
        }
        return pb.Open(**(proper | fields))

    def open(self, **fields: Any) -> tuple[RawStream, pb.Open]:
        """A session that the server accepted."""
        stream, message = self.stream(), self.open_message(**fields)
        stream.send(encode_frame(pb.SessionRequest(open=message)))
        reply = stream.receive()
        assert reply is not None and reply[0].HasField("opened"), reply
        return stream, message

    def reopen(
        self, message: pb.Open, *, epoch: int, keep: tuple[int, int], **fields: Any
    ) -> tuple[RawStream, pb.Opened]:
        """The session of `message` at another epoch, asking for the state after step `keep` (epoch, step)."""
        request = pb.Open()
        request.CopyFrom(message)
        request.epoch = epoch
        request.keep.CopyFrom(pb.Keep(epoch=keep[0], step=keep[1]))
        request.MergeFrom(pb.Open(**fields))
        stream = self.stream()
        stream.send(encode_frame(pb.SessionRequest(open=request)))
        reply = stream.receive()
        assert reply is not None and reply[0].HasField("opened"), reply
        return stream, reply[0].opened

    def refused_open(self, **fields: Any) -> pb.Failure:
        """How the server refuses an open."""
        stream = self.stream()
        stream.send(encode_frame(pb.SessionRequest(open=self.open_message(**fields))))
        return stream.failure()

    def forward(self, hidden: Sequence[torch.Tensor], **fields: Any) -> tuple[node_pb2.RunReply, Frame]:
        """A stateless run, with `fields` of the request set differently."""
        proper: dict[str, Any] = {
            "model_hash": self.server.model_hash,
            "start": self.server.span.start,
            "end": self.server.span.end,
            "counts": [rows.shape[0] for rows in hidden],
        }
        body = encode_frame(node_pb2.RunRequest(**(proper | fields)), hidden)
        reply: bytes = self.unary(FORWARD, body)
        return decode_frame(reply, node_pb2.RunReply)

    def unary(self, method: str, body: bytes) -> bytes:
        """Any bytes to any unary method. Raises grpc.RpcError."""
        reply: bytes = self._channel.unary_unary(method)(body, timeout=_TIMEOUT_S)
        return reply

    def unary_later(self, method: str, body: bytes) -> grpc.Future:
        """The same without waiting."""
        return self._channel.unary_unary(method).future(body, timeout=_TIMEOUT_S)

    def health(self) -> node_pb2.HealthReply:
        """Whether the server is well."""
        return node_pb2.HealthReply.FromString(self.unary(HEALTH, b""))

    def info(self) -> node_pb2.InfoReply:
        """The server's account of itself."""
        return node_pb2.InfoReply.FromString(self.unary(INFO, b""))


def step_message(
    step: int, *, start: int = 0, count: int = 1, epoch: int = 1, sequence: int = 0, parent: int = 0, **fields: Any
) -> pb.Step:
    """A step of one sequence."""
    item = pb.SequenceStep(sequence=sequence, parent=parent, start=start, count=count)
    return pb.Step(epoch=epoch, step=step, sequences=[item], **fields)


def step_frame(step: pb.Step, hidden: torch.Tensor | None) -> bytes:
    """A step with its tensor, or without one."""
    return encode_frame(pb.SessionRequest(step=step), [] if hidden is None else [hidden])
