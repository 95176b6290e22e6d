"""`swarm serve`: contribute this machine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.failures import INTERRUPTED
from swarm.cli.long_running import Orders, end_process, run_until_told, say_how_to_stop, wait_for_orders
from swarm.cli.open_client import check_join_addresses
from swarm.cli.options import (
    ExitWithParentOption,
    JsonOption,
    ModelArgument,
    OptionalJoinOption,
    VerboseOption,
    parse_adapters,
    parse_blocks,
)
from swarm.cli.parent_watch import ParentWatch
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console, say
from swarm.errors import BadInputError

if TYPE_CHECKING:
    from swarm.datatypes import ServerInfo
    from swarm.identity import Identity
    from swarm.models import ModelSource
    from swarm.server.node import Node, NodeConfig

__all__ = ["serve"]

_SHARING = "Sharing"
_NETWORK = "Network"


def serve(
    model: ModelArgument,
    join: OptionalJoinOption = None,
    new_swarm: Annotated[
        bool, typer.Option("--new-swarm", help="Start a swarm of its own, which others then join.")
    ] = False,
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            metavar="A:B",
            help="Serve blocks A up to but not including B.",
            show_default="those that help the swarm most",
            rich_help_panel=_SHARING,
        ),
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            "--num-blocks",
            metavar="N",
            help="Serve N blocks, those that help the swarm most.",
            show_default="as many as help most",
            rich_help_panel=_SHARING,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="auto|cpu|cuda:N",
            help="Where to compute; cuda:0,cuda:1 share the blocks.",
            rich_help_panel=_SHARING,
        ),
    ] = "auto",
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="auto|fp32|bf16|int8|nf4",
            help="Precision of the weights; auto is nf4 on a GPU, and on a CPU what keeps them as they were published.",
            rich_help_panel=_SHARING,
        ),
    ] = "auto",
    double_quantise: Annotated[
        bool,
        typer.Option(
            "--double-quantise",
            help="Quantise the scales of nf4 weights, too (on a GPU): a little smaller, a little less exact.",
            rich_help_panel=_SHARING,
        ),
    ] = False,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Serve more blocks than fit: the others stream in from main memory or disk, which is slow.",
            rich_help_panel=_SHARING,
        ),
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=FOLDER",
            help="Offer a LoRA adapter in PEFT's format, which clients choose by this name; may be repeated.",
            show_default=False,
            rich_help_panel=_SHARING,
        ),
    ] = None,
    kv: Annotated[
        str,
        typer.Option(
            "--kv",
            metavar="none|gear|pyramid|pyramid+gear",
            help="How the KV cache is compressed, so that more and longer sessions fit; also a preset such as smallest"
            " or twentieth (docs/kv-cache.md). Clients may still ask for exact ones.",
            rich_help_panel=_SHARING,
        ),
    ] = "none",
    kv_memory: Annotated[
        str | None,
        typer.Option(
            "--kv-memory",
            metavar="SIZE",
            help="Memory for the KV cache.",
            show_default="1GiB; on a GPU what the blocks leave",
            rich_help_panel=_SHARING,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            min=1,
            help="CPU threads to compute with.",
            show_default="one per core",
            rich_help_panel=_SHARING,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Address to listen on.", rich_help_panel=_NETWORK)
    ] = "0.0.0.0",
    announce_host: Annotated[
        str | None,
        typer.Option(
            "--announce-host",
            metavar="HOST",
            help="Name or address by which others reach this machine.",
            show_default="found out",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            "--port",
            metavar="PORT",
            min=0,
            max=65535,
            help="For clients and other servers; 0 picks a free one.",
            rich_help_panel=_NETWORK,
        ),
    ] = 0,
    announce_port: Annotated[
        int | None,
        typer.Option(
            "--announce-port",
            metavar="PORT",
            min=1,
            max=65535,
            help="Port by which others reach --port, behind a port forward or a proxy.",
            show_default="the same",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    dht_port: Annotated[
        int,
        typer.Option(
            "--dht-port",
            metavar="PORT",
            min=0,
            max=65535,
            help="For finding each other; 0 picks a free one.",
            rich_help_panel=_NETWORK,
        ),
    ] = 0,
    identity: Annotated[
        Path | None,
        typer.Option(
            "--identity",
            metavar="FILE",
            help="Key file, made if missing; keeps this server's name the same over restarts.",
            show_default=False,
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    rebalance_period: Annotated[
        float,
        typer.Option(
            "--rebalance-period",
            metavar="SECONDS",
            min=0.0,
            help="How often to ask whether other blocks would help the swarm more, and move there; 0: never. Only"
            " without --blocks.",
            rich_help_panel=_SHARING,
        ),
    ] = 300.0,
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout",
            metavar="SECONDS",
            min=0.0,
            help="How long to let open sessions finish when leaving or moving.",
            rich_help_panel=_NETWORK,
        ),
    ] = 60.0,
    exit_with_parent: ExitWithParentOption = False,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Contribute this machine: choose blocks, load them, announce them, and serve them until told to stop.

    The first Ctrl-C (or SIGTERM) lets open sessions finish, a second one leaves at once.
    """
    parent = ParentWatch() if exit_with_parent else None
    prepare_process(verbose, swarm_level=logging.WARNING)
    # Weights in huge pages: every token reads all of them, and with small pages the address translation alone
    # costs a tenth to a fifth of a decoding step on a CPU. torch reads this once, at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with json_only(json):
        join = join or []
        _check_join_choice(join, new_swarm)
        span = parse_blocks(blocks) if blocks is not None else None
        with TerminalProgress() as progress:
            progress.start("Loading libraries", None, "")
            from swarm.models import resolve_model
            from swarm.server.capacity import parse_memory_bytes
            from swarm.server.node import NodeConfig

            config = NodeConfig(
                span=span,
                num_blocks=num_blocks,
                device=device,
                weights=weights,
                offload=offload,
                double_quantised=double_quantise,
                adapters=parse_adapters(adapter or ()),
                kv_policy=kv,
                kv_memory_bytes=parse_memory_bytes(kv_memory) if kv_memory is not None else None,
                host=host,
                announce_host=announce_host,
                announce_port=announce_port,
                port=port,
                dht_port=dht_port,
                join=join,
                identity_path=identity,
                drain_timeout_s=drain_timeout,
                rebalance_period_s=rebalance_period,
                num_threads=threads,
            )
            own_identity = _open_identity(identity)
            # Before the event loop: a download takes long, and ends at once on Ctrl-C here.
            source = resolve_model(model, report=progress)
        with own_identity:
            run_until_told(lambda: _serve(source, own_identity, config, parent=parent, is_json=json))


