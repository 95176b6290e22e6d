"""hivemind's DHT behind our own interface: the only file that imports hivemind.

Import it through `swarm.discovery.dht`, which explains a missing hivemind and silences what its import prints.
The node runs on the caller's event loop; p2pd, hivemind's libp2p daemon, is a child process.

Changed here on purpose, compared with hivemind 1.1.12 as it comes: p2pd leaves our process group; look-ups
ask the other peers instead of a local copy; one bad entry no longer discredits the good ones that came with
it; lost bootstrap peers are looked for again; nothing waits without a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils import MSGPackSerializer
from hivemind.utils.multiaddr import Multiaddr

from swarm.discovery.addresses import DhtAddress
from swarm.discovery.dht_node import BootstrapFailedError, BootstrapFailure, DhtEntry, DhtNode
from swarm.discovery.hivemind_log import quieten_hivemind
from swarm.errors import PeerLostError
from swarm.identity import Identity

__all__ = ["HivemindNode"]

logger = logging.getLogger(__name__)

Accept = Callable[[object, bytes, float], bool]
"""Whether to keep or believe (subkey, value, expires_at)."""

# hivemind's P2P.create leaves p2pd running when it fails half-way, with no handle to stop it by.
_being_made: ContextVar[list[_DetachedP2P]] = ContextVar("_being_made")

_T = TypeVar("_T")
_CALL_TIMEOUT_S = 15.0
_CLOSE_TIMEOUT_S = 3.0
_REJOIN_TIMEOUT_S = 5.0
_REJOIN_PERIOD_S = 10.0

# hivemind ends a search at the first answer that lives long enough, which may be an older or smaller one than
# other peers hold. Nothing compares as greater than nan, not even an answer said to live for ever, so all
# the nearest peers are asked and their answers merged.
_NEVER_SUFFICIENT = math.nan

# Runs p2pd in a session of its own. A Ctrl-C in a terminal goes to the whole process group, and p2pd would
# end at once, while the server still drains and wants to withdraw its announcement.
_DETACH = "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"


class HivemindNode(DhtNode):
    """A DHTNode and its p2pd; made by `start`."""

    def __init__(
        self, p2p: _DetachedP2P, node: DHTNode, initial_peers: Sequence[DhtAddress], *, client_mode: bool
    ) -> None:
        self._p2p = p2p
        self._node = node
        self._initial_peers = tuple(initial_peers)
        self._client_mode = client_mode
        self._rejoining: asyncio.Task[None] | None = None
        self._rejoined_at_s = time.monotonic()
        self._is_closed = False

    @classmethod
    async def start(
        cls,
        identity: Identity,
        *,
        listen_addresses: Sequence[str],
        initial_peers: Sequence[DhtAddress],
        accept: Accept,
        client_mode: bool,
        startup_timeout_s: float,
    ) -> HivemindNode:
        """Start p2pd and join. In client mode nothing listens, and nobody stores anything here.

        Raises BootstrapFailedError when no initial peer can be used, and OSError when p2pd does not start.
        """
        quieten_hivemind()
        p2p = await _start_p2p(
            identity,
            listen_addresses=() if client_mode else listen_addresses,
            initial_peers=initial_peers,
            startup_timeout_s=startup_timeout_s,
        )
        try:
            async with asyncio.timeout(startup_timeout_s):
                node = await DHTNode.create(
                    p2p=p2p,
                    # The same across restarts, so that others do not remember us twice.
                    node_id=DHTID.generate(source=identity.peer_id),
                    initial_peers=[str(address) for address in initial_peers],
                    client_mode=client_mode,
                    record_validator=_Validator(accept),
                    # A copy kept here or passed on would hide that a server changed its state, until it expires.
                    cache_locally=False,
                    cache_nearest=0,
                    cache_on_store=False,
                    reuse_get_requests=False,
                )
        except BaseException as error:
            await _stop_p2p(p2p)
            if isinstance(error, (RuntimeError, TimeoutError)):
                raise BootstrapFailedError(BootstrapFailure.NOBODY, str(error) or "no reply in time") from error
            if isinstance(error, ValidationError):
                is_clock = "local time" in str(error)
                failure = BootstrapFailure.CLOCK if is_clock else BootstrapFailure.UNREACHABLE
                raise BootstrapFailedError(failure, str(error)) from error
            raise
        node.protocol._validate_dictionary = functools.partial(_drop_invalid, node.protocol)
        return cls(p2p, node, initial_peers, client_mode=client_mode)

    async def store(self, entries: Sequence[DhtEntry]) -> int:
        """See DhtNode."""
        await self._rejoin_if_needed()
        accepted: dict[Any, bool] = await self._call(
            self._node.store_many(
                [entry.key for entry in entries],
                [entry.value for entry in entries],
                [entry.expires_at for entry in entries],
                subkeys=[entry.subkey for entry in entries],
                exclude_self=self._client_mode,  # others can not ask a client
            )
        )
        return sum(accepted.values())

    async def fetch(self, keys: Sequence[str]) -> list[bytes]:
        """See DhtNode."""
        await self._rejoin_if_needed()
        found = await self._call(self._node.get_many(keys, sufficient_expiration_time=_NEVER_SUFFICIENT))
        return [
            item.value
            for answer in found.values()
            if answer is not None and isinstance(answer.value, dict)
            for item in answer.value.values()
        ]

    async def visible_addresses(self) -> list[str]:
        """See DhtNode."""
        if self._client_mode:
            return []
        return [str(address) for address in await self._call(self._p2p.get_visible_maddrs(latest=True))]

    async def close(self) -> None:
        """See DhtNode."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._rejoining is not None:
            self._rejoining.cancel()
            await asyncio.gather(self._rejoining, return_exceptions=True)
        # With p2pd gone, hivemind's own shutdown waits for ever.
        if self._p2p.has_daemon:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._node.shutdown()
        await _stop_p2p(self._p2p)

    async def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        if self._is_closed or not self._p2p.has_daemon:
            coroutine.close()
            raise PeerLostError("the DHT daemon p2pd has ended; restart this program")
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await coroutine
        except TimeoutError as error:
            raise PeerLostError(f"the DHT did not answer within {_CALL_TIMEOUT_S:.0f} s") from error

    async def _rejoin_if_needed(self) -> None:
        """Look again for initial peers that were lost: a bootstrap that restarts knows nobody and asks nobody."""
        table = self._node.protocol.routing_table
        lost = [peer for peer in self._initial_peers if PeerID.from_base58(peer.peer_id) not in table]
        is_due = time.monotonic() - self._rejoined_at_s >= _REJOIN_PERIOD_S
        is_alone = not table.uid_to_peer_id
        if lost and (is_due or is_alone) and (self._rejoining is None or self._rejoining.done()):
            self._rejoined_at_s = time.monotonic()
            self._rejoining = asyncio.create_task(self._rejoin(lost), name="rejoin DHT")
        if is_alone and self._rejoining is not None:
            await asyncio.wait([self._rejoining])

    async def _rejoin(self, lost: Sequence[DhtAddress]) -> None:
        async def greet(address: DhtAddress) -> None:
            peer = PeerID.from_base58(address.peer_id)
            where = Multiaddr(str(address).partition("/p2p/")[0])
            try:
                async with asyncio.timeout(_REJOIN_TIMEOUT_S):
                    await self._p2p._client.connect(peer, [where])
                    await self._node.protocol.call_ping(peer)
            except Exception as error:  # tried again in the next period
                logger.debug("could not rejoin at %s: %s", address, error)

        await asyncio.gather(*(greet(address) for address in lost))


