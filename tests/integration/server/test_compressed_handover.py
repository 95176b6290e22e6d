"""Compressed sessions move between servers: bit for bit, with nothing of others, and nothing that is not possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from swarm.kvcache.compressed_state import CompressedState
from swarm.pb import node_pb2
from swarm.pb import session_pb2 as pb
from swarm.server.engine.page_transfer import PageExport, page_format
from swarm.server.engine.sequence_pages import HeldPages
from swarm.server.engine.session_memory import SessionMemory
from swarm.server.hosting import Hosting
from swarm.server.node import Node
from swarm.server.rpc.compressed_offers import compression_terms
from swarm.server.rpc.engine_calls import ask_engine
from swarm.server.rpc.handing_over import HandoverSender
from swarm.server.rpc.handover_offers import OfferedSession, write_offer
from swarm.server.rpc.sessions import SessionLimits
from swarm.wire.frames import decode_frame, encode_frame
from swarm.wire.methods import HANDOVER
from tests.raw_client import RawClient, RawStream, step_frame, step_message
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

HIDDEN_SIZE = 32
POLICY = "pyramid+gear"
LIMITS = SessionLimits(detach_grace_s=5.0, takeover_grace_s=0.5, yield_after_s=0.3)
MAX_LENGTH = 500
TOLERANCE = 0.04
"""Of outputs up to 10. Keys are rounded to 16 bit, so the last bit of a float32 sum can become that of a half, and tip
the balance between two tokens that matter nearly alike; a lost page would show in the first digit."""


@pytest.fixture(scope="module")
def swarm(llama: TinyLlama) -> Iterator[InProcessSwarm]:
    """Two servers that stay."""
    with InProcessSwarm(llama.folder, [(0, 6), (0, 6)], limits=LIMITS, kv_policy=POLICY) as swarm:
        assert [node.info.kv_policy for node in swarm.nodes] == [POLICY] * 2
        yield swarm


@pytest.fixture
def clients(swarm: InProcessSwarm) -> Iterator[tuple[RawClient, RawClient]]:
    """One of each server; at the end no session is left on either, and no page."""
    with RawClient(swarm.nodes[0].info) as source, RawClient(swarm.nodes[1].info) as target:
        yield source, target
    for node in swarm.nodes:
        wait_until(lambda node=node: is_idle(node), timeout_s=20.0)  # type: ignore[misc]
        hosting_of(node).sessions.moves.forget()
        check_integrity(swarm, node)


def rows(count: int, *, seed: int = 5) -> torch.Tensor:
    """[count, HIDDEN_SIZE]; longer ones begin with the shorter ones."""
    return torch.randn(MAX_LENGTH, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))[:count].clone()


def hosting_of(node: Node) -> Hosting:
    assert node._hosting is not None
    return node._hosting


def memory_of(node: Node) -> SessionMemory:
    memory = hosting_of(node).engine.memory
    assert memory is not None
    return memory


def check_integrity(swarm: InProcessSwarm, node: Node) -> None:
    async def check() -> None:
        await ask_engine(hosting_of(node).engine, memory_of(node).check_integrity)
        assert not memory_of(node).transfers

    swarm.run(check())


def result(stream: RawStream) -> torch.Tensor:
    reply = stream.receive()
    assert reply is not None and reply[0].HasField("result"), reply
    output: torch.Tensor = reply[1].tensor(0)
    return output


def run(stream: RawStream, step: int, start: int, end: int, *, seed: int = 5, **fields: Any) -> torch.Tensor:
    """Rows [start, end) as one step of one sequence; its output."""
    message = step_message(step, start=start, count=end - start, **fields)
    stream.send(step_frame(message, rows(end, seed=seed)[start:]))
    return result(stream)


@dataclass
class Copy:
    """A session as it would be handed over."""

    sequences: Mapping[int, HeldPages]
    contents: torch.Tensor
    """[pages, values of a page]"""
    message: node_pb2.HandoverOffer
    tables: npt.NDArray[np.int32] | None


def copy_of(swarm: InProcessSwarm, node: Node) -> Copy:
    """What a server would say of its only session."""
    hosting, memory = hosting_of(node), memory_of(node)

    async def read() -> Copy:
        (session,) = hosting.sessions.open_sessions()
        export = PageExport(memory, session.key, session.mirror.positions)
        try:
            sequences = await ask_engine(hosting.engine, export.begin)
            contents = await ask_engine(hosting.engine, lambda: export.read(0, len(export.pages)))
        finally:
            await ask_engine(hosting.engine, export.release)
        offered = OfferedSession(
            session_id=session.session_id,
            span=session.span,
            mirror=session.mirror,
            sequences=sequences,
            num_pages=len(contents),
            expected_tokens=session.expected_tokens,
        )
        terms = compression_terms(memory, hosting.sessions.sizes, hosting.model)
        message, tables = write_offer(offered, hosting.model, page_format(memory.store), terms)
        return Copy(sequences, contents, message, tables)

    return swarm.run(read())


def hand_over(swarm: InProcessSwarm, source: Node, target: Node) -> None:
    """Hand the only session of `source` over to `target`."""
    hosting = hosting_of(source)

    async def send() -> None:
        sender = HandoverSender(hosting.model, hosting.engine, hosting.sessions)
        try:
            await sender.hand_over(hosting.sessions.open_sessions()[0], target.info)
        finally:
            await sender.close()

    swarm.run(send())


def assert_same(left: Copy, right: Copy) -> None:
    """Also page by page, since both number a session's pages by their places in the tables."""
    assert left.sequences.keys() == right.sequences.keys()
    for number, part in left.sequences.items():
        there = right.sequences[number]
        for name, value in vars(part).items():
            if not name.endswith("pages"):
                assert np.array_equal(value, getattr(there, name)), name
        for ours, theirs in zip(part.page_lists(), there.page_lists(), strict=True):
            assert torch.equal(
                left.contents[ours.ravel()].view(torch.uint8), right.contents[theirs.ravel()].view(torch.uint8)
            )


