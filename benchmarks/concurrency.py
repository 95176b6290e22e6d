"""What a token costs when several clients decode at once; the same as `swarm bench concurrency`.

python benchmarks/concurrency.py [--clients 1,8,16] [--json]
"""

from __future__ import annotations

import sys

from swarm.cli.app import run

if __name__ == "__main__":
    sys.exit(run(["bench", "concurrency", *sys.argv[1:]]))
