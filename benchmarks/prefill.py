"""A long prompt beside a session that decodes; the same as `swarm bench prefill`.

python benchmarks/prefill.py [--prompt-tokens N] [--json]
"""

from __future__ import annotations

import sys

from swarm.cli.app import run

if __name__ == "__main__":
    sys.exit(run(["bench", "prefill", *sys.argv[1:]]))