MOMENTS = {
    "sinks alone": [3],
    "before the first event": [30, 1, 1],
    "an event that is due": [36],
    "right after a long prompt": [300],
    "later in the answer": [300, *[1] * 21],
    "after a second turn": [200, *[1] * 5, 150],
}


@pytest.mark.parametrize("steps", MOMENTS.values(), ids=MOMENTS)
def test_a_session_goes_on_bit_for_bit(
    swarm: InProcessSwarm, clients: tuple[RawClient, RawClient], steps: list[int]
) -> None:
    """The promise of a graceful leave holds for codes as it does for numbers: no token is computed again."""
    source, target = clients
    stream, message = source.open(max_length=MAX_LENGTH, max_sequences=2)
    length, step = 0, 0
    for count in steps:
        step += 1
        run(stream, step, length, length + count)
        length += count
    # How it would go on there: a fork of the very same bytes, as a prompt that is read again may be cut elsewhere.
    ends = [*range(length + 1, length + 41), length + 120]
    expected = []
    for start, end in zip([length, *ends], ends, strict=False):
        step += 1
        expected.append(run(stream, step, start, end, sequence=1, parent=0 if start == length else 1))
    before = copy_of(swarm, swarm.nodes[0])
    hand_over(swarm, *swarm.nodes)
    assert stream.failure().successor == target.server.peer_id
    assert_same(before, copy_of(swarm, swarm.nodes[1]))
    num_run = hosting_of(swarm.nodes[1]).engine.num_tokens_run
    again, opened = target.reopen(message, epoch=2, keep=(1, step))
    assert (opened.kept, list(opened.positions), opened.kv_policy) == (True, [length, length + 120], POLICY)
    for start, end, output in zip([length, *ends], ends, expected, strict=False):
        step += 1
        assert (run(again, step, start, end, epoch=2) - output).abs().max() < TOLERANCE
    assert hosting_of(swarm.nodes[1]).engine.num_tokens_run == num_run + 120
    again.close()


