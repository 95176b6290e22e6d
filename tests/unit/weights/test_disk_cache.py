"""Stored blocks come back whole or not at all, and never stand in the way."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from swarm.datatypes import ModelHash
from swarm.weights import disk_cache
from swarm.weights.disk_cache import BlockKey, WeightCache


def key_of(block: int, *, model: str = "ab" * 32, format_name: str = "int4") -> BlockKey:
    return BlockKey(model_hash=ModelHash(model), block=block, format_name=format_name, rest="float32")


def tensors_of(seed: int, size: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.codes": torch.randint(0, 255, (size,), dtype=torch.uint8, generator=generator),
        "a.scales": torch.rand(size, generator=generator).to(torch.bfloat16),
        "norm": torch.rand(3, generator=generator),
        "scalar": torch.tensor(2.5),
    }


def stored_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    """Bit by bit: the second start must serve what the first did."""
    assert WeightCache(tmp_path).write(key_of(3), tensors_of(1))
    found = WeightCache(tmp_path).read(key_of(3))
    assert found is not None
    assert found.keys() == tensors_of(1).keys()
    for name, tensor in tensors_of(1).items():
        assert torch.equal(found[name], tensor) and found[name].dtype is tensor.dtype


@pytest.mark.parametrize(
    "other", [key_of(4), key_of(3, model="cd" * 32), key_of(3, format_name="int8")], ids=["block", "model", "format"]
)
def test_other_blocks_models_and_formats_are_other_entries(other: BlockKey, tmp_path: Path) -> None:
    """Another model's weights under this one's name would be served as if they were right."""
    cache = WeightCache(tmp_path)
    cache.write(key_of(3), tensors_of(1))
    assert cache.read(other) is None
    (stored,) = stored_files(tmp_path)
    target = tmp_path / other.relative_path
    target.parent.mkdir(parents=True, exist_ok=True)
    stored.rename(target)  # even under its name
    assert cache.read(other) is None


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "header", "other file"])
def test_damaged_entries_are_dropped_and_made_anew(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A crash or a bad disk costs time, never answers."""
    WeightCache(tmp_path).write(key_of(3), tensors_of(1))
    (path,) = stored_files(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:-100]
    elif damage == "altered":
        data[-1500] ^= 1
    elif damage == "empty":
        data = bytearray()
    elif damage == "header":
        data[20] ^= 0xFF
    else:
        data = bytearray(b"not a tensor in sight")
    path.write_bytes(data)
    cache = WeightCache(tmp_path)
    with caplog.at_level("WARNING"):
        assert cache.read(key_of(3)) is None
    assert "made anew" in caplog.text
    assert stored_files(tmp_path) == []
    assert cache.write(key_of(3), tensors_of(1))
    assert cache.read(key_of(3)) is not None


def test_what_is_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    """Another server may remove or replace the file while this one serves."""
    cache = WeightCache(tmp_path)
    cache.write(key_of(3), tensors_of(1))
    found = cache.read(key_of(3))
    (path,) = stored_files(tmp_path)
    with path.open("r+b") as file:
        file.truncate(0)
    assert found is not None
    assert torch.equal(found["a.codes"], tensors_of(1)["a.codes"])


def test_the_least_recently_used_blocks_give_way(tmp_path: Path) -> None:
    """The folder never outgrows its limit, and what people serve now is what stays."""
    size_bytes = 1000 + 2000 + 12 + 4
    old = WeightCache(tmp_path, max_bytes=10 * size_bytes)
    for block in range(3):
        old.write(key_of(block, model="0" * 64), tensors_of(block))
    now_s = time.time()
    for age, path in enumerate(reversed(stored_files(tmp_path))):
        os.utime(path, (now_s - 100 - age, now_s - 100 - age))
    assert WeightCache(tmp_path).read(key_of(0, model="0" * 64)) is not None  # used just now
    room_for_three = sum(path.stat().st_size for path in stored_files(tmp_path)) + 100
    assert WeightCache(tmp_path, max_bytes=room_for_three).write(key_of(7), tensors_of(7))
    names = {path.name for path in stored_files(tmp_path)}
    assert names == {"block-00000.safetensors", "block-00002.safetensors", "block-00007.safetensors"}


def test_a_span_larger_than_the_limit_keeps_what_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its own first blocks must not make room for its last, or every start would find the wrong half."""
    cache = WeightCache(tmp_path, max_bytes=8000)
    with caplog.at_level("WARNING"):
        done = [cache.write(key_of(block), tensors_of(block)) for block in range(5)]
    assert done == [True, True, False, False, False]
    assert len(caplog.records) == 1
    assert WeightCache(tmp_path).read(key_of(0)) is not None


def test_a_full_disk_is_one_warning_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Serving goes on: a cache is a convenience."""

    def fail(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    cache = WeightCache(tmp_path)
    with caplog.at_level("WARNING"):
        assert not cache.write(key_of(0), tensors_of(0))
        assert not cache.write(key_of(1), tensors_of(1))
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text and "next start" in caplog.text
    assert stored_files(tmp_path) == []


def test_the_last_of_the_disk_is_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that fills the disk takes everything on the machine down with it."""
    monkeypatch.setattr(disk_cache, "_RESERVED_BYTES", 1 << 62)
    with caplog.at_level("WARNING"):
        assert not WeightCache(tmp_path, max_bytes=1 << 40).write(key_of(0), tensors_of(0))
    assert "the disk has" in caplog.text


def test_remnants_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """Killed servers leave partial files; nobody else would ever remove them."""
    cache = WeightCache(tmp_path)
    cache.write(key_of(0), tensors_of(0))
    folder = stored_files(tmp_path)[0].parent
    dead, alive = folder / ".block-00001.x.partial", folder / ".block-00002.y.partial"
    dead.write_bytes(b"x")
    alive.write_bytes(b"y")
    os.utime(dead, (1.0, 1.0))
    cache.write(key_of(3), tensors_of(3))
    assert not dead.exists() and alive.exists()


def test_nothing_is_kept_when_nothing_may_be(tmp_path: Path) -> None:
    """The operator's way to do without."""
    assert not WeightCache(tmp_path, max_bytes=0).write(key_of(0), tensors_of(0))
    assert stored_files(tmp_path) == []
