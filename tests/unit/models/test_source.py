"""Model names: what they may be, what is read for them, and the sentence for each that does not work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.errors import DownloadError, ModelFilesError, ModelNotFoundError, SwarmError, UnsupportedModelError
from swarm.models.source import load_tokenizer, resolve_model
from tests.tiny_models import NUM_BLOCKS, save_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_tiny_model("llama", path)
    return path


def test_a_folder_resolves_to_its_config_and_identity(folder: Path, tmp_path: Path) -> None:
    """Everything else in the project starts from these facts about a model."""
    source = resolve_model(str(folder), cache_dir=tmp_path / "cache")
    assert source.name == str(folder)
    assert source.folder == folder
    assert source.num_blocks == NUM_BLOCKS
    assert source.max_positions == 512
    assert source.config.model_type == "llama"
    assert len(source.model_hash) == 64


def test_a_copy_elsewhere_has_the_same_identity_and_other_weights_another(folder: Path, tmp_path: Path) -> None:
    """Servers with the same files must form one swarm, whatever they call the model."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    other = tmp_path / "other"
    save_tiny_model("llama", other, seed=1)
    hashes = [resolve_model(str(path), cache_dir=tmp_path / "cache").model_hash for path in (folder, copy, other)]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    """Pointing at the wrong folder is the commonest mistake."""
    (tmp_path / "x").mkdir()
    with pytest.raises(ModelFilesError, match=r"no config\.json"):
        resolve_model(str(tmp_path / "x"), cache_dir=tmp_path)


def test_a_damaged_config_is_refused(folder: Path, tmp_path: Path) -> None:
    """A config that is cut off must be called damaged."""
    config = folder / "config.json"
    config.write_bytes(config.read_bytes()[:50])
    with pytest.raises(ModelFilesError, match="damaged"):
        resolve_model(str(folder), cache_dir=tmp_path)


def test_a_config_with_impossible_values_is_refused(folder: Path, tmp_path: Path) -> None:
    """Values of the wrong type must not surface as an error of a foreign library."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(ModelFilesError, match=r"config\.json of .* is damaged"):
        resolve_model(str(folder), cache_dir=tmp_path)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """A model that can only be unpickled is refused before anything is opened."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelFilesError, match="pickled weights"):
        resolve_model(str(folder), cache_dir=tmp_path)


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    """An incomplete copy must say which file is missing."""
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelFilesError, match=shard.name):
        resolve_model(str(folder), cache_dir=tmp_path)


def test_a_truncated_shard_is_named(folder: Path, tmp_path: Path) -> None:
    """An interrupted copy must be noticed before a server announces it."""
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelFilesError, match=f"{shard.name} is damaged or incomplete"):
        resolve_model(str(folder), cache_dir=tmp_path)


def test_code_from_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    """A config may name Python files beside it; they come from strangers."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "evil.HomemadeConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UnsupportedModelError, match=r"'homemade'.*never run"):
        resolve_model(str(folder), cache_dir=tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["", "gpt", "./nowhere", "/no/where", "a/b/c", "org/..", "x.gguf", "org/x.gguf"])
def test_an_unknown_name_is_answered_with_what_there_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt name must end in one sentence, without asking the hub for nonsense."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="smollm2-135m-instruct"):
        resolve_model(name, cache_dir=tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    """Neither a text file nor a file that only claims to be GGUF may get far."""
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(ModelFilesError, match="not a GGUF file"):
        resolve_model(str(text), cache_dir=tmp_path)
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelFilesError, match="damaged or no GGUF file"):
        resolve_model(str(fake), cache_dir=tmp_path)
    assert not [path for path in (tmp_path / "gguf").iterdir() if path.is_dir()]


def test_one_part_of_a_split_gguf_is_refused(tmp_path: Path) -> None:
    """A part looks like a model but lacks most tensors."""
    part = tmp_path / "m-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(ModelFilesError, match="join the parts"):
        resolve_model(str(part), cache_dir=tmp_path)


def test_a_model_without_tokenizer_says_so(folder: Path, tmp_path: Path) -> None:
    """The tiny models have none: the error must be ours, and one sentence."""
    with pytest.raises(SwarmError, match="no usable tokenizer"):
        load_tokenizer(str(folder), cache_dir=tmp_path)


def test_a_cache_that_can_not_be_written_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    """A full or read-only disk is the user's to mend, so the sentence says where and how."""
    (tmp_path / "occupied").write_text("a file where a folder should be")
    with pytest.raises(DownloadError, match=r"can not be kept on this disk.*SWARM_CACHE"):
        resolve_model(str(folder), cache_dir=tmp_path / "occupied")


def test_importing_the_package_loads_no_heavy_library() -> None:
    """`swarm --help` imports this package, and must answer at once."""
    code = "import sys, swarm.models; print([m for m in ('torch', 'transformers', 'gguf') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