def test_forks_that_share_pages_still_share_them(swarm: InProcessSwarm, clients: tuple[RawClient, RawClient]) -> None:
    """Beams hold most pages together; a hand-over must neither multiply nor mix them."""
    source, target = clients
    stream, message = source.open(max_length=MAX_LENGTH, max_sequences=3)
    run(stream, 1, 0, 300)
    sequences = [pb.SequenceStep(sequence=number, parent=0, start=300, count=1) for number in (0, 1, 2)]
    stream.send(step_frame(pb.Step(epoch=1, step=2, sequences=sequences), rows(3, seed=9)))
    result(stream)
    before = copy_of(swarm, swarm.nodes[0])
    hand_over(swarm, *swarm.nodes)
    after = copy_of(swarm, swarm.nodes[1])
    assert_same(before, after)
    assert len(before.contents) == len(after.contents)
    again, opened = target.reopen(message, epoch=2, keep=(1, 2))
    assert list(opened.positions) == [301, 301, 301]
    for number in (0, 1, 2):
        run(again, 3 + number, 301, 321, epoch=2, sequence=number, parent=number, seed=20 + number)
        check_integrity(swarm, swarm.nodes[1])
    again.close()


def test_an_earlier_state_can_be_kept_at_the_successor(
    swarm: InProcessSwarm, clients: tuple[RawClient, RawClient]
) -> None:
    """The last answer may not have reached the client: it goes on from the step before, exactly."""
    source, target = clients
    stream, message = source.open(max_length=MAX_LENGTH)
    run(stream, 1, 0, 300)
    run(stream, 2, 300, 301)
    expected = run(stream, 3, 301, 302)
    hand_over(swarm, *swarm.nodes)
    again, opened = target.reopen(message, epoch=2, keep=(1, 2))
    assert list(opened.positions) == [301]
    assert (run(again, 4, 301, 302, epoch=2) - expected).abs().max() < TOLERANCE
    again.close()


def test_a_session_that_went_back_is_handed_over_as_it_is(
    swarm: InProcessSwarm, clients: tuple[RawClient, RawClient]
) -> None:
    """Kept at an earlier step, its pages still hold the later one; those tokens are nobody's."""
    source, target = clients
    stream, message = source.open(max_length=MAX_LENGTH)
    run(stream, 1, 0, 300)
    run(stream, 2, 300, 301)
    expected = run(stream, 3, 301, 302)
    stream.hang_up()
    middle, opened = source.reopen(message, epoch=2, keep=(1, 2))
    assert opened.kept
    hand_over(swarm, *swarm.nodes)
    again, opened = target.reopen(message, epoch=3, keep=(1, 2))
    assert list(opened.positions) == [301]
    assert (run(again, 4, 301, 302, epoch=3) - expected).abs().max() < TOLERANCE
    middle.close()
    again.close()


def test_a_session_in_host_memory_is_handed_over(swarm: InProcessSwarm, clients: tuple[RawClient, RawClient]) -> None:
    """What made room for others is no less a session; its copy is read where it lies."""
    source, target = clients
    stream, message = source.open(max_length=MAX_LENGTH)
    run(stream, 1, 0, 300)
    before = copy_of(swarm, swarm.nodes[0])
    memory, engine = memory_of(swarm.nodes[0]), hosting_of(swarm.nodes[0]).engine

    async def spill() -> None:
        assert await ask_engine(engine, lambda: memory._spill(memory._sessions[message.session_id, 1]))

    swarm.run(spill())
    hand_over(swarm, *swarm.nodes)
    assert_same(before, copy_of(swarm, swarm.nodes[1]))
    again, opened = target.reopen(message, epoch=2, keep=(1, 1))
    assert opened.kept
    run(again, 2, 300, 301, epoch=2)
    again.close()


