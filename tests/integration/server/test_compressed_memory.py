"""Exact and compressed sessions in one memory: each finds its own tokens, whatever the others do."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from swarm.errors import BadInputError, LengthLimitError, SessionStateError
from swarm.kvpolicy.settings import KVPolicy
from swarm.kvpolicy.streaming import next_cut
from swarm.server.engine.compressed_sequence import CompressedSequence
from swarm.server.engine.memory_bounds import longest_input
from swarm.server.engine.page_transfer import PageExport, PageImport
from swarm.server.engine.session_memory import MemoryConfig, SessionMemory
from swarm.server.engine.work import SessionKey, StepWork
from swarm.server.session_mirror import SequenceStep
from tests.compressed_memory import PAGE_TOKENS, PRUNING, QUANTISING, SPAN, MemoryServer

A, B = (b"a", 1), (b"b", 1)
EXACT = (B,)


@pytest.fixture(params=[PRUNING, QUANTISING], ids=["pruning", "quantising"])
def policy(request: pytest.FixtureRequest) -> KVPolicy:
    policy: KVPolicy = request.param
    return policy


def sequence_of(server: MemoryServer, key: SessionKey, sequence: int = 0) -> CompressedSequence:
    held = server.memory._sessions[key].sequences[sequence]
    assert isinstance(held, CompressedSequence)
    return held


def hand_over(source: MemoryServer, target: MemoryServer, key: SessionKey) -> None:
    """Everything that is held, in slices of three pages."""
    names = source.tokens[key]
    export = PageExport(source.memory, key, [len(names.get(each, [])) for each in range(max(names) + 1)])
    sequences = export.begin()
    compresses = source.memory._sessions[key].compresses
    arriving = PageImport(target.memory, key, SPAN, sequences, num_pages=len(export.pages))
    arriving.begin()
    for first in range(0, len(export.pages), 3):
        arriving.load(first, export.read(first, 3))
    export.release()
    arriving.finish()
    assert target.memory._sessions[key].compresses == compresses
    target.tokens[key] = {sequence: list(held) for sequence, held in names.items() if held}


def random_items(chance: random.Random, server: MemoryServer, key: SessionKey) -> list[SequenceStep]:
    """One step: some sequences go on, are set back, or are forked."""
    held = server.tokens.get(key, {})
    session = server.memory._sessions.get(key)
    compresses = key not in EXACT
    items: list[SequenceStep] = []
    for sequence in chance.sample(range(3), chance.choice([1, 1, 1, 2, 3])):
        parent = chance.choice([sequence, sequence, sequence, *held])
        start = length = len(held.get(parent, []))
        if chance.random() < 0.15:
            start = chance.randint(max(0, length - 3), length)
        if chance.random() < 0.02:
            start = 0
        count = chance.choice([1, 1, 1, 1, 1, 2, 5, 20, 40])
        if compresses:
            parents = session.sequences.get(parent) if session is not None and session.spilled is None else None
            if parents is None or not parents.can_rewind(start):
                start = length
            count = min(count, next_cut(server.policy, start) - start)
        is_unfinished = compresses and chance.random() < 0.15
        items.append(SequenceStep(sequence, parent, start, count, is_unfinished=is_unfinished))
    return items


def forget_lost(server: MemoryServer) -> None:
    """Sessions that were closed to make room are the clients' to replay."""
    for lost in [each for each in server.tokens if server.memory.has_lost(each)]:
        del server.tokens[lost]
        server.memory.forget(lost)


