"""`swarm bootstrap`: a DHT entry point, without any blocks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from swarm.cli.long_running import run_until_told, say_how_to_stop, wait_for_orders
from swarm.cli.open_client import check_join_addresses
from swarm.cli.options import ExitWithParentOption, JsonOption, OptionalJoinOption, VerboseOption
from swarm.cli.parent_watch import ParentWatch
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console

if TYPE_CHECKING:
    from swarm.discovery.registry import Registry
    from swarm.identity import Identity

__all__ = ["bootstrap"]

_JOIN_TIMEOUT_S: Final = 10.0


def bootstrap(
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0 picks a free one.")] = 0,
    identity: Annotated[
        Path | None,
        typer.Option(
            "--identity",
            metavar="FILE",
            help="Key file, made if missing; keeps the address the same over restarts.",
            show_default=False,
        ),
    ] = None,
    join: OptionalJoinOption = None,
    exit_with_parent: ExitWithParentOption = False,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Run an entry point to a swarm: an address at which servers and clients join.

    Optional: every server is an entry point too. With --join it is a second entry point of the same swarm.
    """
    parent = ParentWatch() if exit_with_parent else None
    prepare_process(verbose, swarm_level=logging.WARNING)
    with json_only(json):
        check_join_addresses(join or ())
        run_until_told(lambda: _bootstrap(host, port, identity, join or [], parent=parent, is_json=json))


async def _bootstrap(
    host: str, port: int, identity_path: Path | None, join: list[str], *, parent: ParentWatch | None, is_json: bool
) -> None:
    from swarm.identity import Identity

    orders = wait_for_orders(parent)
    identity = Identity.load_or_create(identity_path) if identity_path is not None else Identity.generate()
    with identity, TerminalProgress() as progress:
        progress.start("Starting the entry point", None, "")
        registry = await orders.unless_given(_start(identity, host, port, join))
        progress.finish()
        try:
            _announce_readiness(registry.join_addresses()[0], identity.peer_id, is_json=is_json)
            await orders.first()
        finally:
            await registry.close()


async def _start(identity: Identity, host: str, port: int, join: list[str]) -> Registry:
    from swarm.discovery.dht import DhtRegistry
    from swarm.discovery.lookup_client import find_dht_addresses

    initial_peers = await find_dht_addresses(join, timeout_s=_JOIN_TIMEOUT_S) if join else []
    return await DhtRegistry.start(identity, host=host, port=port, initial_peers=initial_peers)


def _announce_readiness(address: str, peer_id: str, *, is_json: bool) -> None:
    if is_json:
        print_json({"address": address, "peer_id": peer_id})
        return
    console = results_console()
    console.print("The entry point is ready. Machines join it with", soft_wrap=True)
    console.print(f"  swarm serve smollm2-135m-instruct --join {address}", soft_wrap=True, markup=False)
    say_how_to_stop("leaves")
