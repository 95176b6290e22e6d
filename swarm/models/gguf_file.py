"""Serves a GGUF file as a folder in Hugging Face format, unpacking each block when it is first needed.

Config, tokenizer and numbers come from transformers' own GGUF support. The folder lies in the cache
under the file's hash, one safetensors file per block; a file under its final name is complete.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.datatypes import ModelHash
from swarm.errors import DownloadError, ModelFilesError, UnsupportedModelError
from swarm.models.checkpoint import INDEX_FILE, block_of_tensor, is_complete, parse_index
from swarm.models.fingerprint import fingerprint, hash_files
from swarm.models.progress import ProgressReporter

if TYPE_CHECKING:
    import torch

__all__ = ["GgufModel", "locate_gguf", "only_process"]

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Part of the folder's name; raise it when what this module writes there changes."""
_ORIGIN_FILE = "gguf.json"
_OUTSIDE_FILE = "outside.safetensors"
_LOCK_TIMEOUT_S = 1800.0
_SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file and the folder in the cache that stands for it."""

    gguf: Path
    """The GGUF file; needed only for blocks that are not unpacked yet."""
    gguf_sha256: str
    cache_dir: Path

    @property
    def folder(self) -> Path:
        return self.cache_dir / "gguf" / f"{self.gguf_sha256[:32]}-{_FORMAT}"

    def is_unpacked(self) -> bool:
        """Whether every block is, so that the GGUF file itself is needed no more."""
        return self.folder.is_dir() and not self._missing(sorted(set(self._weight_map.values())))

    def identify(self, report: ProgressReporter) -> ModelHash:
        # The file holds its own config; what transformers makes of it may differ by version.
        return fingerprint({}, {"gguf": self.gguf_sha256})

    @cached_property
    def _weight_map(self) -> Mapping[str, str]:
        return parse_index((self.folder / INDEX_FILE).read_bytes(), where=str(self.folder / INDEX_FILE))

    def fetch(self, wanted: Callable[[str], bool], report: ProgressReporter) -> Mapping[str, str]:
        files_by_tensor = {name: file_name for name, file_name in self._weight_map.items() if wanted(name)}
        files = sorted(set(files_by_tensor.values()))
        if self._missing(files):
            with only_process(self.folder, report, "another process that unpacks this model"):
                missing = self._missing(files)
                if missing:
                    self._unpack(missing, report)
        return files_by_tensor

    def _missing(self, file_names: list[str]) -> list[str]:
        return [name for name in file_names if not is_complete(self.folder / name)]

    def _unpack(self, file_names: list[str], report: ProgressReporter) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        report.start(f"unpacking {self.gguf.name}", len(file_names), "blocks")
        origin = json.loads((self.folder / _ORIGIN_FILE).read_bytes())
        reader = _open_reader(self.gguf)
        for file_name in file_names:
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{file_name}.")
            os.close(handle)
            try:
                with _gguf_errors(self.gguf):
                    tensors = _unpack_tensors(reader, origin, file_name)
                try:
                    save_file(tensors, temporary, metadata={"format": "pt"})
                except SafetensorError as error:
                    raise OSError(f"{error} while writing {temporary}") from error
                _flush_to_disk(Path(temporary))
                os.replace(temporary, self.folder / file_name)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            report.advance(1)
        report.finish()
        _open_reader.cache_clear()


def locate_gguf(gguf: Path, cache_dir: Path, report: ProgressReporter, *, sha256: str | None = None) -> GgufModel:
    """The folder for a GGUF file, with its config, tokenizer and index made if they are not there yet.

    Args:
        sha256: of the file, if it is known already.

    Raises:
        ModelFilesError: the file is damaged, one part of several, or no GGUF file.
        UnsupportedModelError: transformers can not read GGUF files of this architecture.
    """
    if _SPLIT_NAME.search(gguf.name):
        raise ModelFilesError(
            f"{gguf.name} is one part of a split GGUF file; join the parts first (llama-gguf-split --merge)"
        )
    if sha256 is None:
        sha256 = hash_files({"gguf": gguf}, cache_dir, report=report)["gguf"]
    model = GgufModel(gguf, sha256, cache_dir)
    if not model.folder.is_dir():
        with only_process(model.folder, report, "another process that prepares this model"):
            if not model.folder.is_dir():
                _prepare_folder(model, report)
    return model


def _prepare_folder(model: GgufModel, report: ProgressReporter) -> None:
    """Make the folder without weights, under its final name only once it is complete."""
    report.start(f"reading {model.gguf.name}", None, "steps")
    partial = Path(tempfile.mkdtemp(dir=model.folder.parent, prefix=f".{model.folder.name}."))
    try:
        _write_small_files(model.gguf, partial)
        for path in partial.iterdir():
            _flush_to_disk(path)
        os.replace(partial, model.folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    report.finish()


def _write_small_files(gguf: Path, folder: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from swarm.models.support import unsupported_reason

    reader = _open_reader(gguf)
    with _gguf_errors(gguf), _parsed_once(gguf, reader):
        settings = load_gguf_checkpoint(str(gguf))["config"]
    model_type = settings.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise _unknown_architecture(gguf, model_type)
    config: Any = CONFIG_MAPPING[model_type].from_dict(settings)
    reason = unsupported_reason(config)
    if reason is not None:
        raise UnsupportedModelError(reason)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    with _gguf_errors(gguf), _parsed_once(gguf, reader):
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True).save_pretrained(folder)
    with _gguf_errors(gguf):
        tensor_names = _transformers_names(reader, config, settings)
    origin = {"settings": settings, "tensor_names": tensor_names}
    (folder / _ORIGIN_FILE).write_text(json.dumps(origin))
    weight_map = {name: _file_of_block(block_of_tensor(name)) for name in tensor_names.values()}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _transformers_names(reader: Any, config: Any, settings: dict[str, Any]) -> dict[str, str]:
    """Names of the file's tensors, and the name that transformers' model has for each."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = get_gguf_hf_weights_map(model, _tensor_processor(reader, settings))
    in_file = {tensor.name for tensor in reader.tensors}
    # Stacked experts are known by their names without `.weight`.
    return {name: hf_name for name, hf_name in names.items() if name in in_file or f"{name}.weight" in in_file}


