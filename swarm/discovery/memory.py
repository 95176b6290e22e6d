"""Discovery without a network: registries that share a dictionary, for tests and for swarms in one process."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from swarm.datatypes import ModelHash, PeerId, ServerInfo
from swarm.discovery.registry import FetchedRecords, RecordRegistry
from swarm.identity import Identity

__all__ = ["MemoryNetwork", "MemoryRegistry"]


class MemoryNetwork:
    """What the DHT is to real peers: keeps bytes, understands little, believes anybody."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        """`clock`: unix seconds; tests pass their own, so nothing has to sleep."""
        self.clock = clock
        self._records: dict[ModelHash, dict[PeerId, tuple[bytes, float]]] = defaultdict(dict)

    def put(self, model_hash: ModelHash, peer_id: PeerId, data: bytes, *, expires_at: float) -> None:
        """Keep `data` in a peer's name until `expires_at` (unix seconds), unless a record that lives longer is there.

        Checks nothing, so a test can put forged records here.
        """
        known = self._records[model_hash].get(peer_id)
        if known is None or known[1] < expires_at:
            self._records[model_hash][peer_id] = (data, expires_at)

    def get(self, model_hash: ModelHash) -> list[bytes]:
        """What is kept about a model and has not expired."""
        now = self.clock()
        live = {peer: entry for peer, entry in self._records[model_hash].items() if entry[1] > now}
        self._records[model_hash] = live
        return [data for data, _ in live.values()]


class MemoryRegistry(RecordRegistry):
    """One peer's view of a MemoryNetwork."""

    def __init__(self, identity: Identity | None = None, *, network: MemoryNetwork | None = None) -> None:
        """Registries of one `network` see each other; without `identity` it only looks up."""
        self._network = network if network is not None else MemoryNetwork()
        super().__init__(identity, clock=self._network.clock)

    async def _publish(self, info: ServerInfo, data: bytes, *, expires_at: float) -> None:
        self._network.put(info.model_hash, info.peer_id, data, expires_at=expires_at)

    async def _fetch(self, model_hash: ModelHash, num_blocks: int) -> FetchedRecords:
        return FetchedRecords(records=self._network.get(model_hash), now=self._clock())

    def join_addresses(self) -> list[str]:
        """None: nobody outside this process can join."""
        return []

    async def close(self) -> None:
        """Nothing to stop."""
