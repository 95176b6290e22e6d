"""What a leaving server says of compressed sessions, and what the receiver makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from swarm.datatypes import ModelHash, PeerId, Span
from swarm.errors import BadInputError, NoRouteError, SwarmError
from swarm.kvcache.compressed_layout import plan_layout
from swarm.kvcache.compressed_state import CompressedState
from swarm.kvcache.footprint import Footprint
from swarm.kvpolicy.budget import default_curve
from swarm.kvpolicy.settings import find_policy
from swarm.kvpolicy.streaming import TailState
from swarm.pb import node_pb2 as pb
from swarm.server.engine.page_transfer import PageFormat
from swarm.server.rpc import compressed_offers
from swarm.server.rpc.compressed_offers import CompressionTerms, write_tables
from swarm.server.rpc.handover_offers import OfferedSession, check_offer, write_offer
from swarm.server.rpc.request_checks import HostedModel
from swarm.server.session_mirror import Checkpoint, SessionMirror
from tests.compressed_states import make_state, number_pages

LAYERS, HEADS, DIM, PAGE_BYTES, ROW_BYTES = 6, 2, 16, 2048, 18
SPAN = Span(start=2, end=6)
POLICY = find_policy("pyramid+gear")
PAGES = PageFormat(page_tokens=16, page_values=512, dtype="float32", page_bytes=PAGE_BYTES)
MODEL = HostedModel(
    model_hash=ModelHash("ab" * 16),
    span=Span(start=0, end=LAYERS),
    hidden_size=32,
    max_positions=4096,
    kv_policy=POLICY.preset,
    weights="fp32",
    peer_id=PeerId("peer"),
)
FOOTPRINT = Footprint(
    policy=POLICY,
    curve=default_curve(LAYERS, HEADS),
    layers=tuple(range(LAYERS)),
    num_kv_heads=HEADS,
    key_dim=DIM,
    value_dim=DIM,
    row_bytes=ROW_BYTES,
    page_bytes=PAGE_BYTES,
    max_positions=4096,
)
LAYOUT = plan_layout(
    POLICY,
    page_bytes=PAGE_BYTES,
    num_layers=LAYERS,
    num_kv_heads=HEADS,
    key_dim=DIM,
    value_dim=DIM,
    row_bytes=ROW_BYTES,
    position_bytes=2,
    has_scores=True,
)
TERMS = CompressionTerms(
    layout=LAYOUT,
    footprint=FOOTPRINT,
    pages=pb.CompressedPages(
        rules_hash="cd" * 16,
        page_bytes=PAGE_BYTES,
        num_kv_heads=HEADS,
        tile_rows=16,
        tiles_per_page=LAYOUT.tiles_per_page,
        row_bytes=ROW_BYTES,
        position_bytes=2,
        has_scores=True,
        slots_per_page=LAYOUT.slots_per_page,
        num_sinks=4,
        tail_slots=32,
        raw_dtype="float16",
    ),
)


def state_of(length: int, **others: Any) -> CompressedState:
    return make_state(LAYOUT.for_layers(len(SPAN)), FOOTPRINT, length, first_layer=SPAN.start, **others)


def offered_session() -> OfferedSession:
    """Two beams of one prompt, with a sequence between them that holds nothing, and three steps to go back to."""
    first = state_of(705, compressed_at=700)
    own = first.raw_pages + 1000
    states = {0: first, 2: replace(first, length=703, staged_start=703, input_start=703, raw_pages=own)}
    numbers = np.unique(
        np.concatenate([part for each in states.values() for part in (each.raw_pages, each.tile_pages)])
    )
    states = {key: each.map_pages(lambda pages: np.searchsorted(numbers, pages)) for key, each in states.items()}
    new, tail = TailState(POLICY.num_sinks), first.tail
    mirror = SessionMirror.restored(
        epoch=3,
        max_length=2048,
        max_sequences=4,
        policy=POLICY,
        positions=(705, 0, 703),
        tails=(tail, new, tail),
        checkpoints=[
            Checkpoint(1, 4, (700,), (tail,)),
            Checkpoint(3, 1, (701, 0, 700), (tail, new, tail)),
            Checkpoint(3, 2, (705, 0, 703), (tail, new, tail)),
        ],
    )
    return OfferedSession(
        session_id=bytes(16),
        span=SPAN,
        mirror=mirror,
        sequences=states,
        num_pages=number_pages(states),
        expected_tokens=2000,
    )


@dataclass
class Offer:
    """What travels."""

    message: pb.HandoverOffer
    tables: npt.NDArray[np.int32] | None

    def check(self, **others: Any) -> OfferedSession:
        settings: dict[str, Any] = {"model": MODEL, "page_format": PAGES, "terms": TERMS, "tables": self.tables}
        return check_offer(self.message, **(settings | others))


@pytest.fixture
def offer() -> Offer:
    message, tables = write_offer(offered_session(), MODEL, PAGES, TERMS)
    return Offer(pb.HandoverOffer.FromString(message.SerializeToString()), tables)


def test_what_was_written_is_read(offer: Offer) -> None:
    """The successor's tables must be the leaving server's, number by number."""
    sent, received = offered_session(), offer.check()
    assert received.sequences.keys() == sent.sequences.keys()
    for number, part in sent.sequences.items():
        there = received.sequences[number]
        assert isinstance(part, CompressedState) and isinstance(there, CompressedState)
        for name, value in vars(part).items():
            assert np.array_equal(getattr(there, name), value), name
    assert received.mirror == sent.mirror
    assert received.num_pages == sent.num_pages and received.key == sent.key


def test_checkpoints_inside_an_input_are_not_offered() -> None:
    """Nobody could go back to them, and their states would be refused."""
    session = offered_session()
    checkpoint = Checkpoint(3, 3, (705, 0, 703), (TailState(676, True, 700),) * 3)
    session.mirror._checkpoints.append(checkpoint)
    message, _ = write_offer(session, MODEL, PAGES, TERMS)
    assert [each.step for each in message.checkpoints] == [4, 1, 2]


def test_an_exact_session_of_a_compressing_server_is_offered_as_one() -> None:
    """It may go to any server with pages of the size, whatever that one's policy."""
    message = pb.HandoverOffer(kv_policy="none", model_hash=MODEL.model_hash, start=2, end=6, session_id=bytes(16))
    message.max_length = message.max_sequences = message.epoch = 1
    message.weights, message.page_tokens, message.page_values, message.dtype = "fp32", 16, 512, "float32"
    assert not Offer(message, None).check(terms=None).mirror.policy.compresses
    with pytest.raises(BadInputError):
        Offer(message, np.zeros(0, dtype=np.int32)).check()
    message.compressed.CopyFrom(TERMS.pages)
    with pytest.raises(BadInputError):
        Offer(message, None).check()


