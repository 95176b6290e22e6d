"""Channels to other servers, shared by the sessions that push to them and closed when the last one ends."""

from __future__ import annotations

import grpc.aio

from swarm.wire.limits import channel_options

__all__ = ["ChannelPool"]


class ChannelPool:
    """One gRPC channel per address, counted; belongs to one event loop."""

    def __init__(self) -> None:
        self._channels: dict[str, tuple[grpc.aio.Channel, int]] = {}

    def __len__(self) -> int:
        return len(self._channels)

    def acquire(self, address: str) -> grpc.aio.Channel:
        """The channel to `host:port`; every acquire needs a release."""
        channel, num_users = self._channels.get(address, (None, 0))
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=channel_options())
        self._channels[address] = (channel, num_users + 1)
        return channel

    async def release(self, address: str) -> None:
        """Give a channel back; the last one closes it."""
        channel, num_users = self._channels[address]
        if num_users > 1:
            self._channels[address] = (channel, num_users - 1)
        else:
            del self._channels[address]
            await channel.close()

    async def close(self) -> None:
        """Close everything, used or not."""
        channels = [channel for channel, _ in self._channels.values()]
        self._channels.clear()
        for channel in channels:
            await channel.close()
