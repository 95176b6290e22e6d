"""The client's channels to servers, one per address, kept open between sessions."""

from __future__ import annotations

import grpc
import grpc.aio

from swarm.datatypes import PeerId, ServerInfo
from swarm.errors import PeerLostError
from swarm.wire.limits import channel_options

__all__ = ["ServerChannels"]


class ServerChannels:
    """Channels by address; belongs to one event loop."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._num_losses: dict[PeerId, int] = {}

    def to(self, server: ServerInfo) -> grpc.aio.Channel:
        """A channel to a server's best address, or, each time it was lost there, to the next one.

        Raises PeerLostError when it announced none.
        """
        if not server.addresses:
            raise PeerLostError(f"server {server.peer_id} announced no address")
        address = server.addresses[self._num_losses.get(server.peer_id, 0) % len(server.addresses)]
        channel = self._channels.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=channel_options())
            self._channels[address] = channel
        return channel

    async def drop(self, server: ServerInfo) -> None:
        """A server was lost: dial it anew next time, without gRPC's growing backoff, at its next address.

        A channel that is connected stays: one session's trouble must not hang up on the others.
        """
        self._num_losses[server.peer_id] = self._num_losses.get(server.peer_id, 0) + 1
        for address in server.addresses:
            channel = self._channels.get(address)
            if channel is not None and channel.get_state() is not grpc.ChannelConnectivity.READY:
                del self._channels[address]
                await channel.close()

    async def close(self) -> None:
        """Close all channels."""
        channels = list(self._channels.values())
        self._channels.clear()
        for channel in channels:
            await channel.close()