def _other_value(field: Any, value: Any) -> Any:
    if field.type == field.TYPE_STRING:
        return "ef" * 16
    return not value if field.type == field.TYPE_BOOL else value + 1


@pytest.mark.parametrize("field", list(pb.CompressedPages.DESCRIPTOR.fields), ids=lambda field: str(field.name))
def test_pages_that_are_cut_otherwise_are_refused(offer: Offer, field: Any) -> None:
    """Codes of one layout, or under one calibration, are noise in another."""
    setattr(offer.message.compressed, field.name, _other_value(field, getattr(offer.message.compressed, field.name)))
    with pytest.raises(NoRouteError, match=field.name):
        offer.check()


def _change(change: Callable[[pb.HandoverOffer], Any]) -> Callable[[Offer], None]:
    return lambda offer: change(offer.message) and None


def _cut(count: int) -> Callable[[Offer], None]:
    def change(offer: Offer) -> None:
        assert offer.tables is not None
        offer.tables = offer.tables[:count]

    return change


def _extend(offer: Offer) -> None:
    assert offer.tables is not None
    offer.tables = np.append(offer.tables, np.int32(0))


def _set(place: int, value: int) -> Callable[[Offer], None]:
    def change(offer: Offer) -> None:
        assert offer.tables is not None
        offer.tables[place] = value

    return change