def test_a_session_inside_an_input_stays(swarm: InProcessSwarm, clients: tuple[RawClient, RawClient]) -> None:
    """What its tokens will be judged by is not handed over; once the input has ended it can be."""
    source, target = clients
    stream, message = source.open(max_length=MAX_LENGTH)
    for step, (start, end) in enumerate([(0, 200), (200, 300)]):
        part = step_message(step + 1, start=start, count=end - start)
        part.sequences[0].unfinished = step == 0
        stream.send(step_frame(part, rows(end)[start:]))
        output = result(stream)
        if step == 0:
            with pytest.raises(Exception, match="middle of an input"):
                hand_over(swarm, *swarm.nodes)
            assert target.info().server.num_sessions == 0
    assert len(output) == 100
    hand_over(swarm, *swarm.nodes)
    again, opened = target.reopen(message, epoch=2, keep=(1, 2))
    assert (opened.kept, list(opened.positions)) == (True, [300])
    again.close()


def test_an_exact_session_of_a_compressing_server_moves_as_well(
    llama: TinyLlama, swarm: InProcessSwarm, clients: tuple[RawClient, RawClient]
) -> None:
    """Exact and compressed sessions stand side by side; both must survive a leave."""
    source, target = clients
    stream, message = source.open(max_length=MAX_LENGTH, kv_policy="none")
    run(stream, 1, 0, 300)
    hand_over(swarm, *swarm.nodes)
    again, opened = target.reopen(message, epoch=2, keep=(1, 1))
    assert (opened.kept, opened.kv_policy) == (True, "none")
    (expected,) = llama.blocks.run_stateless([rows(310)])
    assert (run(again, 2, 300, 310, epoch=2) - expected[300:]).abs().max() < 1e-4
    again.close()


@pytest.mark.parametrize("steps", [[3], [300], [300, *[1] * 9]], ids=["short", "after a prompt", "in an answer"])
def test_what_other_sessions_left_in_a_page_does_not_travel(
    swarm: InProcessSwarm, clients: tuple[RawClient, RawClient], steps: list[int]
) -> None:
    """Pages are used again without being wiped; unused tiles and slots may hold somebody else's conversation."""
    source, _ = clients
    node = swarm.nodes[0]
    memory = memory_of(node)

    async def soil() -> None:
        await ask_engine(hosting_of(node).engine, lambda: memory.store.bytes_as(torch.uint8).fill_(0xAB))

    swarm.run(soil())
    stream, _ = source.open(max_length=MAX_LENGTH)
    length = 0
    for index, count in enumerate(steps):
        run(stream, index + 1, length, length + count)
        length += count
    found = copy_of(swarm, node).contents.view(torch.uint8).flatten()
    assert not (found == 0xAB).unfold(0, 6, 1).all(dim=1).any()
    assert found.any()
    stream.close()


# -- hostile ---------------------------------------------------------------------------------------


def reply(stream: RawStream) -> node_pb2.HandoverReply:
    body = stream.receive_body()
    assert body is not None
    return decode_frame(body, node_pb2.HandoverReply)[0]


def send_offer(client: RawClient, copy: Copy) -> RawStream:
    stream = client.stream(HANDOVER)
    tensors = [torch.from_numpy(copy.tables)] if copy.tables is not None else []
    stream.send(encode_frame(node_pb2.HandoverRequest(offer=copy.message), tensors))
    return stream


def send_pages(stream: RawStream, contents: torch.Tensor) -> node_pb2.HandoverReply:
    stream.send(encode_frame(node_pb2.HandoverRequest(pages=node_pb2.HandoverPages(first=0)), [contents]))
    stream.send(encode_frame(node_pb2.HandoverRequest(end=node_pb2.HandoverEnd())))
    return reply(stream)


@pytest.fixture
def copy(swarm: InProcessSwarm, clients: tuple[RawClient, RawClient]) -> Copy:
    """An honest offer, to be made worse."""
    stream, _ = clients[0].open(max_length=MAX_LENGTH)
    run(stream, 1, 0, 300)
    made = copy_of(swarm, swarm.nodes[0])
    stream.close()
    return made


def test_an_honest_offer_is_taken(clients: tuple[RawClient, RawClient], copy: Copy) -> None:
    """The refusals below mean something only if this passes."""
    stream = send_offer(clients[1], copy)
    assert reply(stream).accepted
    assert send_pages(stream, copy.contents).accepted


