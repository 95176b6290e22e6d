"""What every kind of model (folder, hub, GGUF file, demo) answers once it is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from swarm.datatypes import ModelHash
from swarm.errors import ModelFilesError
from swarm.models.checkpoint import check_complete, read_weight_map
from swarm.models.fingerprint import fingerprint, hash_files
from swarm.models.progress import ProgressReporter

__all__ = ["ModelLocation", "WholeFolder", "read_config_json"]


class ModelLocation(Protocol):
    """A model that was found: its small files are on disk, its weights can be had."""

    @property
    def folder(self) -> Path:
        """Holds config.json and the tokenizer; and, once fetched, safetensors files."""

    def identify(self, report: ProgressReporter) -> ModelHash:
        """The model's identity, equal for equal files wherever they come from."""

    def fetch(self, wanted: Callable[[str], bool], report: ProgressReporter) -> Mapping[str, str]:
        """See that the tensors that `wanted` accepts are on disk; their names and files in `folder`."""


@dataclass(frozen=True)
class WholeFolder:
    """A local folder in Hugging Face format; everything is there already."""

    folder: Path
    cache_dir: Path

    def identify(self, report: ProgressReporter) -> ModelHash:
        file_names = sorted(set(read_weight_map(self.folder).values()))
        for name in file_names:
            check_complete(self.folder / name)
        hashes = hash_files({name: self.folder / name for name in file_names}, self.cache_dir, report=report)
        return fingerprint(read_config_json(self.folder), hashes)

    def fetch(self, wanted: Callable[[str], bool], report: ProgressReporter) -> Mapping[str, str]:
        return {name: file_name for name, file_name in read_weight_map(self.folder).items() if wanted(name)}


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder.

    Raises:
        ModelFilesError: it is missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelFilesError(
            f"{folder} has no config.json, so it is not a model folder in Hugging Face format"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} is damaged ({error}); fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelFilesError(f"{path} is damaged (no JSON object); fetch the model again")
    return config
