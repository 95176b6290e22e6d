"""Sessions come in one after the other, as many as fit, and nobody waits for nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.kvcache.admission import AdmissionConfig, AdmissionQueue, Claim


def make_queue(*, max_sessions: int = 4, max_waiting: int = 3, total: int = 100) -> AdmissionQueue[str]:
    config = AdmissionConfig(max_sessions=max_sessions, max_waiting=max_waiting, fill_share=1.0)
    return AdmissionQueue(total_bytes=total, config=config)


@given(st.data())
def test_random_arrivals_and_departures_keep_order_and_bounds(data: st.DataObject) -> None:
    """Compared with a plain list: no overtaking, no overfilling, and nobody left outside an empty room."""
    queue: AdmissionQueue[int] = AdmissionQueue(
        total_bytes=50, config=AdmissionConfig(max_sessions=3, max_waiting=4, fill_share=1.0)
    )
    inside: dict[int, Claim] = {}
    waiting: list[tuple[int, Claim]] = []

    def fits(claim: Claim) -> bool:
        lasting = sum(each.lasting_bytes for each in (*inside.values(), claim))
        passing = max(each.passing_bytes for each in (*inside.values(), claim))
        return not inside or (len(inside) < 3 and lasting + passing <= 50)

    for key in range(data.draw(st.integers(1, 40))):
        if data.draw(st.booleans()):
            claim = Claim(data.draw(st.integers(0, 70)), data.draw(st.sampled_from([0, 0, 5, 20, 60])))
            may_wait = data.draw(st.booleans())
            decision = queue.request(key, claim, may_wait=may_wait)
            if not waiting and fits(claim):
                inside[key] = claim
                assert decision.is_admitted and decision.position is None
            elif may_wait and len(waiting) < 4:
                waiting.append((key, claim))
                assert not decision.is_admitted and decision.position == len(waiting)
            else:
                assert not decision.is_admitted and decision.position is None
        else:
            known = [*inside, *(waiter for waiter, _ in waiting), -1]
            leaver = data.draw(st.sampled_from(known))
            inside.pop(leaver, None)
            waiting = [entry for entry in waiting if entry[0] != leaver]
            expected = []
            while waiting and fits(waiting[0][1]):
                admitted, claim = waiting.pop(0)
                inside[admitted] = claim
                expected.append(admitted)
            assert queue.leave(leaver) == expected
        assert queue.num_inside == len(inside) and queue.num_waiting == len(waiting)
        assert queue.positions() == {waiter: place for place, (waiter, _) in enumerate(waiting, start=1)}
        assert inside or not waiting


def test_a_session_larger_than_the_server_is_let_in_alone() -> None:
    """Waiting would never change anything for it; the page store decides what then happens."""
    queue = make_queue()
    assert queue.request("huge", Claim(1000), may_wait=False).is_admitted
    assert queue.request("small", Claim(1), may_wait=True).position == 1
    assert queue.leave("huge") == ["small"]


def test_nobody_overtakes_a_large_session_that_waits() -> None:
    """Small sessions slipping past would keep the large one outside for ever."""
    queue = make_queue()
    queue.request("first", Claim(60), may_wait=True)
    assert queue.request("large", Claim(90), may_wait=True).position == 1
    assert queue.request("small", Claim(1), may_wait=True).position == 2


def test_giving_up_the_first_place_lets_the_next_in() -> None:
    """A client that goes away leaves nothing behind, also when it was in everybody's way."""
    queue = make_queue()
    queue.request("first", Claim(60), may_wait=True)
    queue.request("large", Claim(90), may_wait=True)
    queue.request("small", Claim(10), may_wait=True)
    assert queue.leave("large") == ["small"]


def test_what_passes_is_kept_free_once() -> None:
    """Prompts of compressed sessions are read one after the other, so their pages are not needed at the same time."""
    queue = make_queue()
    assert queue.request("a", Claim(20, 40), may_wait=False).is_admitted
    assert queue.request("b", Claim(20, 40), may_wait=False).is_admitted
    assert queue.request("c", Claim(20, 30), may_wait=False).is_admitted
    assert not queue.request("d", Claim(1), may_wait=False).is_admitted
    assert queue.leave("a") == [] and not queue.has_place(Claim(21)) and queue.has_place(Claim(20))


def test_asking_twice_is_refused() -> None:
    """One session must not take two places."""
    queue = make_queue()
    queue.request("a", Claim(1), may_wait=True)
    with pytest.raises(ValueError, match="asked before"):
        queue.request("a", Claim(1), may_wait=True)


@pytest.mark.parametrize(
    "settings", [{"max_sessions": 0}, {"max_waiting": -1}, {"fill_share": 0.0}, {"fill_share": 1.1}]
)
def test_senseless_settings_are_refused(settings: dict[str, float]) -> None:
    """A server that admits nobody would look healthy and serve no one."""
    with pytest.raises(ValueError, match="AdmissionConfig"):
        AdmissionConfig(**settings)  # type: ignore[arg-type]
