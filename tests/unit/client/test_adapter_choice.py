"""What an adapter's name means to a client, given what servers announce."""

from __future__ import annotations

import pytest

from swarm.client.adapter_choice import AdapterChoice, adapter_hash_on
from swarm.datatypes import AdapterHash, AdapterInfo, ServerInfo, ServerState
from swarm.errors import BadInputError
from tests.server_infos import make_server

RED, BLUE = AdapterHash("aa" * 16), AdapterHash("bb" * 16)


def server(
    peer: str, start: int, end: int, *, state: ServerState = ServerState.ONLINE, **adapters: AdapterHash
) -> ServerInfo:
    offered = [AdapterInfo(name=name, adapter_hash=adapter_hash) for name, adapter_hash in adapters.items()]
    return make_server(peer, start, end, state=state, adapters=offered)


def choice(name: str | None = "mine") -> AdapterChoice:
    return AdapterChoice(name, model_name="tiny", num_blocks=12)


def peers(servers: list[ServerInfo]) -> str:
    return "".join(server.peer_id for server in servers)


def test_without_an_adapter_every_server_will_do() -> None:
    """A server that offers adapters serves the model as it is, too."""
    servers = [server("a", 0, 12), server("b", 0, 12, mine=RED)]
    assert peers(choice(None).usable(servers)) == "ab"
    assert adapter_hash_on(servers[1], None) is None


def test_only_servers_that_hold_it() -> None:
    """A hop without the adapter would compute with another model."""
    servers = [server("a", 0, 12), server("b", 0, 6, mine=RED), server("c", 6, 12, yours=RED, mine=RED)]
    assert peers(choice().usable(servers)) == "bc"
    assert peers(choice("nobodys").usable(servers)) == ""


def test_the_name_means_what_covers_most() -> None:
    """Of several adapters of one name, one that can be used wins over one that can not."""
    servers = [server("a", 0, 4, mine=RED), server("b", 0, 12, mine=BLUE), server("c", 4, 8, mine=RED)]
    assert peers(choice().usable(servers)) == "b"


def test_the_meaning_stays() -> None:
    """After a failover a conversation goes on with the adapter it began with, or not at all."""
    chosen = choice()
    chosen.settle([server("a", 0, 12, mine=RED), server("b", 0, 6, mine=BLUE)])
    later = [server("b", 0, 12, mine=BLUE), server("c", 0, 6, mine=RED)]
    chosen.settle(later)
    assert peers(chosen.usable(later)) == "c"


def test_a_meaning_that_leads_nowhere_is_not_settled() -> None:
    """Servers that started first decide nothing while they do not cover the model."""
    chosen = choice()
    chosen.settle([server("a", 0, 6, mine=RED), server("x", 0, 12)])
    assert peers(chosen.usable([server("a", 0, 6, mine=RED), server("b", 0, 12, mine=BLUE)])) == "b"


def test_an_unknown_name_is_told_at_once() -> None:
    """Waiting for a server does not mend a typing error, so what there is is named instead."""
    servers = [server("a", 0, 12, red=RED, blue=BLUE)]
    with pytest.raises(BadInputError, match="'mine' for tiny; offered are blue, red"):
        choice().settle(servers)
    with pytest.raises(BadInputError, match="none is offered"):
        choice().settle([server("a", 0, 12)])
    choice().settle([server("a", 0, 12, state=ServerState.JOINING)])  # whoever joins may bring it
    choice().settle([])


def test_what_is_missing() -> None:
    """The sentence says whether servers lack the adapter, or mean another one by its name."""
    assert choice(None).describe([server("a", 0, 6)]) == ""
    assert choice().describe([server("a", 0, 12, mine=RED), server("b", 0, 12)]) == " with the adapter 'mine'"
    both = [server("a", 0, 8, mine=RED), server("b", 8, 12, mine=BLUE)]
    assert "servers of blocks 8-11 mean another" in choice().describe(both)
