"""Right tokens from a swarm whose servers are killed, frozen and cut off; the same as `swarm bench chaos`.

python benchmarks/chaos.py [--minutes 10] [--seed 0] [--json]
"""

from __future__ import annotations

import sys

from swarm.cli.app import run

if __name__ == "__main__":
    sys.exit(run(["bench", "chaos", *sys.argv[1:]]))
