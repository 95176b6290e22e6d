"""Where a server that may choose puts itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.datatypes import ServerInfo, ServerState
from swarm.errors import BadInputError
from swarm.routing import choose_span
from tests.server_infos import make_server


def _join_one_by_one(sizes: list[int], num_blocks: int) -> list[ServerInfo]:
    servers: list[ServerInfo] = []
    for index, size in enumerate(sizes):
        span = choose_span(servers, num_blocks, size)
        assert len(span) == size
        servers.append(make_server(f"peer{index}", span.start, span.end, num_blocks=num_blocks))
    return servers


def test_servers_that_start_in_turn_cover_the_model() -> None:
    """`swarm serve MODEL --num-blocks 10` on three machines must just work."""
    servers = _join_one_by_one([10, 10, 10], 30)
    assert [(server.span.start, server.span.end) for server in servers] == [(0, 10), (10, 20), (20, 30)]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_servers_of_any_sizes_leave_no_gap_and_waste_no_room(sizes: list[int]) -> None:
    """Machines differ; as long as some block is missing, a newcomer's room goes to missing blocks."""
    servers = _join_one_by_one(sizes, 12)
    covered = {block for server in servers for block in range(server.span.start, server.span.end)}
    assert covered == set(range(min(sum(sizes), 12)))


def test_a_gap_is_filled_wherever_it_is() -> None:
    """A lost server's blocks are what the swarm needs most."""
    servers = [make_server("a", 0, 5), make_server("b", 8, 12), make_server("c", 0, 12, state=ServerState.OFFLINE)]
    span = choose_span(servers, 12, 3)
    assert (span.start, span.end) == (5, 8)


def test_servers_still_loading_count() -> None:
    """Two servers started at once must not both fill the same gap."""
    servers = [make_server("a", 0, 6, state=ServerState.JOINING)]
    assert choose_span(servers, 12, 6).start == 6


def test_an_impossible_number_of_blocks_is_refused() -> None:
    """More blocks than the model has is a typo."""
    for num_held in (0, 13):
        with pytest.raises(BadInputError, match="choose 1 to 12"):
            choose_span([], 12, num_held)