class _DetachedP2P(P2P):  # type: ignore[misc]
    """p2pd started outside our process group."""

    def __init__(self) -> None:
        super().__init__()
        _being_made.get().append(self)

    @property
    def has_daemon(self) -> bool:
        """Whether p2pd is still running."""
        return self._child is not None and self._child.returncode is None

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", _DETACH, *P2P._make_process_args(*args, **kwargs)]


class _Validator(RecordValidatorBase):  # type: ignore[misc]
    """Keeps what is no record of ours out of this node, whether offered for storing or found at others."""

    def __init__(self, accept: Accept) -> None:
        self._accept = accept

    def validate(self, record: DHTRecord) -> bool:
        """See RecordValidatorBase. Values that do not decode would make hivemind's look-ups hang."""
        try:
            subkey = MSGPackSerializer.loads(record.subkey)
            value = MSGPackSerializer.loads(record.value)
            is_ours = isinstance(value, bytes) and self._accept(subkey, value, record.expiration_time)
        except Exception as error:  # msgpack raises many kinds for hostile bytes
            logger.debug("refused a DHT entry: %s", error)
            return False
        return is_ours


def _drop_invalid(protocol: Any, key: bytes, entries: Any) -> bool:
    """In place of DHTProtocol._validate_dictionary, which refuses all entries of a key because of one."""
    with entries.freeze():
        invalid = [
            subkey
            for subkey, (value, expires_at) in entries.items()
            if not protocol._validate_record(key, protocol.serializer.dumps(subkey), value, expires_at)
        ]
    for subkey in invalid:
        del entries[subkey]
    return True


async def _start_p2p(
    identity: Identity,
    *,
    listen_addresses: Sequence[str],
    initial_peers: Sequence[DhtAddress],
    startup_timeout_s: float,
) -> _DetachedP2P:
    made: list[_DetachedP2P] = []
    token = _being_made.set(made)
    try:
        with tempfile.TemporaryDirectory(prefix="swarm-") as folder:
            key_file = Path(folder) / "identity"
            key_file.touch(mode=0o600)
            key_file.write_bytes(identity.to_libp2p_bytes())
            await _DetachedP2P.create(
                initial_peers=[str(address) for address in initial_peers],
                host_maddrs=listen_addresses,
                no_listen=not listen_addresses,
                identity_path=str(key_file),
                check_if_identity_free=False,  # costs a second start; the key file's lock serves the purpose
                dht_mode="server" if listen_addresses else "client",
                nat_port_map=False,  # opening ports on somebody's router takes their consent
                startup_timeout=startup_timeout_s,
            )
    except BaseException as error:
        for p2p in made:
            await _stop_p2p(p2p)
        if not isinstance(error, P2PDaemonError):
            raise
        if initial_peers and ("bootstrap" in str(error) or "failed to start in" in str(error)):
            raise BootstrapFailedError(BootstrapFailure.NOBODY, str(error)) from error
        raise OSError(str(error)) from error
    finally:
        _being_made.reset(token)
    return made[0]


async def _stop_p2p(p2p: _DetachedP2P) -> None:
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await p2p.shutdown()
    except TimeoutError:
        logger.debug("p2pd did not end when asked to; ending it")
        with contextlib.suppress(ProcessLookupError):
            p2p._child.kill()
