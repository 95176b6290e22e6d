"""What each precision of weights costs and saves; the same as `swarm bench weights`.

python benchmarks/weights.py [--model MODEL] [--weights LIST] [--tokens N] [--json]
"""

from __future__ import annotations

import sys

from swarm.cli.app import run

if __name__ == "__main__":
    sys.exit(run(["bench", "weights", *sys.argv[1:]]))
