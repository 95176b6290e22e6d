"""Under which KV policy a session asks each server to keep its cache. Pure, no I/O."""

from __future__ import annotations

from swarm.datatypes import PeerId, ServerInfo, Span
from swarm.errors import BadInputError, PeerFaultError
from swarm.kvpolicy.settings import FULL_CACHE, KVPolicy, find_policy

__all__ = ["PolicyChoice", "serves_policy"]


def serves_policy(server: ServerInfo, wanted: str | None) -> bool:
    """Whether a server keeps caches under a policy; exactly, every server does."""
    return wanted is None or find_policy(wanted) == FULL_CACHE or server.kv_policy == find_policy(wanted).preset


class PolicyChoice:
    """One session's policies.

    Without a wish the first route decides, block by block: each server takes its own. Servers that join later are
    asked for what their blocks had, or for the exact cache where that was several things or theirs is another one,
    since no block must come to lose more than it began with.
    """

    def __init__(self, wanted: str | None) -> None:
        self._wanted = None if wanted is None else find_policy(wanted)
        self._agreed: dict[int, str] = {}
        """By block."""
        self._got: dict[PeerId, str] = {}

    def ask(self, server: ServerInfo, span: Span, *, keeps: bool = False) -> str:
        """What to ask a server for that is to run the blocks of `span`; empty for its own.

        Args:
            keeps: whether the session is to go on there from what the server holds.
        """
        if self._wanted is not None:
            return self._wanted.preset
        if keeps and server.peer_id in self._got:
            return self._got[server.peer_id]
        own = server.kv_policy
        agreed = {self._agreed[block] for block in range(span.start, span.end) if block in self._agreed}
        if not agreed:
            return "" if _is_known(own) else FULL_CACHE.preset
        return own if agreed == {own} else FULL_CACHE.preset

    def check(self, asked: str, answered: str, peer: PeerId) -> KVPolicy:
        """The policy that a server says it opened the session under. Raises PeerFaultError for any but that asked for.

        Servers that say none know of none.
        """
        answered = answered or FULL_CACHE.preset
        if asked not in ("", answered):
            raise PeerFaultError(f"server {peer} was asked for the KV policy {asked!r} and says {answered[:32]!r}")
        try:
            return find_policy(answered)
        except BadInputError:
            raise PeerFaultError(f"server {peer} keeps caches under an unknown policy, {answered[:32]!r}") from None

    def note(self, peer: PeerId, span: Span, policy: KVPolicy) -> None:
        """A route is open, with a server under this policy for the blocks of `span`."""
        self._got[peer] = policy.preset
        for block in range(span.start, span.end):
            self._agreed.setdefault(block, policy.preset)


def _is_known(name: str) -> bool:
    try:
        find_policy(name)
    except BadInputError:
        return False
    return True
