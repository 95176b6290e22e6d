"""Reads single tensors out of a folder of safetensors files, by name."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from swarm.errors import ModelFilesError

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "block_of_tensor",
    "check_complete",
    "explain_missing_weights",
    "is_complete",
    "open_tensors",
    "parse_index",
    "read_weight_map",
    "renumber_tensor",
]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin", "consolidated.00.pth")
_BLOCK_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def block_of_tensor(name: str) -> int | None:
    """Which block a tensor belongs to, by its name in a checkpoint; None for tensors outside the blocks.

    Every checkpoint numbers its blocks in the outermost numbered part of the name:
    `model.layers.7.mlp.experts.3.w1.weight` belongs to block 7.
    """
    match = _BLOCK_NUMBER.search(name)
    return int(match.group(1)) if match else None


def renumber_tensor(name: str, first_block: int) -> str:
    """The name that a block's tensor has in a model that starts with block `first_block`."""
    match = _BLOCK_NUMBER.search(name)
    if match is None:
        return name
    return f"{name[: match.start(1)]}{int(match.group(1)) - first_block}{name[match.end(1) :]}"


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor names and the file (in `folder`) that holds each.

    Raises:
        ModelFilesError: no safetensors there, only pickled weights, or a damaged file or index.
    """
    if (folder / SINGLE_FILE).is_file():
        with _opened(folder / SINGLE_FILE) as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return parse_index((folder / INDEX_FILE).read_bytes(), where=str(folder / INDEX_FILE))
    raise ModelFilesError(explain_missing_weights(str(folder), [path.name for path in folder.iterdir()]))


def explain_missing_weights(where: str, file_names: Collection[str]) -> str:
    """One sentence for a model without safetensors: what it has instead, and what to do."""
    if any(name in _PICKLE_FILES or name.endswith((".bin", ".pt", ".pth")) for name in file_names):
        return (
            f"{where} holds only pickled weights, which can run code when opened; "
            "use a copy in safetensors format (save_pretrained of a current transformers writes one)"
        )
    if any(name.endswith(".gguf") for name in file_names):
        return f"{where} holds GGUF files; give the path of one of them instead of the folder"
    return f"{where} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there"


def parse_index(data: bytes, *, where: str) -> dict[str, str]:
    """The weight map of a `model.safetensors.index.json`.

    Raises:
        ModelFilesError: it is not one, or names files outside its folder.
    """
    try:
        weight_map = json.loads(data)["weight_map"]
        entries = [(str(name), str(file_name)) for name, file_name in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFilesError(f"{where} is damaged or no safetensors index; fetch it again") from error
    for _, file_name in entries:
        # An index is foreign data: it may not send us to other places of the disk.
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise ModelFilesError(f"{where} names the file {file_name!r}, which is not a safetensors file beside it")
    return dict(entries)


@contextlib.contextmanager
def open_tensors(folder: Path, files_by_tensor: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The named tensors as safetensors slices, which are read when they are indexed.

    Only the named files are opened; they are closed on leaving the context.

    Raises:
        ModelFilesError: a file is missing, truncated or damaged, or lacks a tensor.
    """
    names_by_file: dict[str, list[str]] = {}
    for name, file_name in files_by_tensor.items():
        names_by_file.setdefault(file_name, []).append(name)
    with contextlib.ExitStack() as stack:
        slices: dict[str, Any] = {}
        for file_name, names in names_by_file.items():
            file = stack.enter_context(_opened(folder / file_name))
            present = set(file.keys())
            for name in names:
                if name not in present:
                    raise ModelFilesError(
                        f"{folder / file_name} lacks the tensor {name} that the index promises; "
                        "the files are of different versions, fetch them again"
                    )
                slices[name] = file.get_slice(name)
        yield slices


def check_complete(path: Path) -> None:
    """See that this is a safetensors file whose header and length fit together.

    Raises:
        ModelFilesError: it is missing, truncated or no such file.
    """
    with _opened(path):
        pass


def is_complete(path: Path) -> bool:
    """Whether `check_complete` has nothing to say."""
    try:
        check_complete(path)
    except ModelFilesError:
        return False
    return True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ModelFilesError(f"{path} is missing; fetch the model again") from error
    except (SafetensorError, OSError) as error:
        raise ModelFilesError(f"{path} is damaged or incomplete ({error}); fetch it again") from error
    with file:
        yield file
