"""What `swarm doctor --join ADDRESS` finds out about an address of a swarm."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from swarm.cli.examination import Finding
from swarm.cli.failures import sentence_for
from swarm.datatypes import ServerState, blocks_without_server, format_blocks
from swarm.errors import SwarmError

if TYPE_CHECKING:
    from swarm.models import ModelSource

__all__ = ["examine_address"]

_TIMEOUT_S: Final = 10.0


def examine_address(address: str, source: ModelSource | None) -> list[Finding]:
    """Whether an address can be joined at, how long it takes to answer, and what is served there."""
    try:
        return asyncio.run(_examine_address(address, source))
    except SwarmError as error:
        return [Finding(subject="swarm", verdict="problem", seen=sentence_for(error))]


async def _examine_address(address: str, source: ModelSource | None) -> list[Finding]:
    from swarm.discovery import open_registry
    from swarm.discovery.addresses import HostPort, parse_join_address

    findings: list[Finding] = []
    parsed = parse_join_address(address)
    if isinstance(parsed, HostPort):
        findings.append(await _ask_server(parsed))
        if source is None:
            return findings
    started_s = time.monotonic()
    registry = await open_registry([address], timeout_s=_TIMEOUT_S)
    try:
        joined_s = time.monotonic() - started_s
        if not findings:
            findings.append(
                Finding(
                    subject="swarm",
                    verdict="ok",
                    seen=f"joined at {address} in {joined_s:.1f} s",
                    advice="" if source else "add the name of a model to see who serves it",
                )
            )
        if source is not None:
            findings.append(_judge_coverage(source, await registry.lookup(source.model_hash, source.num_blocks)))
    finally:
        await registry.close()
    return findings


def _judge_coverage(source: ModelSource, servers: list[Any]) -> Finding:
    num_online = sum(server.state is ServerState.ONLINE for server in servers)
    missing = blocks_without_server(servers, source.num_blocks)
    if missing:
        return Finding(
            subject="coverage",
            verdict="warn",
            seen=f"{num_online} servers of {source.name} are online; nobody serves blocks {format_blocks(missing)}",
            advice=f"swarm serve {source.name} --join ADDRESS --blocks {missing[0]}:{missing[-1] + 1}",
        )
    return Finding(
        subject="coverage", verdict="ok", seen=f"{num_online} servers of {source.name} are online and cover all blocks"
    )


async def _ask_server(address: Any) -> Finding:
    """A server's own account of itself, and how long one question takes."""
    import grpc
    import grpc.aio

    from swarm.errors import JoinError
    from swarm.pb import node_pb2
    from swarm.wire.limits import channel_options
    from swarm.wire.methods import HEALTH, INFO

    async with grpc.aio.insecure_channel(str(address), options=channel_options()) as channel:
        try:
            body: bytes = await channel.unary_unary(INFO)(
                node_pb2.InfoRequest().SerializeToString(), timeout=_TIMEOUT_S
            )
            started_s = time.perf_counter()
            await channel.unary_unary(HEALTH)(node_pb2.HealthRequest().SerializeToString(), timeout=_TIMEOUT_S)
            latency_ms = (time.perf_counter() - started_s) * 1e3
            info = node_pb2.InfoReply.FromString(body)
        except (grpc.RpcError, ValueError) as error:
            raise JoinError(
                f"no server answers at {address.join_text}; check that it runs and that firewalls let its port through"
            ) from error
    server = info.server
    return Finding(
        subject="swarm",
        verdict="ok",
        seen=(
            f"{address.join_text} answers in {latency_ms:.1f} ms: {server.model_name[:80]}, blocks"
            f" {server.start}:{server.end} of {server.num_blocks}, {server.weights[:20]},"
            f" {server.kv_tokens_free:,} KV tokens free, {server.num_sessions} sessions, up {info.uptime_s} s"
        ),
    )
