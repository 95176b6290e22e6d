"""The client's channels to servers, one per address, kept open between sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import grpc
import grpc.aio

from swarm.datatypes import PeerId, ServerInfo
from swarm.errors import PeerLostError
from swarm.wire.limits import channel_options

__all__ = ["ServerChannels", "lost_when_closed"]


class ServerChannels:
    """Channels by address; belongs to one event loop."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._num_losses: dict[PeerId, int] = {}

    def to(self, server: ServerInfo) -> grpc.aio.Channel:
        """A channel to a server's best address, or, each time it was lost there, to the next one.

        Raises PeerLostError when it announced none.
        """
        address = self._address(server)
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = _dial(address)
        return channel

    def dial(self, server: ServerInfo) -> grpc.aio.Channel:
        """A channel of its own to where `to` leads, for the caller to close or to `adopt`. Raises PeerLostError."""
        return _dial(self._address(server))

    async def adopt(self, server: ServerInfo, channel: grpc.aio.Channel) -> None:
        """Use a channel from `dial` in the place of the one before, which no longer leads anywhere."""
        address = self._address(server)
        before, self._channels[address] = self._channels.get(address), channel
        if before is not None:
            await before.close()

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

    def _address(self, server: ServerInfo) -> str:
        if not server.addresses:
            raise PeerLostError(f"server {server.peer_id} announced no address")
        return server.addresses[self._num_losses.get(server.peer_id, 0) % len(server.addresses)]


@contextlib.contextmanager
def lost_when_closed(peer: PeerId) -> Iterator[None]:
    """Around a call's awaits: raise PeerLostError when its channel is closed, which others who use it may do.

    gRPC cancels the call then, which would look to the caller as if he himself had been cancelled.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise PeerLostError(f"the connection to server {peer} was given up") from None
    except grpc.aio.UsageError as error:  # it was closed between being handed out and being used
        raise PeerLostError(f"the connection to server {peer} was given up") from error


def _dial(address: str) -> grpc.aio.Channel:
    # Else gRPC would give two channels to one address the same connection, the broken one for instance.
    own_connection = ("grpc.use_local_subchannel_pool", 1)
    return grpc.aio.insecure_channel(address, options=[*channel_options(), own_connection])
