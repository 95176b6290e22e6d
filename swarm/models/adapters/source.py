"""Finds a LoRA adapter's files and checks them, without reading its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from swarm.datatypes import AdapterHash, AdapterInfo
from swarm.errors import ModelFilesError, ModelNotFoundError, UnsupportedModelError
from swarm.models.adapters.settings import MAX_RANK, LoraSettings, read_settings
from swarm.models.fingerprint import fingerprint, hash_files
from swarm.models.progress import ProgressReporter

__all__ = ["AdaptedModule", "AdapterSource", "open_adapter"]

CONFIG_FILE: Final = "adapter_config.json"
TENSORS_FILE: Final = "adapter_model.safetensors"
_MAX_FILE_BYTES: Final = 8 * 2**30
_MAX_TENSORS: Final = 2**17
_MAX_NAME_CHARS: Final = 512
_DTYPES: Final = ("F32", "F16", "BF16")
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<factor>[AB])\.weight", re.ASCII)
_MODULE_NAME = re.compile(r"(?P<stack>[A-Za-z_][A-Za-z_.\w]*?)\.(?P<block>\d{1,6})\.(?P<path>[\w.]+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class AdaptedModule:
    """One linear layer that an adapter changes."""

    name: str
    """In the whole model: `model.layers.7.self_attn.q_proj`."""
    stack: str
    """Name of the list of blocks: `model.layers`."""
    block: int
    path: str
    """Within the block: `self_attn.q_proj`."""
    rank: int
    in_features: int
    out_features: int
    scale: float
    """Factor of the product of its two matrices."""


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """An adapter whose files are there and make sense; tensors are read when they are asked for."""

    info: AdapterInfo
    """Its name, and the hash over its settings and tensors."""
    folder: Path
    settings: LoraSettings
    modules: Mapping[str, AdaptedModule] = field(repr=False)
    """By name, in all blocks."""

    @contextmanager
    def open_factors(self) -> Iterator[FactorReader]:
        """Read single tensors; the file is open until the context is left.

        Raises:
            ModelFilesError: the file is gone or damaged.
        """
        with _opened(self.folder / TENSORS_FILE) as file:
            yield FactorReader(file, self.folder / TENSORS_FILE)


class FactorReader:
    """Reads an adapter's matrices one by one."""

    def __init__(self, file: Any, path: Path) -> None:
        """Not for callers; use `AdapterSource.open_factors`."""
        self._file = file
        self._path = path

    def read(self, module: AdaptedModule, factor: str) -> Any:
        """The tensor A [rank, in_features] or B [out_features, rank] of a module, on the host, as stored.

        Raises:
            ModelFilesError: it can not be read, or holds values that are no numbers.
        """
        from safetensors import SafetensorError

        name = f"base_model.model.{module.name}.lora_{factor}.weight"
        try:
            tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelFilesError(f"the tensor {name} of {self._path} can not be read ({error}); fetch it again") from (
                error
            )
        if not tensor.isfinite().all():
            raise ModelFilesError(
                f"the tensor {name} of {self._path} holds values that are infinite or no numbers; train it again"
            )
        return tensor


def open_adapter(
    name: str, folder: Path | str, *, cache_dir: Path | None = None, report: ProgressReporter | None = None
) -> AdapterSource:
    """Find a LoRA adapter in PEFT's format: adapter_config.json and adapter_model.safetensors.

    Args:
        name: by which sessions will choose it.
        folder: where `PeftModel.save_pretrained` wrote it.
        cache_dir: for file hashes; None takes `default_cache_dir()`.
        report: told about hashing.

    Raises:
        BadInputError: the name is none.
        ModelNotFoundError: there is no such folder, or no adapter in it.
        ModelFilesError: its files are damaged, pickled, too large or of impossible shapes.
        UnsupportedModelError: it uses something that would be served wrongly.
    """
    from swarm.models.source import default_cache_dir

    AdapterInfo(name=name, adapter_hash=AdapterHash("0" * 32))  # the name is judged before anything is read
    folder = Path(folder).expanduser()
    settings = read_settings(_read_config(folder), where=str(folder / CONFIG_FILE))
    path = folder / TENSORS_FILE
    if not path.is_file():
        raise ModelFilesError(_explain_missing_tensors(folder))
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ModelFilesError(
            f"{path} has {path.stat().st_size} bytes, and {_MAX_FILE_BYTES} are the most; is it a whole model?"
        )
    modules = _read_modules(path, settings)
    file_hashes = hash_files({TENSORS_FILE: path}, cache_dir or default_cache_dir(), report=report)
    digest = fingerprint(settings.meaning(), file_hashes)[:32]
    return AdapterSource(
        info=AdapterInfo(name=name, adapter_hash=AdapterHash(digest)),
        folder=folder,
        settings=settings,
        modules=modules,
    )