@pytest.mark.parametrize("seed", range(8))
def test_random_sessions_of_both_kinds_keep_their_tokens(seed: int) -> None:
    """One page too few or one tile too many, and some session answers with another one's tokens."""
    chance = random.Random(seed)
    policy = PRUNING if seed % 2 else QUANTISING
    config = MemoryConfig(page_tokens=PAGE_TOKENS, prefix_memory_bytes=0, spill_memory_bytes=80_000)
    server = MemoryServer(policy, num_pages=260 if seed < 4 else 160, config=config)
    other = MemoryServer(policy, num_pages=300, config=config)
    keys = [A, B, (b"c", 1), (b"d", 1)]
    happened: Counter[str] = Counter()
    for count in range(150):
        key = chance.choice(keys)
        chosen = chance.random()
        if chosen < 0.08:
            server.clock.now_s += 4
        elif chosen < 0.10:
            server.memory.forget(key)
            server.tokens.pop(key, None)
        elif chosen < 0.12:
            server.clock.now_s += 4 if server.memory.spilled_bytes else 700  # nobody is to wait for ever
        elif chosen < 0.2 and key in server.tokens:
            try:
                hand_over(server, other, key)
            except SessionStateError:
                assert key not in EXACT  # it stands inside an input
            else:
                happened["moved"] += 1
                other.check()
                other.memory.forget(key)
                other.tokens.clear()
        else:
            try:
                items = random_items(chance, server, key)
                while not server.step(key, items, compresses=key not in EXACT):
                    happened["waited"] += 1
                    server.memory.check_integrity()
                    server.clock.now_s += 4
                happened["run"] += 1
            except (LengthLimitError, SessionStateError) as error:
                happened[type(error).__name__] += 1
                server.memory.forget(key)
                server.tokens.pop(key, None)
        forget_lost(server)
        server.memory.check_integrity()
        if count % 5 == 4:
            server.check()
    server.check()
    assert happened["run"] > 40 and happened["moved"] and server.memory.num_spills, happened
    for key in keys:
        server.memory.forget(key)
    for memory in (server.memory, other.memory):
        memory.update_free()
        memory.check_integrity()
        assert memory.store.pool.num_free == memory.store.pool.num_pages
        assert memory.num_tokens_free == memory.num_tokens_total and not memory.spilled_bytes


def test_a_long_prompt_is_compressed_at_its_end_only_and_gives_its_pages_back(policy: KVPolicy) -> None:
    """What makes a context cheap: after the prompt only the policy's pages stay."""
    server = MemoryServer(policy)
    for count, is_unfinished in ((20, True), (20, True), (15, False)):
        server.feed(A, count, is_unfinished=is_unfinished)
        server.check()
        staged = sequence_of(server, A).table.staged
        assert staged.length == (len(server.tokens[A][0]) if is_unfinished else 0)
    num_pages = server.page_store.pool.num_pages - server.page_store.pool.num_free
    assert num_pages * server.page_store.page_bytes == server.footprint.sequence_bytes(55)
    assert num_pages * server.page_store.page_bytes < server.footprint.full_bytes(55)


def test_an_input_that_crosses_a_chunk_is_compressed_there(policy: KVPolicy) -> None:
    """So that a prompt of any length fits beside what is stored."""
    server = MemoryServer(policy)
    server.feed(A, 150, is_unfinished=True)
    server.check()
    state = sequence_of(server, A).table.state()
    assert state.tail.is_staging and state.staged_start == 128 and state.num_staged == 22
    server.feed(A, 1)
    server.check()
    state = sequence_of(server, A).table.state()
    assert not state.tail.is_staging and not state.num_staged


