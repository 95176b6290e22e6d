"""A LoRA adapter from the command line: offered, seen, chosen, refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli_processes import Node, run_swarm, running
from tests.tiny_adapters import LINEARS, save_tiny_adapter

PROMPT = "What is a swarm?"


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter") / "poet"


@pytest.fixture(scope="module")
def poet(base: Any, folder: Path) -> Any:
    """PEFT's own model of the adapter in `folder`."""
    return save_tiny_adapter(base, folder, seed=1, target_modules=list(LINEARS["llama"]))


@pytest.fixture(scope="module")
def server(tiny_model: Path, folder: Path, poet: Any) -> Iterator[Node]:
    with running("serve", tiny_model, "--new-swarm", "--host", "127.0.0.1", "--adapter", f"poet={folder}") as node:
        yield node


def test_status_shows_adapters(tiny_model: Path, server: Node) -> None:
    """Who wants to choose must see what there is."""
    (offered,) = server.ready["adapters"]
    assert offered["name"] == "poet"
    status = run_swarm("status", tiny_model, "--join", server.grpc_address, "--json").json
    assert status["servers"][0]["adapters"] == [offered]
    assert "poet" in run_swarm("status", tiny_model, "--join", server.grpc_address).out


def test_generate_with_and_without(tiny_model: Path, server: Node, base: Any, poet: Any) -> None:
    """One server, two models, and each answers as PEFT says."""
    for name, model in (("poet", poet), (None, base)):
        chosen = () if name is None else ("--adapter", name)
        options = ("--prompt", PROMPT, "--max-new-tokens", "16", "--json", *chosen)
        result = run_swarm("generate", tiny_model, "--join", server.grpc_address, *options).json
        prompt_ids = torch.tensor([result["prompt_token_ids"]])
        expected = model.generate(
            input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=16, do_sample=False
        )
        assert result["token_ids"] == expected[0, prompt_ids.shape[1] :].tolist(), name


def test_an_unknown_name(tiny_model: Path, server: Node) -> None:
    """The sentence names what is offered."""
    refused = run_swarm("generate", tiny_model, "--join", server.grpc_address, "--prompt", PROMPT, "--adapter", "pote")
    assert refused.exit_code in (1, 2)
    assert "'pote'" in refused.sentence
    assert "offered are poet" in refused.sentence


def test_pickled_adapter(tiny_model: Path, folder: Path, poet: Any, tmp_path: Path) -> None:
    """A server does not even start with one, and runs nothing of it."""
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refused = run_swarm(
        "serve", tiny_model, "--new-swarm", "--host", "127.0.0.1", "--adapter", f"bad={tmp_path}", timeout_s=90
    )
    assert refused.exit_code in (1, 2)
    assert "pickled" in refused.sentence
