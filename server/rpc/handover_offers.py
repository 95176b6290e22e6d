"""What a server offers when it hands a session over: written by the one that leaves, checked by the one that takes it.

Pure values. Nothing in an offer is believed: every number is checked before memory is taken for it.
"""

# Letters: L layers of a session's blocks.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from swarm.datatypes import AdapterHash, Span
from swarm.errors import BadInputError, LengthLimitError, NoRouteError
from swarm.kvcache.page_table import pages_for
from swarm.models.adapters.rows import NO_ADAPTER
from swarm.pb import node_pb2 as pb
from swarm.server.engine.page_transfer import PageFormat, SequencePages
from swarm.server.engine.work import SessionKey
from swarm.server.rpc.request_checks import SESSION_ID_BYTES, HostedModel, check_adapter, check_served
from swarm.server.session_mirror import Checkpoint, SessionMirror
from swarm.wire.limits import MAX_HANDOVER_PAGES_BYTES, MAX_SEQUENCES

__all__ = ["OfferedSession", "check_offer", "pages_in_a_message", "write_offer"]


@dataclass(frozen=True, kw_only=True)
class OfferedSession:
    """A session that may be taken over."""

    session_id: bytes
    span: Span
    mirror: SessionMirror
    sequences: Mapping[int, SequencePages]
    num_pages: int
    expected_tokens: int
    adapter: AdapterHash = NO_ADAPTER
    is_client_away: bool = False
    """Whether its client could not be told that it moves."""

    @property
    def key(self) -> SessionKey:
        return (self.session_id, self.mirror.epoch)

    @property
    def num_tokens(self) -> int:
        """Positions of all sequences."""
        return self.mirror.num_positions


def pages_in_a_message(page_format: PageFormat) -> int:
    """How many pages one message of a hand-over carries at most."""
    return max(1, MAX_HANDOVER_PAGES_BYTES // page_format.page_bytes)


def write_offer(session: OfferedSession, model: HostedModel, page_format: PageFormat) -> pb.HandoverOffer:
    """The offer of a session that this server holds."""
    mirror = session.mirror
    return pb.HandoverOffer(
        session_id=session.session_id,
        epoch=mirror.epoch,
        model_hash=model.model_hash,
        start=session.span.start,
        end=session.span.end,
        max_length=mirror.max_length,
        max_sequences=mirror.max_sequences,
        expected_tokens=session.expected_tokens,
        weights=model.weights,
        kv_policy=model.kv_policy,
        page_tokens=page_format.page_tokens,
        page_values=page_format.page_values,
        dtype=page_format.dtype,
        num_pages=session.num_pages,
        adapter=session.adapter,
        is_client_away=session.is_client_away,
        sequences=[
            pb.HandoverSequence(sequence=sequence, length=part.length, pages=part.pages.ravel().tolist())
            for sequence, part in session.sequences.items()
        ],
        checkpoints=[
            pb.HandoverCheckpoint(epoch=each.epoch, step=each.step, positions=each.positions)
            for each in mirror.checkpoints
        ],
    )


def check_offer(offer: pb.HandoverOffer, model: HostedModel, page_format: PageFormat) -> OfferedSession:
    """What is offered, if this server could go on with it.

    Raises NoRouteError (other blocks, precision, policy or pages than here), BadInputError, LengthLimitError.
    """
    if len(offer.session_id) != SESSION_ID_BYTES:
        raise BadInputError(f"a session id has {SESSION_ID_BYTES} bytes, not {len(offer.session_id)}")
    check_served(offer.model_hash, offer.start, offer.end, model)
    for name, theirs, ours in (
        ("weights", offer.weights, model.weights),
        ("KV policy", offer.kv_policy, model.kv_policy),
        ("tokens of a page", offer.page_tokens, page_format.page_tokens),
        ("values of a page", offer.page_values, page_format.page_values),
        ("precision of keys and values", offer.dtype, page_format.dtype),
    ):
        if theirs != ours:
            raise NoRouteError(f"a session of {name} {str(theirs)[:40]!r} can not go on here, where it is {ours!r}")
    if not 1 <= offer.max_length <= model.max_positions:
        raise LengthLimitError(
            f"max_length {offer.max_length} is outside 1..{model.max_positions}, the model's context"
        )
    if not 1 <= offer.max_sequences <= MAX_SEQUENCES:
        raise LengthLimitError(f"{offer.max_sequences} sequences are outside 1..{MAX_SEQUENCES}")
    span = Span(start=offer.start, end=offer.end)
    sequences = _check_sequences(offer, num_layers=len(span))
    return OfferedSession(
        session_id=offer.session_id,
        span=span,
        mirror=SessionMirror.restored(
            epoch=offer.epoch,
            max_length=offer.max_length,
            max_sequences=offer.max_sequences,
            positions=_positions(sequences),
            checkpoints=[Checkpoint(each.epoch, each.step, tuple(each.positions)) for each in offer.checkpoints],
        ),
        sequences=sequences,
        num_pages=offer.num_pages,
        expected_tokens=min(offer.expected_tokens, offer.max_length * offer.max_sequences),
        adapter=check_adapter(offer.adapter, model),
        is_client_away=offer.is_client_away,
    )


def _check_sequences(offer: pb.HandoverOffer, *, num_layers: int) -> dict[int, SequencePages]:
    sequences: dict[int, SequencePages] = {}
    for item in offer.sequences:
        if item.sequence >= offer.max_sequences or item.sequence in sequences:
            raise BadInputError(f"sequence {item.sequence} is offered twice, or is none of {offer.max_sequences}")
        if not 1 <= item.length <= offer.max_length:
            raise LengthLimitError(f"sequence {item.sequence} holds {item.length} of 1..{offer.max_length} positions")
        num_columns = pages_for(item.length, offer.page_tokens)
        if len(item.pages) != num_layers * num_columns:
            raise BadInputError(
                f"{item.length} positions in {num_layers} blocks take {num_layers * num_columns} pages, "
                f"not {len(item.pages)}"
            )
        pages = np.array(item.pages, dtype=np.int64)
        if int(pages.max()) >= offer.num_pages or len(np.unique(pages)) != len(pages):
            raise BadInputError(f"sequence {item.sequence} names a page twice, or one that is not offered")
        sequences[item.sequence] = SequencePages(item.length, pages.reshape(num_layers, num_columns))
    named = [part.pages.ravel() for part in sequences.values()]
    num_named = len(np.unique(np.concatenate(named))) if named else 0
    if num_named != offer.num_pages:
        raise BadInputError(f"{offer.num_pages} pages are offered, of which sequences hold {num_named}")
    return sequences


def _positions(sequences: Mapping[int, SequencePages]) -> Sequence[int]:
    """Per sequence, from sequence 0."""
    held = {sequence: part.length for sequence, part in sequences.items()}
    return [held.get(sequence, 0) for sequence in range(max(held, default=-1) + 1)]
