"""Peer ids: the public key travels inside the name, and nothing else passes for a name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BadInputError
from swarm.identity import Identity, parse_peer_id, peer_id_from_public_key, public_key_of, verify


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_contains_its_public_key(public_key: bytes) -> None:
    """Signatures must be checkable from the id alone, without asking anybody for a key."""
    peer_id = peer_id_from_public_key(public_key)
    assert public_key_of(peer_id) == public_key
    assert peer_id.startswith("12D3KooW")
    assert len(peer_id) == 52


def test_peer_ids_are_those_of_libp2p() -> None:
    """p2pd derives the same id from the same key; this pair was printed by p2pd."""
    public_key = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert peer_id_from_public_key(public_key) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


@given(
    st.one_of(st.text(), st.text(alphabet="123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", min_size=52))
)
def test_other_text_is_no_peer_id(text: str) -> None:
    """Ids come from the network: every other text gets a clear error, never a crash."""
    try:
        parsed = parse_peer_id(text)
    except BadInputError:
        return
    assert peer_id_from_public_key(public_key_of(parsed)) == text


def test_a_key_of_another_size_is_a_mistake_of_ours() -> None:
    """A truncated key must not become a valid-looking name."""
    with pytest.raises(ValueError, match="32 bytes"):
        peer_id_from_public_key(b"short")


def test_only_the_owner_of_an_id_can_sign_for_it() -> None:
    """Records are believed because of this and nothing else."""
    owner, other = Identity.generate(), Identity.generate()
    signature = owner.sign(b"blocks 0:3")
    assert verify(owner.peer_id, b"blocks 0:3", signature)
    assert not verify(owner.peer_id, b"blocks 0:4", signature)
    assert not verify(other.peer_id, b"blocks 0:3", signature)


@given(st.text(), st.binary(), st.binary())
def test_verify_answers_false_for_whatever_it_is_given(peer_id: str, message: bytes, signature: bytes) -> None:
    """Hostile bytes must end in a plain no."""
    assert not verify(peer_id, message, signature)
    assert not verify(Identity.generate().peer_id, message, signature)
