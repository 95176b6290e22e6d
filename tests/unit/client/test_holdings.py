"""Who holds a session's state: never somebody who is behind the log, never somebody who was rewound."""

from __future__ import annotations

from swarm.client.session.holdings import Holding, Holdings
from swarm.datatypes import Hop, PeerId, Span
from tests.server_infos import make_server


def hop(name: str, start: int, end: int) -> Hop:
    return Hop(server=make_server(name, 0, 12), span=Span(start=start, end=end))


LEFT, MIDDLE, RIGHT = hop("left", 0, 4), hop("middle", 4, 8), hop("right", 8, 12)
ROUTE = (LEFT, MIDDLE, RIGHT)


def points(holdings: Holdings) -> dict[str, tuple[int, int]]:
    return {item.peer_id: (item.epoch, item.step) for item in holdings.all()}


def point(holding: Holding | None) -> tuple[int, int] | None:
    return None if holding is None else (holding.epoch, holding.step)


def test_a_step_is_held_by_all_hops_that_ran_it_and_by_nobody_else() -> None:
    """Who was replaced before the step is behind the log, and must not be asked for what it has."""
    holdings = Holdings()
    holdings.commit(ROUTE, epoch=1, step=1)
    holdings.commit((LEFT, hop("spare", 4, 8), RIGHT), epoch=2, step=5)
    assert points(holdings) == {"left": (2, 5), "spare": (2, 5), "right": (2, 5)}
    assert holdings.of(MIDDLE) is None


def test_a_copy_of_other_blocks_is_no_use() -> None:
    """A server that was used for blocks 4:8 knows nothing of 4:6."""
    holdings = Holdings()
    holdings.commit(ROUTE, epoch=1, step=3)
    assert point(holdings.of(MIDDLE)) == (1, 3)
    assert holdings.of(hop("middle", 4, 6)) is None


def test_a_replay_leaves_those_beyond_it_where_they_are() -> None:
    """They are asked for the old point again, however many epochs have passed."""
    holdings = Holdings()
    holdings.commit(ROUTE, epoch=1, step=3)
    spare = hop("spare", 4, 8)
    holdings.begin_restoring((LEFT, spare))
    assert points(holdings) == {"middle": (1, 3), "right": (1, 3)}, "a replay that breaks leaves half a log"
    holdings.restored((LEFT, spare), epoch=2, step=7)
    assert points(holdings) == {"left": (2, 7), "spare": (2, 7), "middle": (1, 3), "right": (1, 3)}
    assert [item.peer_id for item in holdings.all()][:2] == ["spare", "left"], "the latest first"
    holdings.keep_only((LEFT, spare, RIGHT))
    assert set(points(holdings)) == {"left", "spare", "right"}


def test_a_successor_holds_what_the_leaving_one_held() -> None:
    """Of the successor nothing is known but its name, until it is looked up."""
    holdings = Holdings()
    holdings.commit(ROUTE, epoch=1, step=3)
    holdings.hand_over(PeerId("middle"), PeerId("heir"))
    assert points(holdings) == {"left": (1, 3), "right": (1, 3), "heir": (1, 3)}
    assert [item.server for item in holdings.all() if item.peer_id == "heir"] == [None]
    assert point(holdings.of(hop("heir", 4, 8))) == (1, 3)


def test_a_peer_that_is_part_of_the_session_takes_nothing_over() -> None:
    """It would have to hold two spans under one session id."""
    holdings = Holdings()
    holdings.commit(ROUTE, epoch=1, step=3)
    holdings.hand_over(PeerId("middle"), PeerId("right"))
    assert points(holdings) == {"left": (1, 3), "right": (1, 3)}
    assert point(holdings.of(RIGHT)) == (1, 3)
    holdings.hand_over(PeerId("nobody"), PeerId("heir"))
    assert "heir" not in points(holdings)


def test_a_log_that_goes_back_takes_the_copies_with_it() -> None:
    """A step given up after some of its parts: servers can still undo them, if they are asked for the right point."""
    holdings = Holdings()
    holdings.commit(ROUTE, epoch=1, step=3)
    saved = holdings.save()
    holdings.commit((LEFT, RIGHT), epoch=2, step=4)
    holdings.go_back(saved)
    assert points(holdings) == {"left": (1, 3), "middle": (1, 3), "right": (1, 3)}
    holdings.forget(PeerId("left"))
    assert set(points(holdings)) == {"middle", "right"}


def test_what_is_stale_is_preferred_but_not_kept() -> None:
    """After the log went back to where servers can not, they are sent it again rather than others."""
    holdings = Holdings()
    holdings.commit(ROUTE, epoch=1, step=3)
    saved = holdings.save()
    holdings.make_stale()
    assert [item.peer_id for item in holdings.all()] == ["right", "middle", "left"]
    assert [holdings.of(each) for each in ROUTE] == [None, None, None]
    holdings.hand_over(LEFT.peer_id, PeerId("heir"))
    assert all(item.is_stale for item in holdings.all())
    holdings.restored(ROUTE, epoch=2, step=1)
    assert point(holdings.of(LEFT)) == (2, 1)
    holdings.make_stale()
    holdings.go_back(saved)
    assert point(holdings.of(RIGHT)) == (1, 3), "an abandoned step leaves the log as it was"