def _read_config(folder: Path) -> bytes:
    if not folder.is_dir():
        raise ModelNotFoundError(f"there is no folder {folder}; give the folder that PEFT's save_pretrained wrote")
    try:
        return (folder / CONFIG_FILE).read_bytes()
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"{folder} holds no LoRA adapter ({CONFIG_FILE} is not there); give the folder that PEFT's "
            "save_pretrained wrote"
        ) from error
    except OSError as error:
        raise ModelFilesError(f"{folder / CONFIG_FILE} can not be read ({error.strerror or error})") from error


def _explain_missing_tensors(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickled:
        return (
            f"{folder} holds only pickled tensors ({pickled[0]}), which can run code when opened; save the adapter "
            "again with save_pretrained of a current PEFT, which writes safetensors"
        )
    return f"{folder} holds no {TENSORS_FILE}; fetch the adapter again"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ModelFilesError(f"{path} is missing; fetch the adapter again") from error
    except (SafetensorError, OSError) as error:
        raise ModelFilesError(f"{path} is damaged or incomplete ({error}); fetch the adapter again") from error
    with file:
        yield file


def _read_modules(path: Path, settings: LoraSettings) -> dict[str, AdaptedModule]:
    """Every pair of matrices in the file, by module name."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    with _opened(path) as file:
        names = list(file.keys())
        if len(names) > _MAX_TENSORS:
            raise ModelFilesError(f"{path} holds {len(names)} tensors, and {_MAX_TENSORS} are the most")
        for name in names:
            match = _TENSOR_NAME.fullmatch(name) if len(name) <= _MAX_NAME_CHARS else None
            if match is None:
                raise UnsupportedModelError(
                    f"{path} holds {_shown(name)}, which is no matrix of a plain LoRA on a linear layer; "
                    "such adapters are not served"
                )
            part = file.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise ModelFilesError(
                    f"the tensor {name} of {path} is {part.get_dtype()}; adapters are {', '.join(_DTYPES)}"
                )
            shapes.setdefault(match["module"], {})[match["factor"]] = tuple(part.get_shape())
    if not shapes:
        raise ModelFilesError(f"{path} holds no tensors; fetch the adapter again")
    return {name: _pair(name, factors, settings, path) for name, factors in shapes.items()}


def _pair(name: str, shapes: Mapping[str, tuple[int, ...]], settings: LoraSettings, path: Path) -> AdaptedModule:
    place = _MODULE_NAME.fullmatch(name)
    if place is None:
        raise UnsupportedModelError(
            f"{path} adapts {name}, which is outside of the model's blocks; only adapters of blocks are served"
        )
    if len(shapes) != 2:
        raise ModelFilesError(f"{path} holds only one of the two matrices of {name}; fetch the adapter again")
    a, b = shapes["A"], shapes["B"]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
        raise ModelFilesError(
            f"the matrices of {name} in {path} are {list(a)} and {list(b)}, which make no product; "
            "adapters of linear layers have [rank, inputs] and [outputs, rank]"
        )
    rank = a[0]
    if rank > MAX_RANK or not settings.allows_rank(rank):
        raise ModelFilesError(f"{name} has rank {rank} in {path}, which its {CONFIG_FILE} does not state")
    if not settings.targets(name):
        raise ModelFilesError(f"{path} adapts {name}, which is not among the target_modules of its {CONFIG_FILE}")
    return AdaptedModule(
        name=name,
        stack=place["stack"],
        block=int(place["block"]),
        path=place["path"],
        rank=rank,
        in_features=a[1],
        out_features=b[0],
        scale=settings.scale_of(name, rank),
    )


def _shown(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:110]}…"