NUM_HEADS = len(SPAN) * HEADS
WRONG: dict[str, tuple[Callable[[Offer], None], type[SwarmError]]] = {
    "another policy": (_change(lambda m: setattr(m, "kv_policy", "gear")), NoRouteError),
    "no policy": (_change(lambda m: setattr(m, "kv_policy", "")), NoRouteError),
    "exact, with tables": (_change(lambda m: setattr(m, "kv_policy", "none")), BadInputError),
    "no description of pages": (_change(lambda m: m.ClearField("compressed")), NoRouteError),
    "another size of pages": (_change(lambda m: setattr(m, "page_values", 513)), NoRouteError),
    "no tables": (lambda offer: setattr(offer, "tables", None), BadInputError),
    "empty tables": (_cut(0), BadInputError),
    "tables that end early": (_cut(-1), BadInputError),
    "tables of one sequence": (_cut(NUM_HEADS), BadInputError),
    "tables that go on": (_extend, BadInputError),
    "a negative number of tiles": (_set(0, -1), BadInputError),
    "2^31 tiles": (_set(0, 2**31 - 1), BadInputError),
    "one tile more": (lambda offer: _set(0, int(offer.tables[0]) + 1)(offer), BadInputError),  # type: ignore[index]
    "dropped a billion": (_set(NUM_HEADS, 10**9), BadInputError),
    "a tile that is not there": (_set(2 * NUM_HEADS, 10**6), BadInputError),
    "a tile before the first": (_set(2 * NUM_HEADS, -1), BadInputError),
    "no tail": (_change(lambda m: m.sequences[0].ClearField("tail")), BadInputError),
    "another stored end": (_change(lambda m: setattr(m.sequences[0].tail, "stored_end", 660)), BadInputError),
    "an event in the future": (_change(lambda m: setattr(m.sequences[0].tail, "compressed_at", 706)), BadInputError),
    "an event of 2^32": (_change(lambda m: setattr(m.sequences[0].tail, "compressed_at", 2**32 - 1)), BadInputError),
    "uncompressed pages": (_change(lambda m: m.sequences[0].pages.append(0)), BadInputError),
    "a page too few": (_change(lambda m: m.sequences[0].raw_pages.pop()), BadInputError),
    "a page too many": (_change(lambda m: m.sequences[0].raw_pages.append(0)), BadInputError),
    "a tile page too few": (_change(lambda m: m.sequences[0].tile_pages.pop()), BadInputError),
    "a tile page too many": (_change(lambda m: m.sequences[0].tile_pages.append(0)), BadInputError),
    "a page that is not offered": (
        _change(lambda m: m.sequences[0].raw_pages.__setitem__(0, 2**32 - 1)),
        BadInputError,
    ),
    "pages of nobody": (_change(lambda m: setattr(m, "num_pages", m.num_pages + 1)), BadInputError),
    "pages without sequences": (_change(lambda m: m.ClearField("sequences")), BadInputError),
    "a sequence missing": (_change(lambda m: m.sequences.pop()), BadInputError),
    "a checkpoint without states": (_change(lambda m: m.checkpoints[0].ClearField("tails")), BadInputError),
    "a checkpoint of another state": (
        _change(lambda m: setattr(m.checkpoints[0].tails[0], "stored_end", 5)),
        BadInputError,
    ),
    "a checkpoint before its event": (_change(lambda m: m.checkpoints[0].positions.__setitem__(0, 690)), BadInputError),
}


@pytest.mark.parametrize(("wrong", "error"), WRONG.values(), ids=WRONG)
def test_a_bad_offer_is_refused(offer: Offer, wrong: Callable[[Offer], None], error: type[SwarmError]) -> None:
    """Every number is the other side's, and compiled code follows it."""
    wrong(offer)
    with pytest.raises(error):
        offer.check()


def test_a_server_without_a_policy_takes_no_compressed_session(offer: Offer) -> None:
    """It has nothing to read the codes with."""
    with pytest.raises(NoRouteError):
        offer.check(terms=None)
    with pytest.raises(NoRouteError):
        offer.check(model=replace(MODEL, kv_policy="none"), terms=None)


def test_tables_are_not_blown_up(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head with a million tiles would make tables for all heads of that size."""
    assert offer.tables is not None
    most = max(int(offer.tables[:NUM_HEADS].max()), 1)
    monkeypatch.setattr(compressed_offers, "_MAX_TABLE_BYTES", 2 * NUM_HEADS * most * 4)
    offer.check()
    monkeypatch.setattr(compressed_offers, "_MAX_TABLE_BYTES", 2 * NUM_HEADS * most * 4 - 1)
    with pytest.raises(BadInputError, match="bytes"):
        offer.check()


def test_an_empty_session_has_empty_tables() -> None:
    """It was opened, and no step has come yet."""
    assert len(write_tables([])) == 0
    mirror = SessionMirror(epoch=1, max_length=64, max_sequences=1, policy=POLICY)
    session = replace(offered_session(), mirror=mirror, sequences={}, num_pages=0)
    message, tables = write_offer(session, MODEL, PAGES, TERMS)
    received = Offer(message, tables).check()
    assert not received.sequences and received.mirror == mirror
