"""An identity: the private key that makes a peer who it is."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.datatypes import PeerId
from swarm.errors import BadInputError
from swarm.identity.keyfile import KeyFile, create_key_file, open_key_file
from swarm.identity.peer_id import peer_id_from_public_key

__all__ = ["Identity"]

# libp2p's PrivateKey message: key type Ed25519 (08 01), then 64 bytes (12 40), seed and public key.
_LIBP2P_PREFIX = bytes.fromhex("08011240")
_NUM_SEED_BYTES = 32
_NUM_LIBP2P_BYTES = len(_LIBP2P_PREFIX) + 2 * _NUM_SEED_BYTES


class Identity:
    """An Ed25519 key pair. One that came from a file holds the file's lock until `close`."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self._public_key = private_key.public_key().public_bytes_raw()
        self._key_file: KeyFile | None = None
        self.peer_id: PeerId = peer_id_from_public_key(self._public_key)
        """What others call this peer; contains the public key."""

    @classmethod
    def generate(cls) -> Self:
        """A fresh identity that lives in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path | str) -> Self:
        """The identity kept at `path`, made there (readable by its owner only) when the file is missing.

        The file holds libp2p's own form of the key, so other libp2p tools can read it. It stays locked until
        `close`, because two running peers with one identity would answer for each other at random. Raises
        BadInputError when another process holds it, when it is damaged, or when it can not be read or written.
        """
        path = Path(path).expanduser()
        # Written first when missing, then read in every case: of two processes that start at once, one file wins.
        if not path.exists():
            create_key_file(path, cls.generate().to_libp2p_bytes())
        key_file = open_key_file(path)
        try:
            identity = cls.from_libp2p_bytes(key_file.data)
        except BadInputError as error:
            key_file.release()
            raise BadInputError(
                f"identity file {path} is not usable: {error}; restore it from a copy, or move it away "
                f"to get a new identity"
            ) from error
        identity._key_file = key_file
        return identity

    @classmethod
    def from_libp2p_bytes(cls, data: bytes) -> Self:
        """The identity of libp2p's PrivateKey message (68 bytes). Raises BadInputError when it is none."""
        if len(data) != _NUM_LIBP2P_BYTES:
            raise BadInputError(f"an Ed25519 key file has {_NUM_LIBP2P_BYTES} bytes, not {len(data)}")
        if not data.startswith(_LIBP2P_PREFIX):
            raise BadInputError("it does not begin like an Ed25519 key")
        seed, public_key = data[len(_LIBP2P_PREFIX) :][:_NUM_SEED_BYTES], data[-_NUM_SEED_BYTES:]
        identity = cls(Ed25519PrivateKey.from_private_bytes(seed))
        if identity._public_key != public_key:
            raise BadInputError("its private and public halves do not belong together")
        return identity

    def to_libp2p_bytes(self) -> bytes:
        """libp2p's PrivateKey message (68 bytes): secret, never to be logged or sent."""
        return _LIBP2P_PREFIX + self._private_key.private_bytes_raw() + self._public_key

    def sign(self, message: bytes) -> bytes:
        """The signature (64 bytes) of `message`; check it with `swarm.identity.verify`."""
        return self._private_key.sign(message)

    def close(self) -> None:
        """Let other processes use the key file; harmless when repeated. The key itself stays usable."""
        if self._key_file is not None:
            self._key_file.release()
            self._key_file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"