def _table(place: int, value: int) -> Callable[[Copy], None]:
    def change(copy: Copy) -> None:
        assert copy.tables is not None
        copy.tables = copy.tables.copy()
        copy.tables[place] = value

    return change


def _tables(change: Callable[[Any], Any]) -> Callable[[Copy], None]:
    def made(copy: Copy) -> None:
        copy.tables = change(copy.tables)

    return made


def _message(change: Callable[[Any], Any]) -> Callable[[Copy], None]:
    return lambda copy: change(copy.message) and None


HEADS = 6 * 2
BAD_OFFERS: dict[str, tuple[Callable[[Copy], None], int]] = {
    "another policy": (_message(lambda m: setattr(m, "kv_policy", "gear")), pb.FAILURE_NOT_SERVED),
    "another calibration": (_message(lambda m: setattr(m.compressed, "rules_hash", "00" * 16)), pb.FAILURE_NOT_SERVED),
    "other tiles": (_message(lambda m: setattr(m.compressed, "tiles_per_page", 1)), pb.FAILURE_NOT_SERVED),
    "exact, with tables": (_message(lambda m: setattr(m, "kv_policy", "none")), pb.FAILURE_BAD_INPUT),
    "no tables": (_tables(lambda tables: None), pb.FAILURE_BAD_INPUT),
    "tables of bytes": (_tables(lambda tables: tables.view(np.uint8)), pb.FAILURE_BAD_INPUT),
    "tables of two dimensions": (_tables(lambda tables: tables[None]), pb.FAILURE_BAD_INPUT),
    "tables cut short": (_tables(lambda tables: tables[:-1]), pb.FAILURE_BAD_INPUT),
    "tables drawn out": (_tables(lambda tables: np.append(tables, np.int32(0))), pb.FAILURE_BAD_INPUT),
    "enormous tables": (_tables(lambda tables: np.zeros(2**21 + 1, dtype=np.int32)), pb.FAILURE_BAD_INPUT),
    "2^31 tiles": (_table(0, 2**31 - 1), pb.FAILURE_BAD_INPUT),
    "fewer than no tiles": (_table(0, -1), pb.FAILURE_BAD_INPUT),
    "dropped a billion": (_table(HEADS, 10**9), pb.FAILURE_BAD_INPUT),
    "a tile beyond": (_table(2 * HEADS, 2**31 - 1), pb.FAILURE_BAD_INPUT),
    "a tile before": (_table(2 * HEADS, -(2**31)), pb.FAILURE_BAD_INPUT),
    "a tile twice": (_tables(lambda t: np.append(t[:-1], t[-2])), pb.FAILURE_BAD_INPUT),
    "another end": (_message(lambda m: setattr(m.sequences[0].tail, "stored_end", 2**32 - 1)), pb.FAILURE_BAD_INPUT),
    "no end": (_message(lambda m: m.sequences[0].ClearField("tail")), pb.FAILURE_BAD_INPUT),
    "another length": (_message(lambda m: setattr(m.sequences[0], "length", 499)), pb.FAILURE_BAD_INPUT),
    "a page beyond": (_message(lambda m: m.sequences[0].tile_pages.__setitem__(0, 2**32 - 1)), pb.FAILURE_BAD_INPUT),
    "a page twice": (
        _message(lambda m: m.sequences[0].tile_pages.__setitem__(0, m.sequences[0].raw_pages[0])),
        pb.FAILURE_BAD_INPUT,
    ),
    "a page too few": (_message(lambda m: m.sequences[0].raw_pages.pop()), pb.FAILURE_BAD_INPUT),
    "pages of nobody": (_message(lambda m: setattr(m, "num_pages", 2**32 - 1)), pb.FAILURE_BAD_INPUT),
    "a checkpoint of another state": (
        _message(lambda m: setattr(m.checkpoints[0].tails[0], "stored_end", 260)),
        pb.FAILURE_BAD_INPUT,
    ),
}


