"""Which LoRA adapter a client's sessions use: a name, until servers have said what it stands for. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.datatypes import AdapterHash, ServerInfo, ServerState, blocks_without_server, format_blocks
from swarm.errors import BadInputError

__all__ = ["AdapterChoice", "adapter_hash_on"]


class AdapterChoice:
    """An adapter's name and, once found, its hash: all hops of all routes must hold the same one.

    Where servers mean different adapters by the name, the one counts that covers most blocks. It is not given up
    as long as the client lives, or a conversation would go on with another model after a failover.
    """

    def __init__(self, name: str | None, *, model_name: str, num_blocks: int) -> None:
        """`name` None uses the model as it is."""
        self.name = name
        self._model_name = model_name
        self._num_blocks = num_blocks
        self._hash: AdapterHash | None = None

    def __repr__(self) -> str:
        return f"<AdapterChoice {self.name} {self._hash}>"

    def usable(self, servers: Sequence[ServerInfo]) -> list[ServerInfo]:
        """Those of `servers` that hold the adapter; all of them when none was chosen."""
        if self.name is None:
            return list(servers)
        wanted = self._hash or self._best(servers)
        return [] if wanted is None else self._holders(servers, wanted)

    def settle(self, servers: Sequence[ServerInfo]) -> None:
        """A route is about to be planned over `usable(servers)`: the name means the same from now on.

        Raises BadInputError when the model is served and nobody offers the adapter: waiting would not help.
        """
        if self.name is None or self._hash is not None:
            return
        wanted = self._best(servers)
        if wanted is None:
            if not blocks_without_server(servers, self._num_blocks):
                raise BadInputError(self._unknown(servers))
        elif not blocks_without_server(self._holders(servers, wanted), self._num_blocks):
            self._hash = wanted

    def _best(self, servers: Sequence[ServerInfo]) -> AdapterHash | None:
        online = [server for server in servers if server.state is ServerState.ONLINE]
        hashes = {found for server in online if (found := adapter_hash_on(server, self.name))}
        missing = {
            found: (len(blocks_without_server(self._holders(servers, found), self._num_blocks)), found)
            for found in hashes
        }
        return min(hashes, key=missing.__getitem__) if hashes else None

    def _holders(self, servers: Sequence[ServerInfo], wanted: AdapterHash) -> list[ServerInfo]:
        return [server for server in servers if adapter_hash_on(server, self.name) == wanted]

    def _unknown(self, servers: Sequence[ServerInfo]) -> str:
        offered = sorted({adapter.name for server in servers for adapter in server.adapters})
        what = f"offered are {', '.join(offered)}" if offered else "none is offered"
        return (
            f"no server offers the adapter {self.name!r} for {self._model_name}; {what} "
            f"(`swarm serve {self._model_name} --adapter NAME=FOLDER` offers one)"
        )

    def describe(self, servers: Sequence[ServerInfo]) -> str:
        """What to say after "nobody serves these blocks of MODEL": nothing when no adapter was chosen."""
        if self.name is None:
            return ""
        usable = self.usable(servers)
        others = [server.span for server in servers if server not in usable and adapter_hash_on(server, self.name)]
        if not others:
            return f" with the adapter {self.name!r}"
        blocks = format_blocks(sorted({block for span in others for block in range(span.start, span.end)}))
        return f" with the same adapter {self.name!r} (servers of blocks {blocks} mean another one by that name)"


def adapter_hash_on(server: ServerInfo, name: str | None) -> AdapterHash | None:
    """What a server means by an adapter's name; None when it has none of that name, or none is asked for."""
    return next((adapter.adapter_hash for adapter in server.adapters if adapter.name == name), None)
