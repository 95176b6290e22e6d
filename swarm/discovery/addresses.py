"""Addresses people type and peers announce: `host:port`, `grpc://host:port`, `/ip4/…/tcp/…/p2p/…`."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from swarm.datatypes import PeerId
from swarm.errors import BadInputError
from swarm.identity import parse_peer_id

__all__ = [
    "DhtAddress",
    "HostPort",
    "JoinAddress",
    "advertised_host",
    "is_wildcard_host",
    "parse_host_port",
    "parse_join_address",
    "sort_by_reach",
]

_GRPC_SCHEME = "grpc://"
_EXAMPLES = "give /ip4/HOST/tcp/PORT/p2p/PEER_ID as `swarm bootstrap` prints it, or grpc://HOST:PORT of any server"
_MAX_CHARS = 512
_MAX_NAME_CHARS = 253
# Underscores are no part of host names proper, but container engines hand such names out.
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?", re.ASCII)
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_BRACKETED = re.compile(r"\[([^\[\]]*)\]:([^:]*)")


@dataclass(frozen=True, kw_only=True)
class HostPort:
    """A gRPC address. As text, `host:port`, with brackets round an IPv6 host."""

    host: str
    """IPv4 or IPv6 address without brackets, or a name."""
    port: int
    """1 to 65535."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def join_text(self) -> str:
        """What to pass to --join."""
        return f"{_GRPC_SCHEME}{self}"


@dataclass(frozen=True, kw_only=True)
class DhtAddress:
    """A DHT peer's address. As text, a multiaddr, which is what to pass to --join."""

    protocol: str
    """ip4, ip6, dns4, dns6 or dns."""
    host: str
    """An address or name, as the protocol says."""
    port: int
    """TCP port."""
    peer_id: PeerId
    """Who answers there."""

    def __str__(self) -> str:
        return f"/{self.protocol}/{self.host}/tcp/{self.port}/p2p/{self.peer_id}"


JoinAddress = DhtAddress | HostPort


def parse_host_port(text: str) -> HostPort:
    """`host:port` or `[ipv6]:port`. Raises BadInputError when it is neither."""
    if len(text) <= _MAX_CHARS:
        bracketed = _BRACKETED.fullmatch(text)
        host, port_text = bracketed.groups() if bracketed else _split_once(text)
        port = _parse_port(port_text)
        is_host_valid = _is_ip(host, 6) if bracketed else _is_ip(host, 4) or _is_name(host)
        if port is not None and is_host_valid:
            return HostPort(host=host, port=port)
    raise BadInputError(f"{_shown(text)} is not an address of the form HOST:PORT ([HOST]:PORT for IPv6)")


def parse_join_address(text: str) -> JoinAddress:
    """An address given to --join. Raises BadInputError that says what is wrong with it."""
    text = text.strip()
    if text.startswith(_GRPC_SCHEME):
        try:
            return parse_host_port(text.removeprefix(_GRPC_SCHEME).removesuffix("/"))
        except BadInputError as error:
            raise BadInputError(f"{_shown(text)} is not an address to join at; {_EXAMPLES}") from error
    if text.startswith("/"):
        return _parse_multiaddr(text)
    hint = ""
    with contextlib.suppress(BadInputError):
        hint = f"did you mean {parse_host_port(text).join_text}? Else "
    raise BadInputError(f"{_shown(text)} is not an address to join at; {hint}{_EXAMPLES}")


def _parse_multiaddr(text: str) -> DhtAddress:
    parts = text.split("/")
    if len(text) > _MAX_CHARS or len(parts) not in (5, 7) or parts[3] != "tcp":
        raise BadInputError(f"{_shown(text)} is not an address to join at; {_EXAMPLES}")
    _, protocol, host, _, port_text, *peer = parts
    port = _parse_port(port_text)
    is_host_valid = {"ip4": _is_ip(host, 4), "ip6": _is_ip(host, 6)}.get(protocol, _is_name(host))
    if protocol not in ("ip4", "ip6", "dns", "dns4", "dns6") or not is_host_valid or port is None:
        raise BadInputError(f"{_shown(text)} is not an address to join at; {_EXAMPLES}")
    if not peer or peer[0] != "p2p":
        raise BadInputError(f"{_shown(text)} lacks the peer id at its end; {_EXAMPLES}")
    try:
        peer_id = parse_peer_id(peer[1])
    except BadInputError as error:
        raise BadInputError(f"{_shown(text)} does not end in a peer id: {error}; copy the whole address") from error
    return DhtAddress(protocol=protocol, host=host, port=port, peer_id=peer_id)


def is_wildcard_host(host: str) -> bool:
    """Whether listening on `host` means listening on all of this machine's addresses."""
    return host in ("", "*") or (_is_ip(host) and ipaddress.ip_address(host).is_unspecified)


def sort_by_reach(hosts: Iterable[str]) -> list[str]:
    """Hosts by how many machines can reach them, widest first: ordinary addresses and names, link-local, loopback."""
    return sorted(hosts, key=_reach_rank)  # stable: what the caller preferred stays first among equals


def advertised_host(listen_host: str) -> str:
    """Where others reach a server that listens on `listen_host`: itself, or this machine's main address for 0.0.0.0.

    Sends nothing. 127.0.0.1 (::1) when the machine has no network.
    """
    if not is_wildcard_host(listen_host):
        return listen_host
    family, target = (socket.AF_INET6, "2001:db8::1") if ":" in listen_host else (socket.AF_INET, "192.0.2.1")
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket only asks the routing table which own address it would use; the
        # targets are addresses reserved for documentation.
        probe.connect((target, 9))
        host = str(probe.getsockname()[0]).partition("%")[0]
        if not is_wildcard_host(host):
            return host
    return "::1" if family == socket.AF_INET6 else "127.0.0.1"


def _reach_rank(host: str) -> int:
    if not _is_ip(host):
        return 2 if host == "localhost" else 0
    address = ipaddress.ip_address(host)
    if address.is_loopback:
        return 2
    return 1 if address.is_link_local else 0


def _split_once(text: str) -> tuple[str, str]:
    host, _, port = text.rpartition(":")
    return host, port


def _parse_port(text: str) -> int | None:
    if not _PORT.fullmatch(text) or not 1 <= int(text) <= 65535:
        return None
    return int(text)


def _is_ip(host: str, version: int | None = None) -> bool:
    if "%" in host:  # a scope means something on one machine only, and may hold any characters
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return version is None or address.version == version


def _is_name(host: str) -> bool:
    # All digits and dots is a mistyped IPv4 address, not a name.
    return len(host) <= _MAX_NAME_CHARS and bool(_NAME.fullmatch(host)) and not re.fullmatch(r"[0-9.]+", host)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:100]}…")
