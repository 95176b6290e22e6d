"""What decides about budgets is imported by command lines and admission, and must not bring torch along."""

from __future__ import annotations

import subprocess
import sys


def test_settings_budgets_and_events_need_no_torch() -> None:
    """`swarm serve --help` and the announced capacity read these modules."""
    code = (
        "import sys; import swarm.kvpolicy.settings, swarm.kvpolicy.budget, swarm.kvpolicy.streaming,"
        " swarm.kvpolicy.calibration_file; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
