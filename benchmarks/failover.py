"""How long a session stands still when servers are lost at chosen tokens; the same as `swarm bench failover`.

python benchmarks/failover.py [--cases kill,gap] [--json]
"""

from __future__ import annotations

import sys

from swarm.cli.app import run

if __name__ == "__main__":
    sys.exit(run(["bench", "failover", *sys.argv[1:]]))
