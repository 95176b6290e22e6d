"""What the process that has the engine tells those that share its span: work as JSON, hidden states beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swarm.datatypes import Span
from swarm.server.engine.work import BackwardWork, ForwardWork, SessionKey, StepWork
from swarm.server.session_mirror import SequenceStep

__all__ = ["Call", "decode_call", "encode_call", "name_dtype", "parse_dtype"]


@dataclass(frozen=True)
class Call:
    """One call of a backend's method."""

    name: str
    """steps, stateless, forget, drop_step, set_away or stop."""
    now_s: float = 0.0
    """The time that decisions about memory go by: the same in all processes, or they would decide differently."""
    steps: Sequence[StepWork] = ()
    stateless: ForwardWork | BackwardWork | None = None
    session: SessionKey | None = None
    is_away: bool = False

    def tensors(self) -> list[torch.Tensor]:
        """What travels beside the message."""
        if isinstance(self.stateless, BackwardWork):
            return [self.stateless.hidden, self.stateless.gradient]
        if self.stateless is not None:
            return [self.stateless.hidden]
        return [work.hidden for work in self.steps]


def encode_call(call: Call) -> bytes:
    """Everything but the tensors' values."""
    body: dict[str, Any] = {
        "name": call.name,
        "now_s": call.now_s,
        "tensors": [[name_dtype(tensor.dtype), list(tensor.shape)] for tensor in call.tensors()],
    }
    if call.steps:
        body["steps"] = [
            {
                "session": _encode_session(work.session),
                "span": [work.span.start, work.span.end],
                "sequences": [[item.sequence, item.parent, item.start, item.count] for item in work.sequences],
            }
            for work in call.steps
        ]
    if call.stateless is not None:
        body["span"] = [call.stateless.span.start, call.stateless.span.end]
        body["counts"] = list(call.stateless.counts)
    if call.session is not None:
        body["session"] = _encode_session(call.session)
        body["is_away"] = call.is_away
    return json.dumps(body, separators=(",", ":")).encode()


def decode_call(message: bytes) -> Call:
    """The call, with tensors that have still to be filled."""
    body = json.loads(message)
    tensors = [torch.empty(shape, dtype=parse_dtype(dtype)) for dtype, shape in body["tensors"]]
    name, now_s = str(body["name"]), float(body["now_s"])
    if "session" in body:
        return Call(name, now_s, session=_decode_session(body["session"]), is_away=bool(body["is_away"]))
    if "counts" in body:
        span, counts = Span(start=body["span"][0], end=body["span"][1]), body["counts"]
        if len(tensors) == 2:
            return Call(name, now_s, stateless=BackwardWork(span, counts, tensors[0], tensors[1], _nobody_waits))
        return Call(name, now_s, stateless=ForwardWork(span, counts, tensors[0], _nobody_waits))
    steps = [
        StepWork(
            _decode_session(step["session"]),
            Span(start=step["span"][0], end=step["span"][1]),
            [SequenceStep(*item) for item in step["sequences"]],
            hidden,
            _nobody_waits,
        )
        for step, hidden in zip(body.get("steps", ()), tensors, strict=True)
    ]
    return Call(name, now_s, steps=steps)


def name_dtype(dtype: torch.dtype) -> str:
    """`float32` and the like."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _encode_session(session: SessionKey) -> list[Any]:
    return [session[0].hex(), session[1]]


def _decode_session(value: Sequence[Any]) -> SessionKey:
    return bytes.fromhex(value[0]), int(value[1])


def _nobody_waits(output: torch.Tensor | None, error: BaseException | None) -> None:
    """Backends do not call on_done; the engine of the first process does."""
