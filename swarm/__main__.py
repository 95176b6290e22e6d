"""Makes `python -m swarm` the command `swarm`."""

from __future__ import annotations

from swarm.cli import main

if __name__ == "__main__":
    main()
