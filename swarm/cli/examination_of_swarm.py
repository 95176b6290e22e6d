"""What `swarm doctor` finds out about a model on this machine, and about an address of a swarm."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from swarm.cli.examination import Finding
from swarm.cli.failures import sentence_for
from swarm.cli.machine import read_memory
from swarm.datatypes import ServerState, blocks_without_server, format_blocks
from swarm.errors import SwarmError

if TYPE_CHECKING:
    from swarm.models import ModelSource
    from swarm.models.progress import ProgressReporter

__all__ = ["BlockNeeds", "blocks_that_fit", "examine_address", "examine_model"]

_GIB: Final = 2**30
_TIMEOUT_S: Final = 10.0
_KV_SHARE: Final = 0.25
"""Part of the usable memory that the estimate leaves to the KV cache."""
_USABLE_SHARE: Final = 0.8
"""Part of the free memory that the estimate dares to use."""


@dataclass(frozen=True, kw_only=True)
class BlockNeeds:
    """What one block takes, in bytes."""

    weight_bytes: int
    """Of the largest block."""
    kv_bytes_per_token: int


def examine_model(name: str, report: ProgressReporter) -> tuple[ModelSource | None, Finding]:
    """How much of a model fits here, from its config alone; and the model, where it was found."""
    from swarm.models import resolve_model, unsupported_reason

    try:
        source = resolve_model(name, report=report)
    except SwarmError as error:
        return None, Finding(subject="model", verdict="problem", seen=sentence_for(error))
    reason = unsupported_reason(source.config)
    if reason is not None:
        return source, Finding(subject="model", verdict="problem", seen=reason, advice="choose another model")
    memory_bytes, dtype_bytes, place = _find_memory()
    needs = _measure_needs(source, dtype_bytes)
    num_fit, num_tokens = blocks_that_fit(memory_bytes, source.num_blocks, needs)
    seen = f"{name}: {source.num_blocks} blocks of {needs.weight_bytes / 2**20:.0f} MiB ({place}); "
    if num_fit == 0:
        return source, Finding(
            subject="model",
            verdict="problem",
            seen=f"{seen}not one fits into {memory_bytes / _GIB:.1f} GiB",
            advice="free memory, or choose a smaller model",
        )
    return source, Finding(
        subject="model",
        verdict="ok",
        seen=f"{seen}about {num_fit} fit, with room for {num_tokens:,} KV tokens",
        advice="" if num_fit == source.num_blocks else f"swarm serve {name} --num-blocks {num_fit}",
    )


def blocks_that_fit(memory_bytes: int, num_blocks: int, needs: BlockNeeds) -> tuple[int, int]:
    """How many blocks fit, and how many tokens of KV cache beside them; an estimate.

    A quarter of the memory is left to the KV cache; when all blocks fit, whatever they leave.
    """
    usable_bytes = int(memory_bytes * _USABLE_SHARE)
    num_fit = min(num_blocks, int(usable_bytes * (1 - _KV_SHARE)) // needs.weight_bytes)
    if num_fit < 1:
        return 0, 0
    kv_bytes = usable_bytes - num_fit * needs.weight_bytes
    return num_fit, kv_bytes // (num_fit * needs.kv_bytes_per_token)


def _find_memory() -> tuple[int, int, str]:
    """Free bytes where blocks would be, bytes of a weight there, and both in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(0)[0], 2, "bf16 on cuda:0"
    memory = read_memory()
    return (memory.available_bytes if memory else 0), 4, "fp32 on the CPU"


def _measure_needs(source: ModelSource, dtype_bytes: int) -> BlockNeeds:
    """Sizes of a model built without any weights."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    from swarm.models.anatomy import dissect

    config: Any = copy.deepcopy(source.config)
    text_config: Any = config.get_text_config(decoder=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stack = dissect(model, text_config).stack
    num_weights = max(sum(parameter.numel() for parameter in block.parameters()) for block in stack)
    num_heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return BlockNeeds(weight_bytes=num_weights * dtype_bytes, kv_bytes_per_token=2 * num_heads * head_dim * dtype_bytes)


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
                    advice="" if source else "add --model MODEL to see who serves it",
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
