"""The client's channels to servers, one per address, kept open between sessions."""

from __future__ import annotations

import grpc.aio

from swarm.datatypes import ServerInfo
from swarm.errors import PeerLostError
from swarm.wire.limits import channel_options

__all__ = ["ServerChannels"]


class ServerChannels:
    """Channels by address; belongs to one event loop."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def to(self, server: ServerInfo) -> grpc.aio.Channel:
        """A channel to a server's best address. Raises PeerLostError when it announced none."""
        if not server.addresses:
            raise PeerLostError(f"server {server.peer_id} announced no address")
        address = server.addresses[0]
        channel = self._channels.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=channel_options())
            self._channels[address] = channel
        return channel

    async def drop(self, server: ServerInfo) -> None:
        """Forget a server's channel: a peer that was lost is dialled anew, without gRPC's growing backoff."""
        for address in server.addresses:
            channel = self._channels.pop(address, None)
            if channel is not None:
                await channel.close()

    async def close(self) -> None:
        """Close all channels."""
        channels = list(self._channels.values())
        self._channels.clear()
        for channel in channels:
            await channel.close()
