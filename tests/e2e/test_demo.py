"""The main job, as a newcomer meets it: one command, a real model, a real swarm, the right tokens."""

from __future__ import annotations

import subprocess
import time

import psutil
import pytest

from tests.cli_processes import SWARM, run_swarm


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first run on a machine fetches and converts the model
def test_demo_gives_the_local_models_tokens() -> None:
    """Three server processes, the built-in model, and exactly the tokens that transformers alone gives."""
    done = run_swarm("demo", "--check", "--json", "--max-new-tokens", "12", timeout_s=580)
    assert done.exit_code == 0, done.err
    result = done.json
    assert result["matches_local"] is True
    assert result["model"] == "smollm2-135m-instruct"
    assert result["num_new_tokens"] == len(result["token_ids"]) == 12
    assert [(hop["start"], hop["end"]) for hop in result["route"]] == [(0, 10), (10, 20), (20, 30)]
    assert len({hop["peer_id"] for hop in result["route"]}) == 3
    assert "bees" in result["text"].lower()
    assert result["failovers"] == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_demo_that_is_killed_leaves_no_process_behind() -> None:
    """Nobody knows what to look for in the process list afterwards."""
    demo = subprocess.Popen([*SWARM, "demo", "--servers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    try:
        deadline_s = time.monotonic() + 90
        while sum("serve" in " ".join(process.cmdline()) for process in family) < 2:
            assert time.monotonic() < deadline_s, "the demo started no servers"
            time.sleep(0.5)
            family = psutil.Process(demo.pid).children(recursive=True)
    finally:
        demo.kill()
        demo.wait()
    assert psutil.wait_procs(family, timeout=30)[1] == []
