"""Addresses: what people paste is understood or explained, what peers announce is checked."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.datatypes import PeerId
from swarm.discovery.addresses import (
    DhtAddress,
    HostPort,
    advertised_host,
    is_wildcard_host,
    parse_host_port,
    parse_join_address,
    sort_by_reach,
)
from swarm.errors import BadInputError

PEER = PeerId("12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq")  # part of test names, so the same in every run


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:4000", "127.0.0.1", 4000),
        ("[::1]:4000", "::1", 4000),
        ("[2001:db8::7]:65535", "2001:db8::7", 65535),
        ("localhost:1", "localhost", 1),
        ("my-pc.fritz.box:4000", "my-pc.fritz.box", 4000),
        ("swarm_server-1:4000", "swarm_server-1", 4000),
    ],
)
def test_host_and_port_of_every_kind_are_read_and_written_alike(text: str, host: str, port: int) -> None:
    """Announced addresses are dialled as they are written."""
    assert parse_host_port(text) == HostPort(host=host, port=port)
    assert str(parse_host_port(text)) == text
    assert parse_join_address(f"grpc://{text}") == HostPort(host=host, port=port)
    assert parse_join_address(f" grpc://{text}/ \n") == HostPort(host=host, port=port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        ":4000",
        "host:0",
        "host:65536",
        "host:١",
        "host:+5",
        "::1:4000",
        "[::1]",
        "[127.0.0.1]:4000",
        "300.1.1.1:4000",
        "1.2.3:4000",
        "ho st:4000",
        "-host:4000",
        "host\n:4000",
        "http://host:4000",
        "unix:/tmp/x:4000",
        "[fe80::1%\x1b[2J]:4000",
        "h" * 64 + ":4000",
        ("h." * 200) + "h:4000",
    ],
)
def test_other_text_is_no_host_and_port(text: str) -> None:
    """gRPC gives some of these meanings of its own (unix:, dns:), which peers must not make us use."""
    with pytest.raises(BadInputError, match="HOST:PORT"):
        parse_host_port(text)


@given(st.text(max_size=60))
def test_whatever_parses_is_printable_and_stable(text: str) -> None:
    """Addresses end up in terminals; what is accepted must be harmless there."""
    try:
        parsed = parse_host_port(text)
    except BadInputError:
        return
    assert str(parsed).isprintable()
    assert parse_host_port(str(parsed)) == parsed


@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_ip_address_makes_a_round_trip(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    """IPv6 needs brackets in one form and none in the other."""
    address = HostPort(host=str(ip), port=port)
    assert parse_host_port(str(address)) == address
    dht = DhtAddress(protocol=f"ip{ip.version}", host=str(ip), port=port, peer_id=PEER)
    assert parse_join_address(str(dht)) == dht


@pytest.mark.parametrize(
    "text", [f"/ip4/10.0.0.1/tcp/4001/p2p/{PEER}", f"/ip6/::1/tcp/1/p2p/{PEER}", f"/dns4/boot.example/tcp/1/p2p/{PEER}"]
)
def test_dht_addresses_are_read_as_they_are_printed(text: str) -> None:
    """`bootstrap` prints them, people paste them."""
    address = parse_join_address(text)
    assert isinstance(address, DhtAddress)
    assert address.peer_id == PEER
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("/ip4/10.0.0.1/tcp/4001", "lacks the peer id"),
        (f"/ip4/10.0.0.1/tcp/4001/p2p/{PEER[:-1]}", "does not end in a peer id"),
        (f"/ip4/10.0.0.1/udp/4001/p2p/{PEER}", "not an address to join at"),
        (f"/ip4/boot.example/tcp/4001/p2p/{PEER}", "not an address to join at"),
        (f"/ip4/10.0.0.1/tcp/99999/p2p/{PEER}", "not an address to join at"),
        (f"/ip9/10.0.0.1/tcp/4001/p2p/{PEER}", "not an address to join at"),
        ("10.0.0.1:4000", "did you mean grpc://10.0.0.1:4000"),
        ("http://10.0.0.1:4000", "not an address to join at"),
        ("grpc://10.0.0.1", "not an address to join at"),
        ("", "not an address to join at"),
        ("/" * 10_000, "not an address to join at"),
    ],
)
def test_a_mistyped_join_address_is_explained(text: str, explanation: str) -> None:
    """This is the first thing a newcomer types by hand."""
    with pytest.raises(BadInputError, match=explanation) as refusal:
        parse_join_address(text)
    assert len(str(refusal.value)) < 500


def test_wildcards_are_told_from_addresses() -> None:
    """0.0.0.0 is where a server listens, never where others reach it."""
    assert all(is_wildcard_host(host) for host in ("0.0.0.0", "::", "", "*"))
    assert not any(is_wildcard_host(host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.0"))


def test_the_advertised_host_is_one_that_others_can_use() -> None:
    """An announcement of 0.0.0.0 would send every client to its own machine."""
    assert advertised_host("192.168.0.7") == "192.168.0.7"
    assert advertised_host("my-pc.local") == "my-pc.local"
    for wildcard, version in (("0.0.0.0", 4), ("::", 6)):
        host = advertised_host(wildcard)
        assert ipaddress.ip_address(host).version == version
        assert not is_wildcard_host(host)


def test_addresses_that_more_machines_can_reach_come_first() -> None:
    """The first printed address is the one people copy."""
    hosts = ["127.0.0.1", "169.254.3.4", "192.168.0.7", "localhost", "10.0.0.1", "::1"]
    assert sort_by_reach(hosts) == ["192.168.0.7", "10.0.0.1", "169.254.3.4", "127.0.0.1", "localhost", "::1"]
