"""Turns the name of a model into its config, its identity, and access to just the tensors needed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.datatypes import ModelHash
from swarm.errors import DownloadError, ModelFilesError, ModelNotFoundError, UnsupportedModelError
from swarm.models.checkpoint import open_tensors
from swarm.models.location import ModelLocation, WholeFolder, read_config_json
from swarm.models.progress import ProgressReporter, SilentProgress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "DEMO_MODEL",
    "ModelSource",
    "default_cache_dir",
    "load_tokenizer",
    "max_positions_of",
    "read_config",
    "resolve_model",
]

DEMO_MODEL = "smollm2-135m-instruct"
"""The built-in model, which needs neither an account nor a hub."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found, its small files on disk, its weights fetched as they are asked for."""

    name: str
    """As the user gave it."""
    config: PreTrainedConfig
    """Of the whole model. Shared: copy it before changing anything."""
    num_blocks: int
    """Decoder layers of the whole model."""
    max_positions: int | None
    """Context length in tokens; None if the config names no limit."""
    model_hash: ModelHash
    """Identity of config and weights."""
    location: ModelLocation = field(repr=False)
    """Where the files come from."""

    @property
    def folder(self) -> Path:
        """Holds config, tokenizer and generation config, and the safetensors files fetched so far.

        After `ensure_tensors()` it is a complete checkpoint for transformers' `from_pretrained`.
        """
        return self.location.folder

    def ensure_tensors(
        self, wanted: Callable[[str], bool] = lambda name: True, *, report: ProgressReporter | None = None
    ) -> None:
        """See that the tensors whose names `wanted` accepts are on disk.

        Raises:
            DownloadError: they could not be fetched.
            ModelFilesError: they are damaged or missing.
        """
        with _disk_errors(self.name):
            self.location.fetch(wanted, report or SilentProgress())

    @contextmanager
    def open_tensors(
        self, wanted: Callable[[str], bool], *, report: ProgressReporter | None = None
    ) -> Iterator[dict[str, Any]]:
        """The tensors whose names `wanted` accepts, as lazy slices (`slice[:]` reads one).

        Files without any such tensor are neither fetched nor opened.

        Raises: as `ensure_tensors`.
        """
        with _disk_errors(self.name):
            files_by_tensor = self.location.fetch(wanted, report or SilentProgress())
        with open_tensors(self.folder, files_by_tensor) as slices:
            yield slices


def default_cache_dir() -> Path:
    """Where converted models are kept: `$SWARM_CACHE`, or `~/.cache/swarm`."""
    return Path(os.environ.get("SWARM_CACHE") or Path.home() / ".cache" / "swarm").expanduser()


def resolve_model(name: str, *, cache_dir: Path | None = None, report: ProgressReporter | None = None) -> ModelSource:
    """Find a model by name; fetch its config and tokenizer, but no weights (except the demo model's).

    Args:
        name: `smollm2-135m-instruct`, a local folder in Hugging Face format, the path of a GGUF
            file, or a hub id `org/name`.
        cache_dir: for converted models and file hashes; None takes `default_cache_dir()`.
        report: told about downloads, conversions and hashing.

    Raises:
        ModelNotFoundError: there is no such model.
        ModelFilesError: its files are incomplete, damaged or pickled.
        UnsupportedModelError: transformers does not know its architecture.
        DownloadError: files could not be fetched.
    """
    report = report or SilentProgress()
    with _disk_errors(name):
        location = _locate(name, cache_dir or default_cache_dir(), report)
    config = _read_config(name, location.folder)
    text_config: Any = config.get_text_config(decoder=True)
    num_blocks = getattr(text_config, "num_hidden_layers", None)
    if not isinstance(num_blocks, int) or num_blocks < 1:
        raise UnsupportedModelError(f"the config of {name} does not say how many blocks it has (num_hidden_layers)")
    with _disk_errors(name):
        model_hash = location.identify(report)
    return ModelSource(
        name=name,
        config=config,
        num_blocks=num_blocks,
        max_positions=max_positions_of(config),
        model_hash=model_hash,
        location=location,
    )


def read_config(
    name: str, *, cache_dir: Path | None = None, report: ProgressReporter | None = None
) -> PreTrainedConfig:
    """The config of any model that `resolve_model` finds; its weights are neither identified nor looked for.

    Raises: as `resolve_model`.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():  # a folder with a config.json is enough
        return _read_config(name, path.resolve())
    with _disk_errors(name):
        folder = _locate(name, cache_dir or default_cache_dir(), report or SilentProgress()).folder
    return _read_config(name, folder)


def load_tokenizer(
    name: str, *, cache_dir: Path | None = None, report: ProgressReporter | None = None
) -> PreTrainedTokenizerBase:
    """Transformers' tokenizer of any model that `resolve_model` finds, with its chat template.

    Raises: as `resolve_model`; ModelFilesError also when the model comes without a tokenizer.
    """
    from transformers import AutoTokenizer

    with _disk_errors(name):
        folder = _locate(name, cache_dir or default_cache_dir(), report or SilentProgress()).folder
    _read_config(name, folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelFilesError(f"{name} has no usable tokenizer ({reason}); fetch the model again") from error
    return tokenizer


@contextmanager
def _disk_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DownloadError(
            f"the files of {name} can not be kept on this disk: {error.strerror or error}{where}; "
            "free some space, or set SWARM_CACHE to a folder that can be written to"
        ) from error


def _locate(name: str, cache_dir: Path, report: ProgressReporter) -> ModelLocation:
    # Each kind is imported when it is met: a local folder needs neither the hub's library nor gguf's.
    if name == DEMO_MODEL:
        from swarm.models.demo import locate_demo

        return locate_demo(cache_dir, report)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return WholeFolder(path.resolve(), cache_dir)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelFilesError(f"{name} is a file, but not a GGUF file; give a GGUF file or a model folder")
        from swarm.models.gguf_file import locate_gguf

        return locate_gguf(path.resolve(), cache_dir, report)
    if _looks_like_hub_id(name):
        from swarm.models.hub import locate_on_hub

        return locate_on_hub(name, cache_dir, report)
    raise ModelNotFoundError(
        f"there is no model {name!r}: it is neither a folder nor a .gguf file nor a hub id like org/name; "
        f"the built-in model is {DEMO_MODEL}"
    )


def _looks_like_hub_id(name: str) -> bool:
    if name.lower().endswith(".gguf"):
        return False
    return _HUB_ID.fullmatch(name) is not None


def _read_config(name: str, folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig, PreTrainedConfig
    from transformers import __version__ as transformers_version

    model_type = read_config_json(folder).get("model_type")
    try:
        # Never with code from the model's own files.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        from transformers import CONFIG_MAPPING

        if model_type in CONFIG_MAPPING:
            reason = str(error).strip().partition("\n")[0]
            raise ModelFilesError(f"config.json of {name} is damaged: {reason}") from error
        raise UnsupportedModelError(
            f"transformers {transformers_version} does not know the architecture {model_type!r} of {name}; "
            "a newer transformers may, but code that comes with a model is never run"
        ) from error
    assert isinstance(config, PreTrainedConfig)
    return config


def max_positions_of(config: PreTrainedConfig) -> int | None:
    """Context length of a model, None where its config states none."""
    text_config: Any = config.get_text_config(decoder=True)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text_config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
