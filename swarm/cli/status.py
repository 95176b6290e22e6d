"""`swarm status`: which blocks are covered how often, and by whom."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from swarm.cli.open_client import check_join_addresses
from swarm.cli.options import JoinOption, JsonOption, ModelArgument, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console
from swarm.datatypes import ServerInfo, ServerState, blocks_without_server, format_blocks

if TYPE_CHECKING:
    from swarm.datatypes import ModelHash

__all__ = ["coverage_of", "server_to_json", "status"]

_LOOKUP_TIMEOUT_S: Final = 15.0


def status(
    model: ModelArgument,
    join: JoinOption,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Show which blocks of a model are covered, and every server of it."""
    prepare_process(verbose)
    with json_only(json):
        check_join_addresses(join)
        with TerminalProgress() as progress:
            progress.start(f"Looking {model} up", None, "")
            from swarm.models import resolve_model

            source = resolve_model(model, report=progress)
            progress.start("Asking the swarm", None, "")
            servers = asyncio.run(look_up(join, source.model_hash, source.num_blocks))
        coverage = coverage_of(servers, source.num_blocks)
        if json:
            print_json(
                {
                    "model": model,
                    "num_blocks": source.num_blocks,
                    "coverage": coverage,
                    "servers": [server_to_json(server) for server in servers],
                }
            )
        else:
            _print_table(model, servers, coverage)


async def look_up(join: Sequence[str], model_hash: ModelHash, num_blocks: int) -> list[ServerInfo]:
    """All servers of a model that the swarm knows, whatever their state.

    Raises:
        JoinError: nobody answers at the addresses.
    """
    from swarm.discovery import open_registry

    registry = await open_registry(join, timeout_s=_LOOKUP_TIMEOUT_S)
    try:
        return await registry.lookup(model_hash, num_blocks)
    finally:
        await registry.close()


def coverage_of(servers: Sequence[ServerInfo], num_blocks: int) -> list[int]:
    """How many ONLINE servers hold each block."""
    coverage = [0] * num_blocks
    for server in servers:
        if server.state is ServerState.ONLINE:
            for block in range(server.span.start, min(server.span.end, num_blocks)):
                coverage[block] += 1
    return coverage


def server_to_json(server: ServerInfo) -> dict[str, Any]:
    """One entry of `servers` in `status --json`."""
    wish = server.moving_to
    return {
        "peer_id": server.peer_id,
        "start": server.span.start,
        "end": server.span.end,
        "state": server.state.value,
        "weights": server.weights,
        "kv_policy": server.kv_policy,
        "kv_tokens_free": server.kv_tokens_free,
        "kv_tokens_total": server.kv_tokens_total,
        "num_sessions": server.num_sessions,
        "tokens_per_s": server.tokens_per_s,
        "addresses": list(server.addresses),
        "version": server.version,
        "adapters": [{"name": adapter.name, "hash": adapter.adapter_hash} for adapter in server.adapters],
        "moving_to": {"start": wish.start, "end": wish.end} if wish is not None else None,
    }


def coverage_bar(coverage: Sequence[int]) -> str:
    """One character per block: how many servers hold it (+ above nine), a dot for none."""
    return "".join("·" if count == 0 else str(count) if count < 10 else "+" for count in coverage)


def _blocks(server: ServerInfo) -> str:
    return str(server.span) if server.moving_to is None else f"{server.span} → {server.moving_to}"


def _print_table(model: str, servers: Sequence[ServerInfo], coverage: Sequence[int]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = results_console()
    missing = blocks_without_server(servers, len(coverage))
    console.print(Text.assemble((model, "bold"), f"  {len(coverage)} blocks"))
    console.print(
        Text("servers per block  "), Text(coverage_bar(coverage), style="red" if missing else "green"), sep=""
    )
    if missing:
        console.print(f"nobody serves block{'s' if len(missing) > 1 else ''} {format_blocks(missing)}", style="red")
    else:
        console.print("every block is served", style="green")
    if not servers:
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("blocks", "server", "state", "weights", "KV policy"):
        table.add_column(name, no_wrap=True)
    for name in ("KV tokens free", "sessions", "tokens/s"):
        table.add_column(name, no_wrap=True, justify="right")
    offers_adapters = any(server.adapters for server in servers)
    if offers_adapters:
        table.add_column("adapters")
    table.add_column("address", no_wrap=True)
    for server in servers:
        table.add_row(
            _blocks(server),
            f"…{server.peer_id[-8:]}",
            Text(server.state.value, style="green" if server.state is ServerState.ONLINE else "yellow"),
            server.weights,
            server.kv_policy,
            f"{server.kv_tokens_free:,} of {server.kv_tokens_total:,}",
            str(server.num_sessions),
            f"{server.tokens_per_s:.1f}",
            *([", ".join(adapter.name for adapter in server.adapters)] if offers_adapters else []),
            Text(server.addresses[0] if server.addresses else ""),
        )
    console.print(table)
