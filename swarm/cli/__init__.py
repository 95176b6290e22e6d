"""The command `swarm`: the top layer, which alone knows both the client and the server."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the installed command; leaves with its exit code."""
    from swarm.cli.app import run

    sys.exit(run(sys.argv[1:]))
