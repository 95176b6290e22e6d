"""Which servers hold a session's state, and at which of its steps. Pure, no I/O.

A server can be asked to stand where it stood after a step of an earlier epoch. So what has to be sent again after
a loss follows from this table: nothing to those who hold the state, everything to those who do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from swarm.datatypes import Hop, PeerId, ServerInfo, Span

__all__ = ["Holding", "Holdings"]


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One server's copy of the session's state."""

    peer_id: PeerId
    span: Span
    """The blocks it ran."""
    epoch: int
    """Together with `step`: the step after which it stood where the session stands."""
    step: int
    server: ServerInfo | None
    """What is known of it; None for a successor that we have only been told of."""
    is_stale: bool = False
    """Whether it is of no use any more, though its server is: the log has gone back to where servers can not."""


class Holdings:
    """The copies of one session's state; those that are behind the session's log are not in it."""

    def __init__(self) -> None:
        self._by_peer: dict[PeerId, Holding] = {}

    def __repr__(self) -> str:
        parts = (f"{item.peer_id[-6:]}[{item.span}]@{item.epoch}.{item.step}" for item in self._by_peer.values())
        return f"<Holdings {' '.join(parts)}>"

    def all(self) -> tuple[Holding, ...]:
        """Every copy, the latest first: of two copies of a block the later one is the likelier to be there still."""
        return tuple(reversed(self._by_peer.values()))

    def of(self, hop: Hop) -> Holding | None:
        """What a hop can be asked to keep; a copy of other blocks is of no use to it."""
        holding = self._by_peer.get(hop.peer_id)
        return holding if holding is not None and holding.span == hop.span and not holding.is_stale else None

    def commit(self, hops: Sequence[Hop], *, epoch: int, step: int) -> None:
        """A step is part of the log and done at these hops; all other copies are behind it now."""
        self._by_peer.clear()
        self.restored(hops, epoch=epoch, step=step)

    def begin_restoring(self, hops: Sequence[Hop]) -> None:
        """The log is about to be sent to these hops again, which undoes what they hold."""
        for hop in hops:
            self.forget(hop.peer_id)

    def restored(self, hops: Sequence[Hop], *, epoch: int, step: int) -> None:
        """The whole log has been run by these hops; the copies of others stay as they are."""
        for hop in hops:
            self.forget(hop.peer_id)
            self._by_peer[hop.peer_id] = Holding(
                peer_id=hop.peer_id, span=hop.span, epoch=epoch, step=step, server=hop.server
            )

    def hand_over(self, peer: PeerId, successor: PeerId) -> None:
        """A leaving server gave its copy to another one, which must not be part of the session already."""
        holding = self._by_peer.pop(peer, None)
        if holding is not None and successor not in self._by_peer:
            self._by_peer[successor] = replace(holding, peer_id=successor, server=None)

    def forget(self, peer: PeerId) -> None:
        """What this server holds is gone, or can not be trusted."""
        self._by_peer.pop(peer, None)

    def make_stale(self) -> None:
        """The log has gone back to where servers can not: they are still preferred, and are sent the log again."""
        self._by_peer = {peer: replace(holding, is_stale=True) for peer, holding in self._by_peer.items()}

    def keep_only(self, hops: Sequence[Hop]) -> None:
        """The others have been told that the session is over for them."""
        peers = {hop.peer_id for hop in hops}
        self._by_peer = {peer: holding for peer, holding in self._by_peer.items() if peer in peers}

    def unclaimed(self) -> tuple[Holding, ...]:
        """Copies at successors that this session has not been opened at."""
        return tuple(holding for holding in self._by_peer.values() if holding.server is None)

    def save(self) -> tuple[Holding, ...]:
        """The copies as they are now, for `go_back`."""
        return tuple(self._by_peer.values())

    def go_back(self, saved: Sequence[Holding]) -> None:
        """The log is what it was when `saved` was; of servers that hold a newer state only the older one counts."""
        self._by_peer = {holding.peer_id: holding for holding in saved}
