"""What runs blocks can be imported where the network's libraries are missing."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import importlib, sys

BLOCKED = {"hivemind", "bitsandbytes", "gguf", "cryptography", "base58", "pydantic", "multiaddr"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not here", name=name)

sys.meta_path.insert(0, Blocker())
for name in (
    "swarm.kvcache.page_table", "swarm.models.selftest", "swarm.models.source", "swarm.models.span",
    "swarm.server.engine.choosing", "swarm.server.engine.engine", "swarm.server.engine.ragged",
):
    importlib.import_module(name)
"""


def test_engine_and_models_need_no_network_libraries() -> None:
    """scripts/gpu-check runs on rented machines that have torch and transformers, and nothing of these."""
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True, timeout=100)