def _tensor_processor(reader: Any, settings: dict[str, Any]) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    make: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    return make(config=settings)


def _unpack_tensors(reader: Any, origin: dict[str, Any], file_name: str) -> dict[str, torch.Tensor]:
    """All tensors that belong into one safetensors file, as transformers would hold them in fp32."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, dequantize

    names: dict[str, str] = origin["tensor_names"]
    processor = _tensor_processor(reader, origin["settings"])
    unpacked: dict[str, torch.Tensor] = {}
    # Some processors put what they make of several tensors here by themselves.
    parsed: dict[str, Any] = {"tensors": unpacked}
    for tensor in reader.tensors:
        if _file_of_block(block_of_tensor(tensor.name)) != file_name:
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        result = processor.process(weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed)
        if result.name not in names:
            continue
        weights = torch.from_numpy(np.copy(result.weights))
        if tensor.tensor_type == GGMLQuantizationType.F16 and result.weights is values:
            weights = weights.half()  # what it was; half the disk, not a bit lost
        unpacked[names[result.name]] = weights
    return {name: tensor.contiguous() for name, tensor in unpacked.items()}


def _file_of_block(block: int | None) -> str:
    return _OUTSIDE_FILE if block is None else f"block-{block:05d}.safetensors"


@lru_cache(maxsize=1)  # opening a file means parsing its vocabulary, which takes seconds
def _open_reader(gguf: Path) -> Any:
    from gguf import GGUFReader

    with _gguf_errors(gguf):
        return GGUFReader(gguf)


@contextlib.contextmanager
def _parsed_once(gguf: Path, reader: Any) -> Iterator[None]:
    """Let transformers use `reader` where it would parse the same file again, for seconds each time.

    Should a version of it not look the class up when it is called, all this does is nothing.
    """
    library: Any = importlib.import_module("gguf")
    original = library.GGUFReader

    def open_or_reuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        return reader if Path(path) == gguf else original(path, *args, **kwargs)

    library.GGUFReader = open_or_reuse
    try:
        yield
    finally:
        library.GGUFReader = original


@contextlib.contextmanager
def _gguf_errors(gguf: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ModelFilesError(f"{gguf} is gone, but not all of its blocks are unpacked yet; bring it back") from error
    except Exception as error:
        if "not supported" in str(error) or isinstance(error, NotImplementedError):
            raise UnsupportedModelError(f"transformers can not read {gguf.name}: {error}") from error
        raise ModelFilesError(f"{gguf} is damaged or no GGUF file ({error}); fetch it again") from error


def _unknown_architecture(gguf: Path, model_type: object) -> UnsupportedModelError:
    return UnsupportedModelError(f"{gguf.name} is of the architecture {model_type!r}, which transformers does not know")


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def only_process(folder: Path, report: ProgressReporter, other: str) -> Iterator[None]:
    """Hold the lock beside `folder`; processes that come second wait here for the first.

    The lock ends with its process, so nobody waits for a dead one.

    Raises:
        DownloadError: the other process is still at it after half an hour.
    """
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report.start(f"waiting for {other}", None, "steps")
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S)
        except Timeout as error:
            raise DownloadError(
                f"waited {_LOCK_TIMEOUT_S / 60:.0f} minutes for {other}; end it, "
                f"or delete {lock.lock_file} if there is none"
            ) from error
        report.finish()
    try:
        yield
    finally:
        lock.release()
