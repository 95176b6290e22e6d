"""Tensors of a step: what goes into a part, what may come out of it, and whose rows are whose."""

# Letters: T tokens of all sequences in a part, H hidden size.

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.client.session.parts import SequenceRequest, StepPart
from swarm.datatypes import PeerId
from swarm.errors import PeerFaultError
from swarm.wire.frames import Frame
from swarm.wire.limits import HIDDEN_DTYPES

__all__ = ["check_output", "concatenate", "outputs_by_request", "rows_of"]


def concatenate(chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Chunks [*, H] as one [T, H]."""
    return torch.cat(list(chunks))


def rows_of(part: StepPart[torch.Tensor]) -> torch.Tensor:
    """All rows of a part, [T, H]."""
    if len(part.sequences) == 1:
        return part.sequences[0].rows
    return concatenate([item.rows for item in part.sequences])


def check_output(frame: Frame, part: StepPart[torch.Tensor], *, last_only: bool, peer: PeerId) -> torch.Tensor:
    """A hop's output [T, H], or the last row of each sequence that has any.

    Raises PeerFaultError when it can not be the output of this part.
    """
    counts = [len(item.rows) for item in part.sequences]
    num_rows = sum(count > 0 for count in counts) if last_only else sum(counts)
    shape = (num_rows, part.sequences[0].rows.shape[1])
    headers = frame.tensors
    if len(headers) != 1 or headers[0].shape != shape or headers[0].dtype not in HIDDEN_DTYPES:
        raise PeerFaultError(f"server {peer} answered with {[header.shape for header in headers]}, not {shape}")
    output = frame.tensor(0)
    if not output.isfinite().all():
        raise PeerFaultError(f"server {peer} answered with values that are no numbers")
    return output


def outputs_by_request(
    requests: Sequence[SequenceRequest[torch.Tensor]],
    parts: Sequence[StepPart[torch.Tensor]],
    results: Sequence[torch.Tensor],
    *,
    last_only: bool,
) -> list[torch.Tensor]:
    """Give each request its rows back, however the step was cut."""
    pieces: dict[int, list[torch.Tensor]] = {item.sequence: [] for item in requests}
    for part, result in zip(parts, results, strict=True):
        counts = [len(item.rows) for item in part.sequences]
        if last_only and result.shape[0] != sum(counts):
            counts = [min(count, 1) for count in counts]
        for item, rows in zip(part.sequences, result.split(counts), strict=True):
            pieces[item.sequence].append(rows)
    outputs: list[torch.Tensor] = []
    for item in requests:
        rows = [piece for piece in pieces[item.sequence] if len(piece)]
        if not rows:
            outputs.append(item.rows[:0])
        elif last_only:
            outputs.append(rows[-1][-1:])
        else:
            outputs.append(rows[0] if len(rows) == 1 else torch.cat(rows))
    return outputs
