"""What KV policies save and what they cost in quality; the same as `swarm bench kv`.

python benchmarks/kv.py [--policies A,B] [--context N] [--json]
"""

from __future__ import annotations

import sys

from swarm.cli.app import run

if __name__ == "__main__":
    sys.exit(run(["bench", "kv", *sys.argv[1:]]))