@pytest.mark.parametrize(("wrong", "code"), BAD_OFFERS.values(), ids=BAD_OFFERS)
def test_a_bad_offer_is_refused(
    clients: tuple[RawClient, RawClient], copy: Copy, wrong: Callable[[Copy], None], code: int
) -> None:
    """Every number is checked before memory is taken for it; compiled code follows them later."""
    wrong(copy)
    stream = send_offer(clients[1], copy)
    answer = reply(stream)
    assert not answer.accepted and answer.failure.code == code, answer
    assert answer.failure.message
    assert stream.receive_body() is None


def keep_positions(node: Node, copy: Copy, content: torch.Tensor) -> None:
    """Have the copy's own positions of stored tokens in pages [n, bytes]: only those can be, and are, checked."""
    store = memory_of(node).compressed
    assert store is not None
    for part in copy.sequences.values():
        assert isinstance(part, CompressedState)
        pages = torch.from_numpy(part.tile_pages)[:, None]
        place = torch.arange(store.position_offset, store.score_offset)
        content[pages, place] = copy.contents.view(torch.uint8)[pages, place]


@pytest.mark.parametrize("position", [-1, 3, 276, 32767])
def test_a_position_that_can_not_be_is_refused(
    swarm: InProcessSwarm, clients: tuple[RawClient, RawClient], copy: Copy, position: int
) -> None:
    """The order of tokens decides which are kept, and what a window shows."""
    content = copy.contents.view(torch.uint8).clone()
    (part,) = copy.sequences.values()
    store = memory_of(swarm.nodes[1]).compressed
    assert isinstance(part, CompressedState) and store is not None
    page, tile = divmod(int(part.used_tiles()[-1]), store.layout.tiles_per_page)
    place = store.position_offset + 2 * store.layout.tile_rows * tile
    content[int(part.tile_pages[page]), place : place + 2] = torch.tensor([position], dtype=torch.int16).view(
        torch.uint8
    )
    stream = send_offer(clients[1], copy)
    assert reply(stream).accepted
    answer = send_pages(stream, content.view(copy.contents.dtype))
    assert not answer.accepted and "position" in answer.failure.message


@pytest.mark.parametrize("fill", ["ones", "zeros", "noise"])
def test_pages_full_of_noise_harm_nobody_else(
    swarm: InProcessSwarm, clients: tuple[RawClient, RawClient], copy: Copy, fill: str
) -> None:
    """Contents can not be checked; whoever sends noise gets noise, and others their own answers."""
    noise = torch.randint(0, 256, copy.contents.view(torch.uint8).shape, dtype=torch.uint8)
    content = {"ones": torch.full_like(noise, 255), "zeros": torch.zeros_like(noise), "noise": noise}[fill]
    keep_positions(swarm.nodes[1], copy, content)
    other, _ = clients[1].open(max_length=MAX_LENGTH)
    expected = [run(other, 1, 0, 300), *(run(other, 2 + index, 300 + index, 301 + index) for index in range(40))]
    other.close()
    beside, _ = clients[1].open(max_length=MAX_LENGTH)
    outputs = [run(beside, 1, 0, 300)]
    stream = send_offer(clients[1], copy)
    assert reply(stream).accepted
    assert send_pages(stream, content.view(copy.contents.dtype)).accepted
    opening = clients[1].open_message(
        session_id=copy.message.session_id, max_length=MAX_LENGTH, max_sequences=copy.message.max_sequences
    )
    again, opened = clients[1].reopen(opening, epoch=2, keep=(1, 1))
    assert opened.kept
    for index in range(40):
        start = 300 + index
        again.send(step_frame(step_message(2 + index, start=start, epoch=2), rows(start + 1)[start:]))
        outputs.append(run(beside, 2 + index, start, start + 1))
        assert again.receive() is not None
    again.send(step_frame(step_message(42, start=340, count=100, epoch=2), rows(440)[340:]))
    assert again.receive() is not None
    for output, right in zip(outputs, expected, strict=True):
        assert (output - right).abs().max() < TOLERANCE
    check_integrity(swarm, swarm.nodes[1])
    beside.close()
    again.close()