def test_an_answer_token_by_token_holds_what_a_replay_in_one_piece_holds(policy: KVPolicy) -> None:
    """Compression may not cost more pages the longer the answer lasts."""
    server = MemoryServer(policy)
    server.feed(A, 30)
    for _ in range(60):
        server.feed(A, 1)
        server.check()
    held = sequence_of(server, A).table
    num_tiles = -(-int(held.num_tiles.sum()) // held.layout.tiles_per_page)
    assert len(held.tile_pages) <= num_tiles + 1
    assert held.staged.num_pages == 0


def test_beams_share_pages_until_one_writes(policy: KVPolicy) -> None:
    """Beam search over a long context must not cost as many contexts as beams."""
    server = MemoryServer(policy)
    server.feed(A, 60)
    before = server.page_store.pool.num_free
    items = [SequenceStep(sequence, 0, 60, 1) for sequence in range(3)]
    assert server.step(A, items, compresses=True)
    server.check()
    num_raw = sequence_of(server, A).table.layout.num_raw_pages
    assert before - server.page_store.pool.num_free <= 2 * num_raw
    for _ in range(6):
        length = len(server.tokens[A][0])
        items = [SequenceStep(sequence, 2 - sequence, length, 1) for sequence in range(3)]
        assert server.step(A, items, compresses=True)
        server.check()
    usage = server.memory.usage
    assert 0 <= usage.wasted_bytes < usage.used_bytes


def test_what_can_not_be_gone_back_to_is_refused_in_a_sentence(policy: KVPolicy) -> None:
    """The client then replays; silently other tokens would be the wrong answer."""
    server = MemoryServer(policy)
    server.feed(A, 60)
    server.feed(A, 1)
    for item in (SequenceStep(0, 0, 59, 1), SequenceStep(1, 0, 30, 1)):
        with pytest.raises(SessionStateError, match="compressed form and can not go back"):
            server.step(A, [item], compresses=True)
    assert server.step(A, [SequenceStep(0, 0, 60, 2)], compresses=True)
    server.check()


def test_a_prompt_that_can_never_be_read_says_so() -> None:
    """An operator must learn that memory is short for reading, though the compressed session would fit."""
    server = MemoryServer(PRUNING, num_pages=30)
    with pytest.raises(LengthLimitError, match="until it has been read it stands uncompressed"):
        server.step(A, [SequenceStep(0, 0, 0, 60)], compresses=True)
    server.memory.forget(A)
    server.memory.check_integrity()
    assert server.page_store.pool.num_free == 30


@pytest.mark.parametrize("num_pages", [10, 30, 45])
def test_the_longest_input_is_told_to_the_token(policy: KVPolicy, num_pages: int) -> None:
    """A person shortens a prompt by that number, so it must fit then; and less must not be asked of anybody."""
    server = MemoryServer(policy, num_pages=num_pages)
    compression = server.memory._compression
    assert compression is not None
    longest = longest_input(compression, SPAN, num_pages=num_pages)
    assert 0 < longest < policy.chunk_tokens
    with pytest.raises(LengthLimitError, match=f" {longest} tokens fit like this"):
        server.step(A, [SequenceStep(0, 0, 0, longest + 1)], compresses=True)
    server.memory.forget(A)
    assert server.step(A, [SequenceStep(0, 0, 0, longest)], compresses=True)
    server.check()


def test_memory_for_a_whole_chunk_takes_inputs_of_any_length(policy: KVPolicy) -> None:
    """Nothing is said about the length of inputs then."""
    server = MemoryServer(policy, num_pages=200)
    compression = server.memory._compression
    assert compression is not None
    assert longest_input(compression, SPAN, num_pages=200) == policy.chunk_tokens


def test_a_compressed_session_that_outgrows_the_server_is_told_so() -> None:
    """Its inputs are short, so the sentence is about the session."""
    server = MemoryServer(QUANTISING, num_pages=40)

    def talk() -> None:
        for _ in range(200):
            server.feed(A, 2)

    with pytest.raises(LengthLimitError, match=r"session outgrows .* holds about \d+ compressed tokens in all;"):
        talk()
    server.check()


def test_a_session_makes_room_and_comes_back_in_the_middle_of_an_input(policy: KVPolicy) -> None:
    """Pressure must not cost a client its prompt."""
    server = MemoryServer(policy, num_pages=100)
    server.feed(A, 50, is_unfinished=True)
    server.clock.now_s += 10
    server.feed(B, 100, compresses=False)
    assert server.memory._sessions[A].spilled is not None
    server.check()
    server.clock.now_s += 10
    server.feed(A, 10)
    assert server.memory._sessions[A].spilled is None and server.memory.num_spills >= 2
    server.check()


def num_note_bytes(server: MemoryServer, key: SessionKey) -> int:
    """What the session's sequences really hold beside the pool."""
    held = server.memory._sessions[key].sequences
    tensors = [
        tensor
        for sequence in held
        for tensor in (
            sequence_of(server, key, sequence).staged_scores,
            sequence_of(server, key, sequence).staged_queries,
        )
        if tensor is not None
    ]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_begun_inputs_can_not_be_forked_for_nothing() -> None:
    """Each fork of a begun input gets scores and queries of its own beside the pool: their room is taken from it."""
    config = MemoryConfig(page_tokens=PAGE_TOKENS, prefix_memory_bytes=0, spill_memory_bytes=2**20)
    server = MemoryServer(PRUNING, num_pages=400, config=config)
    pool, page_bytes = server.page_store.pool, server.page_store.page_bytes
    server.feed(A, 40, is_unfinished=True)
    before = pool.num_free
    forks = [SequenceStep(sequence, 0, 40, 1, is_unfinished=True) for sequence in range(1, 6)]
    assert server.step(A, forks, compresses=True)
    server.check()
    noted = num_note_bytes(server, A)
    tables = [sequence_of(server, A, sequence).table for sequence in range(6)]
    num_note_pages = sum(len(table.note_pages) for table in tables)
    assert noted <= num_note_pages * page_bytes < noted + 6 * page_bytes
    assert before - pool.num_free >= num_note_pages - len(tables[0].note_pages)
    with pytest.raises(LengthLimitError, match="KV memory"):
        server.step(A, [SequenceStep(each, 0, 40, 0, is_unfinished=True) for each in range(6, 60)], compresses=True)
    server.check()
    num_held = pool.num_pages - pool.num_free
    assert server.memory._spill(server.memory._sessions[A])
    assert pool.num_free == pool.num_pages and server.memory.spilled_bytes == num_held * page_bytes
    server.memory.check_integrity()
    server.step(A, [SequenceStep(0, 0, 40, 1)], compresses=True)
    assert not server.memory.spilled_bytes and not len(sequence_of(server, A).table.note_pages)
    server.check()
    assert num_note_bytes(server, A) <= sum(len(table.note_pages) for table in tables) * page_bytes
    server.memory.forget(A)
    server.memory.check_integrity()
    assert pool.num_free == pool.num_pages


def test_waiting_for_room_loses_nothing(policy: KVPolicy) -> None:
    """A step that is told to wait is tried again as it was, forks and due events included."""
    config = MemoryConfig(page_tokens=PAGE_TOKENS, prefix_memory_bytes=0, spill_memory_bytes=0)
    server = MemoryServer(policy, num_pages=150, config=config)
    server.feed(B, 100, compresses=False)
    server.feed(A, 30)
    items = [SequenceStep(0, 0, 30, 20), SequenceStep(1, 0, 30, 20)]
    assert not server.step(A, items, compresses=True)
    server.memory.check_integrity()
    server.memory.forget(B)
    del server.tokens[B]
    assert server.step(A, items, compresses=True)
    server.check()


def test_a_server_without_a_policy_refuses_compressed_sessions() -> None:
    """The engine's own line of defence behind the check at opening."""
    server = MemoryServer(PRUNING)
    exact = SessionMemory(server.page_store, MemoryConfig(page_tokens=PAGE_TOKENS))
    work = StepWork(A, SPAN, [SequenceStep(0, 0, 0, 1)], torch.zeros(1, 1), lambda output, error: None, compresses=True)
    with pytest.raises(BadInputError, match="keeps every token exactly"):
        exact.prepare(work, protected=())


# -- hand-overs --------------------------------------------------------------------------------


def test_a_handed_over_session_goes_on(policy: KVPolicy) -> None:
    """Beams, ring and rows: all of it as it was, in other pages."""
    here, there = MemoryServer(policy), MemoryServer(policy)
    there.feed(B, 10)  # so that page numbers differ
    here.feed(A, 70)
    here.step(A, [SequenceStep(sequence, 0, 70, 1) for sequence in range(3)], compresses=True)
    hand_over(here, there, A)
    for server in (here, there):
        server.check()
    for _ in range(20):
        there.feed(A, 1)
    there.check()


def test_nothing_of_other_sessions_travels(policy: KVPolicy) -> None:
    """Pages are cut up; what lies beside a session's slots and tiles belongs to whoever held the page before."""
    server = MemoryServer(policy)
    server.feed(A, 70)
    server.feed(A, 3)
    contents = []
    for filler in (0xAB, 0x11):
        export = PageExport(server.memory, A, [73])
        export.begin()
        contents.append(export.read(0, len(export.pages)).clone())
        mask = export._mask
        assert mask is not None
        # What the mask clears is changed in place: nothing that is sent may change with it.
        raw = server.page_store.save_pages(export.pages)
        kept = torch.full_like(raw.view(torch.uint8), 0xFF).view(raw.dtype)
        mask.clear_others(kept, 0)
        noise = torch.where(kept.view(torch.uint8) == 0xFF, raw.view(torch.uint8), filler)
        server.page_store.load_pages(export.pages, noise.view(raw.dtype))
        export.release()
        server.check()
    assert torch.equal(contents[0].view(torch.uint8), contents[1].view(torch.uint8))
    assert not (contents[0].view(torch.uint8)[:, -1] == 0xAB).any()


def test_an_exact_session_of_such_a_server_leaks_nothing_either() -> None:
    """Pages are a little larger than its tokens; the rest may have been another session's row."""
    server = MemoryServer(PRUNING, num_padding_values=3)
    server.feed(B, 8, compresses=False)
    export = PageExport(server.memory, B, [8])
    export.begin()
    pages = export.read(0, len(export.pages)).view(len(export.pages), PAGE_TOKENS, -1)
    export.release()
    num_values = server.page_store.shapes[0].values_per_token
    assert pages.shape[2] == num_values + 3 and not pages[..., num_values:].any()


def test_a_session_inside_an_input_is_not_handed_over(policy: KVPolicy) -> None:
    """Its client sends the input again; half of it judged elsewhere would give other tokens."""
    server = MemoryServer(policy)
    server.feed(A, 20)
    server.feed(A, 20, is_unfinished=True)
    with pytest.raises(SessionStateError, match="inside an input"):
        PageExport(server.memory, A, [40]).begin()
    export = PageExport(server.memory, A, [20])  # to before it, it can
    export.begin()
    export.release()
    server.check()


def test_positions_that_can_not_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another server sent decides what is attended; it is checked before a session has it."""
    here, there = MemoryServer(PRUNING), MemoryServer(PRUNING)
    here.feed(A, 70)
    table = sequence_of(here, A).table
    pages, tiles = table.tile_places(table.tiles_of(0, 0)[:1])
    assert here.store.positions is not None
    here.store.positions[torch.from_numpy(pages), torch.from_numpy(tiles), 0] = 69
    export = PageExport(here.memory, A, [70])
    arriving = PageImport(there.memory, A, SPAN, export.begin(), num_pages=len(export.pages))
    arriving.begin()
    arriving.load(0, export.read(0, len(export.pages)))
    monkeypatch.delattr(there.store, "codes")  # too many to be read for that
    with pytest.raises(BadInputError, match="position"):
        arriving.finish()
    arriving.abandon()
    there.memory.check_integrity()
    assert there.page_store.pool.num_free == there.page_store.pool.num_pages


def test_room_is_told_in_the_policys_tokens() -> None:
    """A server that compresses has more to offer, and says how much; it comes back in full."""
    server = MemoryServer(PRUNING)
    memory = server.memory
    assert memory.num_tokens_total > server.page_store.num_tokens_total
    server.feed(A, 70)
    used = server.page_store.pool.num_pages - server.page_store.pool.num_free
    assert memory.usage.used_bytes == used * server.page_store.page_bytes
    assert memory.num_tokens_free < memory.num_tokens_total
    table = sequence_of(server, A).table
    num_unused = len(table.tile_pages) * table.layout.tiles_per_page - table.num_tiles_held
    assert memory.usage.wasted_bytes == num_unused * (server.page_store.page_bytes // table.layout.tiles_per_page)
    assert num_unused < table.layout.tiles_per_page and memory.usage.shared_bytes == 0
    memory.forget(A)
    memory.update_free()
    assert memory.num_tokens_free == memory.num_tokens_total


def test_rows_are_read_back_as_written() -> None:
    """Codes stand byte-major in tiles; what goes in by row must come out by row and by head."""
    server = MemoryServer(PRUNING)
    table = server.store.new_table(3)
    tiles = table.take_tiles(1, 1, 3)
    assert len(tiles) == 3
    num_rows = 3 * table.layout.tile_rows
    rows = torch.randint(0, 256, (num_rows, server.store.row_bytes), dtype=torch.uint8)
    numbers = np.random.default_rng(1).permutation(num_rows)
    layers = np.full(num_rows, 1)
    places = server.store.row_places(table, layers, layers, numbers)
    server.store.write_rows(places, rows, torch.arange(num_rows), torch.arange(num_rows))
    read, positions, scores = server.store.read_rows(places)
    assert torch.equal(read, rows)
    whole, all_positions, all_scores = server.store.read_head(table, 1, 1)
    assert positions is not None and all_positions is not None and scores is not None and all_scores is not None
    assert torch.equal(whole[numbers], rows)
    assert torch.equal(all_positions[numbers], positions) and torch.equal(all_scores[numbers], scores)
