"""What distribution costs one stream of tokens; the same as `swarm bench single-stream`.

python benchmarks/single_stream.py [--rounds N] [--json]
"""

from __future__ import annotations

import sys

from swarm.cli.app import run

if __name__ == "__main__":
    sys.exit(run(["bench", "single-stream", *sys.argv[1:]]))
