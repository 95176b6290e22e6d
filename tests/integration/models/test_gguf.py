"""A GGUF file behaves as a model folder, unpacked block by block, exactly as transformers would."""

from __future__ import annotations

import errno
import multiprocessing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.datatypes import Span
from swarm.errors import DownloadError, ModelFilesError, UnsupportedModelError
from swarm.models import gguf_file as module
from swarm.models import load_client_parts, load_span, load_tokenizer, resolve_model

NUM_BLOCKS = 3
HIDDEN = 64
TOKENS = ["<unk>", "<s>", "</s>", *(chr(ord("a") + index) for index in range(26)), "ab", "Ġ"]


def write_gguf(path: Path, *, architecture: str = "llama") -> None:
    """A tiny chat model with Q8_0, F16 and F32 tensors, and query heads that GGUF permutes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(NUM_BLOCKS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
    random = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: Any = None) -> None:
        values = (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    q8, f16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16
    add("token_embd.weight", len(TOKENS), HIDDEN, kind=q8)
    add("output_norm.weight", HIDDEN)
    add("output.weight", len(TOKENS), HIDDEN, kind=f16)
    for block in range(NUM_BLOCKS):
        add(f"blk.{block}.attn_norm.weight", HIDDEN)
        add(f"blk.{block}.ffn_norm.weight", HIDDEN)
        add(f"blk.{block}.attn_q.weight", HIDDEN, HIDDEN, kind=q8)
        add(f"blk.{block}.attn_k.weight", HIDDEN // 2, HIDDEN, kind=q8)
        add(f"blk.{block}.attn_v.weight", HIDDEN // 2, HIDDEN, kind=f16)
        add(f"blk.{block}.attn_output.weight", HIDDEN, HIDDEN, kind=q8)
        add(f"blk.{block}.ffn_gate.weight", 96, HIDDEN, kind=q8)
        add(f"blk.{block}.ffn_up.weight", 96, HIDDEN, kind=q8)
        add(f"blk.{block}.ffn_down.weight", HIDDEN, 96, kind=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


def blocks_on_disk(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def test_only_the_blocks_asked_for_are_unpacked(model_path: Path, tmp_path: Path) -> None:
    """A 40 GB file must not become 160 GB on the disk of someone who serves four blocks."""
    source = resolve_model(str(model_path), cache_dir=tmp_path / "cache")
    assert (source.num_blocks, source.max_positions) == (NUM_BLOCKS, 256)
    assert blocks_on_disk(source.folder) == set()
    load_span(source, Span(start=1, end=2))
    assert blocks_on_disk(source.folder) == {"block-00001.safetensors"}
    load_client_parts(source, make_layer=lambda original, returns_tuple: torch.nn.Identity())
    assert blocks_on_disk(source.folder) == {"block-00001.safetensors", "outside.safetensors"}


def test_every_weight_equals_transformers_own(model_path: Path, tmp_path: Path) -> None:
    """Same file, same numbers, to the last bit: otherwise tokens would differ from a local run."""
    source = resolve_model(str(model_path), cache_dir=tmp_path / "cache")
    source.ensure_tensors()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=model_path.name, dtype=torch.float32)
    result = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    weights = result.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weights[name], weight), name
    ignored = {"_name_or_path", "quantization_config"}
    left, right = result.config.to_dict(), expected.config.to_dict()
    assert {key: left[key] for key in left.keys() - ignored} == {key: right[key] for key in right.keys() - ignored}
    assert result.generation_config.to_dict() == expected.generation_config.to_dict()


def test_the_tokenizer_equals_transformers_own(model_path: Path, tmp_path: Path) -> None:
    """Special tokens and the chat template must survive the way through the cache."""
    tokenizer = load_tokenizer(str(model_path), cache_dir=tmp_path / "cache")
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=model_path.name)
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer("abcab").input_ids == expected("abcab").input_ids
    assert (tokenizer.eos_token, tokenizer.bos_token) == (expected.eos_token, expected.bos_token) == ("</s>", "<s>")
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>ab</s>"


def test_chained_spans_equal_the_whole_model(model_path: Path, tmp_path: Path) -> None:
    """The permuted attention heads of GGUF are where a home-made reader goes wrong."""
    source = resolve_model(str(model_path), cache_dir=tmp_path / "cache")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=model_path.name, dtype=torch.float32)
    spans = [load_span(source, Span(start=0, end=1)), load_span(source, Span(start=1, end=3))]

    class Chain(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            for span in spans:
                hidden_states = span(hidden_states, kwargs["position_ids"])
            return hidden_states

    client: Any = load_client_parts(source, make_layer=lambda original, returns_tuple: Chain())
    ids = torch.tensor([[3, 4, 5, 6, 7, 29]])
    with torch.inference_mode():
        torch.testing.assert_close(client(ids, use_cache=False).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_identity_is_that_of_the_file(model_path: Path, tmp_path: Path) -> None:
    """Copies under other names serve one model; a file with one other byte does not."""
    copy = tmp_path / "elsewhere.gguf"
    copy.write_bytes(model_path.read_bytes())
    other = tmp_path / "other.gguf"
    other.write_bytes(model_path.read_bytes()[:-1] + b"\x01")
    hashes = [resolve_model(str(path), cache_dir=tmp_path / "cache").model_hash for path in (model_path, copy, other)]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_unpacking_that_breaks_off_is_done_again(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is on disk under its final name is whole; what is not, is made again."""
    source = resolve_model(str(model_path), cache_dir=tmp_path / "cache")

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(KeyboardInterrupt):
            load_span(source, Span(start=0, end=1))
    assert blocks_on_disk(source.folder) == set()
    assert not [path for path in source.folder.iterdir() if path.name.startswith(".")]
    load_span(source, Span(start=0, end=1))
    block = source.folder / "block-00000.safetensors"
    whole = block.read_bytes()
    block.write_bytes(whole[:-50])
    load_span(source, Span(start=0, end=1))
    assert block.read_bytes() == whole


