"""What every way of finding servers offers, and the half they share: signing, checking, counting."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from swarm.datatypes import ModelHash, ServerInfo, ServerState
from swarm.discovery.record_checks import MAX_BLOCKS, MAX_TTL_S, RejectReason, is_model_hash
from swarm.discovery.records import Selection, VerifiedRecord, seal_record, select_newest
from swarm.errors import BadInputError, PeerLostError
from swarm.identity import Identity

__all__ = ["FetchedRecords", "RecordRegistry", "Registry", "check_model_key"]

logger = logging.getLogger(__name__)

WITHDRAWN_TTL_S = 10.0
"""How long the news that a server has left is kept at least; its older records have expired or are replaced."""
_SMALLEST_STEP_S = 0.001


class Registry(ABC):
    """Where servers announce themselves and clients find them. Belongs to the event loop it was made on."""

    @abstractmethod
    async def announce(self, info: ServerInfo, *, ttl_s: float) -> None:
        """Let others find `info` for `ttl_s` seconds; repeat it sooner than that to stay known.

        The newest announcement of a peer replaces all earlier ones, also those of another span. Raises
        BadInputError for what no reader would accept, PeerLostError when nobody could be told.
        """

    @abstractmethod
    async def withdraw(self, info: ServerInfo) -> None:
        """Tell others at once that the server is OFFLINE, instead of letting them wait for the expiry."""

    @abstractmethod
    async def lookup_verified(self, model_hash: ModelHash, num_blocks: int) -> list[VerifiedRecord]:
        """The newest valid record of every server of the model, by span and peer id.

        All states are included; one that withdrew shows as OFFLINE until that record expires. Invalid, expired
        and forged records are dropped and counted. Raises PeerLostError when nobody could be asked.
        """

    @abstractmethod
    def join_addresses(self) -> list[str]:
        """What others pass to --join to find the same servers, best first."""

    @abstractmethod
    async def close(self) -> None:
        """Stop; within seconds, and harmless when repeated. What was announced expires by itself."""

    async def lookup(self, model_hash: ModelHash, num_blocks: int) -> list[ServerInfo]:
        """The servers of the model, as in `lookup_verified`."""
        return [record.info for record in await self.lookup_verified(model_hash, num_blocks)]

    async def lookup_records(self, model_hash: ModelHash, num_blocks: int) -> list[bytes]:
        """The signed records of the model's servers, for somebody who checks them again."""
        return [record.data for record in await self.lookup_verified(model_hash, num_blocks)]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@dataclass(frozen=True, kw_only=True)
class FetchedRecords:
    """Signed records as they came, none of them checked."""

    records: Sequence[bytes]
    now: float
    """Unix seconds by the clock against which to judge their expiry."""


class RecordRegistry(Registry):
    """A registry of signed records: subclasses move bytes, this class decides which to believe."""

    def __init__(self, identity: Identity | None, *, clock: Callable[[], float] = time.time) -> None:
        """`identity` signs announcements; without one the registry only looks up. `clock`: unix seconds."""
        self._identity = identity
        self._clock = clock
        self._last_expires_at: float | None = None
        self.num_rejected: Counter[RejectReason] = Counter()
        """Records dropped so far, by reason."""

    @abstractmethod
    async def _publish(self, info: ServerInfo, data: bytes, *, expires_at: float) -> None:
        """Put the signed record where others find it. Raises PeerLostError when that failed everywhere."""

    @abstractmethod
    async def _fetch(self, model_hash: ModelHash, num_blocks: int) -> FetchedRecords:
        """All records that are there for the model. Raises PeerLostError when nobody could be asked."""

    async def announce(self, info: ServerInfo, *, ttl_s: float) -> None:
        """See Registry."""
        if not 0 < ttl_s <= MAX_TTL_S:
            raise BadInputError(f"an announcement can not live for {ttl_s} s; choose up to {MAX_TTL_S:.0f} s")
        if self._identity is None:
            raise BadInputError("this look-up address is for clients; to serve, join at a DHT address instead")
        if self._last_expires_at is None:
            self._last_expires_at = await self._find_earlier_expiry(info)
        # Of two records the one that expires last is the newer, so each must outlive the one before.
        expires_at = max(self._clock() + ttl_s, self._last_expires_at + _SMALLEST_STEP_S)
        data = seal_record(info, self._identity, expires_at=expires_at)
        self._last_expires_at = expires_at
        await self._publish(info, data, expires_at=expires_at)

    async def withdraw(self, info: ServerInfo) -> None:
        """See Registry."""
        await self.announce(replace(info, state=ServerState.OFFLINE), ttl_s=WITHDRAWN_TTL_S)

    async def lookup_verified(self, model_hash: ModelHash, num_blocks: int) -> list[VerifiedRecord]:
        """See Registry."""
        check_model_key(model_hash, num_blocks)
        fetched = await self._fetch(model_hash, num_blocks)
        selection = select_newest(fetched.records, now=fetched.now, model_hash=model_hash, num_blocks=num_blocks)
        self._count_rejected(model_hash, selection)
        return list(selection.records)

    async def _find_earlier_expiry(self, info: ServerInfo) -> float:
        """When the record that an earlier run of this peer left behind expires, in unix seconds; else 0."""
        try:
            records = await self.lookup_verified(info.model_hash, info.num_blocks)
        except PeerLostError:
            return 0.0
        return next((record.expires_at for record in records if record.info.peer_id == info.peer_id), 0.0)

    def _count_rejected(self, model_hash: ModelHash, selection: Selection) -> None:
        for reason, count in selection.num_rejected.items():
            # Expiry is the ordinary end of a record. Of the others, the first is news; a client that looks up
            # every few seconds meets the same ones again and again.
            is_news = reason is not RejectReason.EXPIRED and not self.num_rejected[reason]
            level = logging.WARNING if is_news else logging.DEBUG
            logger.log(level, "dropped %d records of model %s…: %s", count, model_hash[:12], reason.value)
        self.num_rejected.update(selection.num_rejected)


def check_model_key(model_hash: str, num_blocks: int) -> None:
    """Whether a model can be looked up by these. Raises BadInputError."""
    if not is_model_hash(model_hash):
        raise BadInputError(f"{model_hash[:80]!r} is not a model hash (8 to 128 lower-case hex digits)")
    if not 1 <= num_blocks <= MAX_BLOCKS:
        raise BadInputError(f"a model of {num_blocks} blocks can not be looked up; 1 to {MAX_BLOCKS} are possible")
