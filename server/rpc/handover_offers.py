"""What a server offers when it hands a session over: written by the one that leaves, checked by the one that takes it.

Pure values. Nothing in an offer is believed: every number is checked before memory is taken for it.
"""

# Letters: L layers of a session's blocks.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm.datatypes import AdapterHash, Span
from swarm.errors import BadInputError, LengthLimitError, NoRouteError
from swarm.kvcache.compressed_checks import check_tail
from swarm.kvcache.compressed_state import CompressedState
from swarm.kvcache.page_table import pages_for
from swarm.kvpolicy.settings import FULL_CACHE, KVPolicy
from swarm.kvpolicy.streaming import TailState, new_tail
from swarm.models.adapters.rows import NO_ADAPTER
from swarm.pb import node_pb2 as pb
from swarm.server.engine.page_transfer import PageFormat
from swarm.server.engine.sequence_pages import HeldPages, SequencePages
from swarm.server.engine.work import SessionKey
from swarm.server.rpc.compressed_offers import (
    CompressionTerms,
    read_states,
    read_tail,
    write_sequences,
    write_tables,
    write_tail,
)
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
    sequences: Mapping[int, HeldPages]
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


def write_offer(
    session: OfferedSession, model: HostedModel, page_format: PageFormat, terms: CompressionTerms | None = None
) -> tuple[pb.HandoverOffer, npt.NDArray[np.int32] | None]:
    """The offer of a session that this server holds, and the tables that go with it if it is compressed.

    Args:
        terms: how this server keeps compressed sessions; None where it holds none.
    """
    mirror = session.mirror
    offer = pb.HandoverOffer(
        session_id=session.session_id,
        epoch=mirror.epoch,
        model_hash=model.model_hash,
        start=session.span.start,
        end=session.span.end,
        max_length=mirror.max_length,
        max_sequences=mirror.max_sequences,
        expected_tokens=session.expected_tokens,
        weights=model.weights,
        kv_policy=mirror.policy.preset,
        page_tokens=page_format.page_tokens,
        page_values=page_format.page_values,
        dtype=page_format.dtype,
        num_pages=session.num_pages,
        adapter=session.adapter,
        is_client_away=session.is_client_away,
        checkpoints=[
            pb.HandoverCheckpoint(
                epoch=each.epoch,
                step=each.step,
                positions=each.positions,
                tails=[write_tail(tail) for tail in each.tails],
            )
            for each in mirror.checkpoints
            if not any(tail.is_staging for tail in each.tails)  # nobody could go back there
        ],
    )
    if not mirror.policy.compresses or terms is None:
        exact = {number: part for number, part in session.sequences.items() if isinstance(part, SequencePages)}
        offer.sequences.extend(
            pb.HandoverSequence(sequence=number, length=part.length, pages=part.pages.ravel().tolist())
            for number, part in exact.items()
        )
        return offer, None
    states = {number: part for number, part in session.sequences.items() if isinstance(part, CompressedState)}
    offer.compressed.CopyFrom(terms.pages)
    offer.sequences.extend(write_sequences(states))
    return offer, write_tables(states.values())


def check_offer(
    offer: pb.HandoverOffer,
    model: HostedModel,
    page_format: PageFormat,
    *,
    terms: CompressionTerms | None = None,
    tables: npt.NDArray[np.int32] | None = None,
) -> OfferedSession:
    """What is offered, if this server could go on with it.

    Args:
        terms: how this server keeps compressed sessions; None where it takes none.
        tables: what came with the offer, [numbers].

    Raises NoRouteError (other blocks, precision, policy or pages than here), BadInputError, LengthLimitError.
    """
    if len(offer.session_id) != SESSION_ID_BYTES:
        raise BadInputError(f"a session id has {SESSION_ID_BYTES} bytes, not {len(offer.session_id)}")
    check_served(offer.model_hash, offer.start, offer.end, model)
    compresses = offer.kv_policy != FULL_CACHE.preset
    for name, theirs, ours in (
        ("weights", offer.weights, model.weights),
        ("KV policy", offer.kv_policy, model.kv_policy if compresses else FULL_CACHE.preset),
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
    _check_lengths(offer)
    sequences: Mapping[int, HeldPages]
    if compresses:
        sequences = _check_compressed(offer, terms, tables, span)
    elif tables is not None or offer.HasField("compressed"):
        raise BadInputError("tables of compressed sequences came with a session that is not compressed")
    else:
        sequences = _check_sequences(offer, num_layers=len(span))
    return OfferedSession(
        session_id=offer.session_id,
        span=span,
        mirror=_restore_mirror(offer, sequences, model.policy if compresses else FULL_CACHE),
        sequences=sequences,
        num_pages=offer.num_pages,
        expected_tokens=min(offer.expected_tokens, offer.max_length * offer.max_sequences),
        adapter=check_adapter(offer.adapter, model),
        is_client_away=offer.is_client_away,
    )


def _restore_mirror(offer: pb.HandoverOffer, sequences: Mapping[int, HeldPages], policy: KVPolicy) -> SessionMirror:
    """Raises BadInputError, LengthLimitError."""
    num_sequences = max(sequences, default=-1) + 1
    lengths = [sequences[number].length if number in sequences else 0 for number in range(num_sequences)]
    tails: list[TailState] = []
    if policy.compresses:
        states = {number: part for number, part in sequences.items() if isinstance(part, CompressedState)}
        tails = [states[number].tail if number in states else new_tail(policy) for number in range(num_sequences)]
    checkpoints: list[Checkpoint] = []
    for each in offer.checkpoints:
        then = tuple(read_tail(tail) for tail in each.tails)
        if len(then) != (len(each.positions) if policy.compresses else 0):
            raise BadInputError(f"{len(then)} states were handed over for a checkpoint of {len(each.positions)}")
        for length, tail in zip(each.positions, then, strict=False):
            check_tail(policy, length, tail)
        checkpoints.append(Checkpoint(each.epoch, each.step, tuple(each.positions), then))
    return SessionMirror.restored(
        epoch=offer.epoch,
        max_length=offer.max_length,
        max_sequences=offer.max_sequences,
        positions=lengths,
        checkpoints=checkpoints,
        policy=policy,
        tails=tails,
    )


def _check_lengths(offer: pb.HandoverOffer) -> None:
    seen: set[int] = set()
    for item in offer.sequences:
        if item.sequence >= offer.max_sequences or item.sequence in seen:
            raise BadInputError(f"sequence {item.sequence} is offered twice, or is none of {offer.max_sequences}")
        if not 1 <= item.length <= offer.max_length:
            raise LengthLimitError(f"sequence {item.sequence} holds {item.length} of 1..{offer.max_length} positions")
        seen.add(item.sequence)


def _check_compressed(
    offer: pb.HandoverOffer, terms: CompressionTerms | None, tables: npt.NDArray[np.int32] | None, span: Span
) -> dict[int, CompressedState]:
    if terms is None:
        raise NoRouteError("compressed sessions can not go on here")
    if tables is None:
        raise BadInputError("the tables of a compressed session are missing")
    terms.check_pages(offer.compressed)
    return read_states(offer, tables, terms, span)


def _check_sequences(offer: pb.HandoverOffer, *, num_layers: int) -> dict[int, SequencePages]:
    sequences: dict[int, SequencePages] = {}
    for item in offer.sequences:
        if item.raw_pages or item.tile_pages or item.HasField("tail"):
            raise BadInputError(f"sequence {item.sequence} of a session that is not compressed names compressed pages")
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