def test_a_full_disk_is_one_sentence(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking takes several times the file's size, so disks do fill up here."""
    source = resolve_model(str(model_path), cache_dir=tmp_path / "cache")

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(DownloadError, match=r"No space left on device.*SWARM_CACHE"):
        load_span(source, Span(start=0, end=1))
    assert blocks_on_disk(source.folder) == set()


def test_preparing_that_breaks_off_is_done_again(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without its index or tokenizer must not be taken for a prepared one."""

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_transformers_names", fail)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(str(model_path), cache_dir=tmp_path / "cache")
    assert resolve_model(str(model_path), cache_dir=tmp_path / "cache").num_blocks == NUM_BLOCKS


def test_unpacked_blocks_outlive_the_file(model_path: Path, tmp_path: Path) -> None:
    """Who deletes the download keeps what was unpacked, and is told when something else is needed."""
    source = resolve_model(str(model_path), cache_dir=tmp_path / "cache")
    load_span(source, Span(start=0, end=1))
    model_path.unlink()
    load_span(source, Span(start=0, end=1))
    with pytest.raises(ModelFilesError, match="is gone"):
        load_span(source, Span(start=1, end=2))


def test_an_architecture_that_spans_can_not_carry_is_refused(tmp_path: Path) -> None:
    """Before anything is unpacked."""
    path = tmp_path / "state.gguf"
    write_gguf(path, architecture="mamba")
    with pytest.raises(UnsupportedModelError, match="mamba"):
        resolve_model(str(path), cache_dir=tmp_path / "cache")


def test_an_architecture_that_transformers_can_not_read_is_refused(tmp_path: Path) -> None:
    """llama.cpp knows architectures that transformers' reader does not."""
    path = tmp_path / "odd.gguf"
    write_gguf(path, architecture="plamo")
    with pytest.raises(UnsupportedModelError, match="plamo"):
        resolve_model(str(path), cache_dir=tmp_path / "cache")


def _load_all_blocks(path: str, cache_dir: str, results: Any) -> None:
    torch.set_num_threads(1)
    source = resolve_model(path, cache_dir=Path(cache_dir))
    span = load_span(source, Span(start=0, end=NUM_BLOCKS))
    results.put(float(sum(parameter.double().sum() for parameter in span.parameters())))


@pytest.mark.timeout(180)
def test_two_processes_at_once_agree(model_path: Path, tmp_path: Path) -> None:
    """Several servers start together on one machine, and share the cache."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(model_path), str(tmp_path / "cache"), results)
    processes = [context.Process(target=_load_all_blocks, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    sums = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sums[0] == sums[1]
    (folder,) = [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
