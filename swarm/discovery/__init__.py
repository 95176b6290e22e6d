"""Finding servers: registries over the DHT, over any server's gRPC address, or in memory."""

from __future__ import annotations

from swarm.discovery.cached import CachedRegistry
from swarm.discovery.joining import open_registry
from swarm.discovery.memory import MemoryNetwork, MemoryRegistry
from swarm.discovery.registry import Registry

__all__ = ["CachedRegistry", "MemoryNetwork", "MemoryRegistry", "Registry", "open_registry"]