def _check_join_choice(join: list[str], new_swarm: bool) -> None:
    if not join and not new_swarm:
        raise BadInputError("which swarm? Pass --join ADDRESS to join one, or --new-swarm to start one")
    if join and new_swarm:
        raise BadInputError("--join and --new-swarm exclude each other; pass one of them")
    check_join_addresses(join)


def _open_identity(path: Path | None) -> Identity:
    from swarm.identity import Identity

    return Identity.load_or_create(path) if path is not None else Identity.generate()


async def _serve(
    source: ModelSource, identity: Identity, config: NodeConfig, *, parent: ParentWatch | None, is_json: bool
) -> None:
    from swarm.server.node import Node

    orders = wait_for_orders(parent)
    node = Node(source, identity, config)
    with TerminalProgress() as progress:
        progress.start("Joining the swarm", None, "")
        await orders.unless_given(node.start(progress))
    if is_json:
        print_json(_ready_object(node))
    else:
        _print_banner(node, source)
    node.on_moved = lambda left, move: say(f"Moved from blocks {left} {move}.")
    await _until_ordered(node, orders)
    await _leave(node, orders, drain_timeout_s=config.drain_timeout_s)
    if node.is_loading:
        end_process(0)


async def _until_ordered(node: Node, orders: Orders) -> None:
    """Wait for the first order. Raises FinalError when the server can not go on before that."""
    ordered = asyncio.create_task(orders.first(), name="orders")
    failed = asyncio.create_task(node.wait_until_failed(), name="failed")
    try:
        await asyncio.wait((ordered, failed), return_when=asyncio.FIRST_COMPLETED)
        if failed.done() and not ordered.done():
            await node.leave()
            raise failed.result()
    finally:
        ordered.cancel()
        failed.cancel()


async def _leave(node: Node, orders: Orders, *, drain_timeout_s: float) -> None:
    """Drain, unless told to leave at once before that is over."""
    draining = asyncio.create_task(node.drain(), name="drain")
    hurry = asyncio.create_task(orders.second(), name="hurry")
    if not orders.parent_is_gone:
        num_sessions = node.info.num_sessions
        say(
            f"Draining: taking no new sessions, waiting up to {drain_timeout_s:g} s for {num_sessions} open ones;"
            " interrupt again to leave at once."
            if num_sessions
            else "Leaving."
        )
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    if hurry.done() and not draining.done():
        await node.leave()
        with contextlib.suppress(asyncio.CancelledError):
            draining.cancel()
            await draining
        if node.is_loading:
            end_process(INTERRUPTED)
        if not orders.parent_is_gone:
            raise typer.Exit(INTERRUPTED)
    else:
        hurry.cancel()
        await draining


def _ready_object(node: Node) -> dict[str, object]:
    info = node.info
    return {
        "address": node.join_addresses()[0],
        "peer_id": info.peer_id,
        "model": info.model_name,
        "start": info.span.start,
        "end": info.span.end,
        "weights": info.weights,
        "kv_policy": info.kv_policy,
        "kv_tokens_total": info.kv_tokens_total,
        "adapters": [{"name": adapter.name, "hash": adapter.adapter_hash} for adapter in info.adapters],
        "grpc_address": _grpc_address(info),
        "kv_note": node.kv_note,
        "why": node.why,
        "plan": node.plan,
    }


def _grpc_address(info: ServerInfo) -> str:
    return f"grpc://{info.addresses[0]}"


def _print_banner(node: Node, source: ModelSource) -> None:
    info, address = node.info, node.join_addresses()[0]
    lines = (
        f"Serving {info.model_name}, blocks {info.span} of {source.num_blocks}: weights {info.weights}, KV policy"
        f" {info.kv_policy}, room for {info.kv_tokens_total:,} tokens, {info.tokens_per_s:.0f} steps/s",
        f"Why these blocks: {node.why}.",
        f"What is where: {node.plan}.",
        *([f"{node.kv_note}."] if node.kv_note else []),
        *([f"Why this precision: {node.weights_reason}."] if node.weights_reason else []),
        "",
        "Another machine joins with",
        f"  swarm serve {info.model_name} --join {address}",
        "and anybody who reaches this one asks with",
        f'  swarm generate {info.model_name} --join {_grpc_address(info)} --prompt "Hello!"',
    )
    console = results_console()
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    say_how_to_stop("lets open sessions finish and leaves")
