"""A swarm on one machine: how blocks and cores are shared, and what a process that fails says."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.cli.local_swarm import fair_num_threads, split_blocks
from swarm.cli.node_process import NodeProcess, stop_all
from swarm.errors import BadInputError, FinalError


@given(num_blocks=st.integers(1, 200), data=st.data())
def test_blocks_are_shared_fairly(num_blocks: int, data: st.DataObject) -> None:
    """Every block once, in order, and nobody carries two blocks more than another."""
    num_servers = data.draw(st.integers(1, num_blocks))
    spans = split_blocks(num_blocks, num_servers)
    assert [block for span in spans for block in range(span.start, span.end)] == list(range(num_blocks))
    sizes = [len(span) for span in spans]
    assert len(sizes) == num_servers
    assert max(sizes) - min(sizes) <= 1


def test_more_servers_than_blocks_is_refused() -> None:
    """A server without a block could not say what it serves."""
    with pytest.raises(BadInputError, match="31 servers can not share 30 blocks; choose 1 to 30"):
        split_blocks(30, 31)


def test_threads_never_exceed_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for a core make every step slower."""
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert fair_num_threads(3) == 5
    assert fair_num_threads(100) == 1


def test_a_process_that_fails_is_quoted() -> None:
    """The demo's user sees why a server did not start, not that `something failed`."""
    process = NodeProcess("server of blocks 0:10", ["serve", "some-model"], num_threads=1)
    try:
        with pytest.raises(FinalError, match=r"the server of blocks 0:10 failed: which swarm\? Pass --join ADDRESS"):
            process.ready(deadline_s=time.monotonic() + 30)
    finally:
        stop_all([process])
