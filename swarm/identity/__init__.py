"""Who a peer is: an Ed25519 key kept in a file, and a peer id from which anyone can check its signatures."""

from __future__ import annotations

from swarm.identity.keypair import Identity
from swarm.identity.peer_id import parse_peer_id, peer_id_from_public_key, public_key_of, verify

__all__ = ["Identity", "parse_peer_id", "peer_id_from_public_key", "public_key_of", "verify"]
