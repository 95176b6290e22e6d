"""What sessions are counted at when they ask for a place."""

from __future__ import annotations

from swarm.datatypes import Span
from swarm.kvcache.admission import Claim
from swarm.kvcache.footprint import Footprint
from swarm.kvpolicy.budget import default_curve
from swarm.kvpolicy.settings import find_policy
from swarm.server.rpc.session_claims import KVSizes

SPAN = Span(start=2, end=8)
EXACT_BYTES = 6 * 2 * 128 * 4


def sizes() -> KVSizes:
    footprint = Footprint(
        policy=find_policy("pyramid+gear"),
        curve=default_curve(8, 2),
        layers=tuple(range(2, 8)),
        num_kv_heads=2,
        key_dim=64,
        value_dim=64,
        row_bytes=68,
        page_bytes=16 * 2 * 128 * 4,
        max_positions=8192,
    )
    return KVSizes(total_bytes=2**26, exact_bytes_per_token=EXACT_BYTES, num_blocks=6, footprint=footprint)


def test_an_exact_session_is_counted_by_its_tokens_and_its_blocks() -> None:
    """Half of the blocks take half of the memory, whatever the server's own policy is."""
    claim = sizes().claim(100, max_sequences=1, span=SPAN, compresses=False)
    assert claim == Claim(100 * EXACT_BYTES)
    half = sizes().claim(100, max_sequences=1, span=Span(start=3, end=6), compresses=False)
    assert half == Claim(50 * EXACT_BYTES)


def test_a_compressed_session_is_counted_at_rest_and_once_more_while_it_reads() -> None:
    """At rest a long session is far smaller than an exact one, but its prompt stands in full pages for a moment."""
    claim = sizes().claim(2048, max_sequences=1, span=SPAN, compresses=True)
    assert claim.lasting_bytes < 2048 * EXACT_BYTES / 12
    assert claim.passing_bytes == 2048 * EXACT_BYTES
    longer = sizes().claim(4096, max_sequences=1, span=SPAN, compresses=True)
    assert longer.passing_bytes == claim.passing_bytes, "a prompt is compressed every 2048 tokens"
    part = sizes().claim(2048, max_sequences=1, span=Span(start=2, end=4), compresses=True)
    assert part.lasting_bytes < claim.lasting_bytes / 2 and part.passing_bytes * 3 == claim.passing_bytes


def test_several_sequences_share_what_a_session_expects() -> None:
    """Each has a tail of its own; but a session that merely may hold many is not counted as if it did."""
    one = sizes().claim(1024, max_sequences=1, span=SPAN, compresses=True)
    four = sizes().claim(1024, max_sequences=4, span=SPAN, compresses=True)
    assert one.lasting_bytes < four.lasting_bytes < 4 * one.lasting_bytes
    few = sizes().claim(40, max_sequences=64, span=SPAN, compresses=True)
    assert few == sizes().claim(40, max_sequences=1, span=SPAN, compresses=True)


def test_free_tokens_are_told_in_the_sessions_own_kind() -> None:
    """A client that wants exact answers learns how many exact tokens are left."""
    each = sizes()
    assert each.footprint is not None
    assert each.convert_tokens(1000, compresses=True) == 1000
    exact = each.convert_tokens(1000, compresses=False)
    assert exact == 1000 * each.footprint.bytes_per_token // EXACT_BYTES and 40 < exact < 120


def test_a_server_that_knows_only_tokens_counts_tokens() -> None:
    """Without sizes every token of every session weighs the same."""
    plain = KVSizes.of_tokens(500)
    assert plain.claim(70, max_sequences=8, span=Span(start=0, end=9), compresses=False) == Claim(70)
    assert plain.total_bytes == 500 and plain.convert_tokens(7, compresses=False) == 7
