"""Peer ids: libp2p's text form of an Ed25519 public key, which the id contains whole.

The bytes behind the base58 text are an "identity" multihash: code 0x00, length 0x24, then libp2p's
PublicKey message, which is key type Ed25519 (08 01), length 32 (12 20) and the 32 bytes of the key
(https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md). So all our ids begin with 12D3KooW.
"""

from __future__ import annotations

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from swarm.datatypes import PeerId
from swarm.errors import BadInputError

__all__ = ["parse_peer_id", "peer_id_from_public_key", "public_key_of", "verify"]

_PREFIX = bytes.fromhex("0024" + "08011220")
_NUM_KEY_BYTES = 32
_NUM_CHARS = 52  # of every Ed25519 peer id


def peer_id_from_public_key(public_key: bytes) -> PeerId:
    """The peer id of a raw Ed25519 public key (32 bytes)."""
    if len(public_key) != _NUM_KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {_NUM_KEY_BYTES} bytes, not {len(public_key)}")
    return PeerId(base58.b58encode(_PREFIX + public_key).decode("ascii"))


def public_key_of(peer_id: str) -> bytes:
    """The raw public key (32 bytes) inside a peer id. Raises BadInputError for text that is no peer id."""
    # Length first: base58 decoding takes time that grows with the square of it, and the text may be hostile.
    if len(peer_id) == _NUM_CHARS and peer_id.isascii():
        try:
            decoded = base58.b58decode(peer_id)
        except ValueError:
            decoded = b""
        if decoded.startswith(_PREFIX) and len(decoded) == len(_PREFIX) + _NUM_KEY_BYTES:
            return decoded[len(_PREFIX) :]
    shown = peer_id if len(peer_id) <= 80 else f"{peer_id[:60]}…"
    raise BadInputError(f"{shown!r} is not a peer id; one looks like 12D3KooW… and has {_NUM_CHARS} characters")


def parse_peer_id(text: str) -> PeerId:
    """`text` as a PeerId. Raises BadInputError when it is none."""
    public_key_of(text)
    return PeerId(text)


def verify(peer_id: str, message: bytes, signature: bytes) -> bool:
    """Whether the owner of `peer_id` signed `message`; False too for an id or a signature of no valid form."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key_of(peer_id))
        key.verify(signature, message)
    except (BadInputError, InvalidSignature, ValueError):
        return False
    return True
