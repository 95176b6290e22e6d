"""Keeps blocks in few bits on disk, so that the next start reads them instead of making them anew.

One safetensors file per block, whatever span it was loaded for, in a folder named by the model's content hash and
everything else the numbers depend on. Files appear under their names by renaming, so readers, a second server and a
crash see all of a file or nothing; two servers that make the same file both make the right one. What is read is
checked against a checksum over every tensor, so files need not be flushed to the disk at once, and a damaged one is
made anew. A cache never stands in the way: without room, weights are just not kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.datatypes import ModelHash

if TYPE_CHECKING:
    import torch

__all__ = ["BlockKey", "WeightCache"]

logger = logging.getLogger(__name__)

_VERSION = 1
"""Raise it when formats store other numbers under their old names, or files are written otherwise."""
_DEFAULT_SHARE = 0.2
"""Of the disk space that would be free without the cache."""
_RESERVED_BYTES = 512 << 20
"""Left free on the disk in any case: for logs, and for everybody else."""
_LEFTOVER_AFTER_S = 3600.0
"""A partial file this old belongs to a process that died."""
_CHECKSUM = "checksum"
_KEY = "key"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, kw_only=True)
class BlockKey:
    """Everything that the stored tensors of one block depend on."""

    model_hash: ModelHash
    """Content of the model's config and weights."""
    block: int
    """Number in the whole model."""
    format_name: str
    """How large matrices are stored, in every detail."""
    rest: str
    """How everything else is: the dtype's name."""

    def __str__(self) -> str:
        return f"{self.model_hash}/{self.format_name}/{self.rest}/v{_VERSION}/{self.block}"

    @property
    def relative_path(self) -> Path:
        folder = f"{self.model_hash[:32]}-{self.format_name}-{self.rest}-v{_VERSION}"
        return Path(_UNSAFE.sub("_", folder)) / f"block-{self.block:05d}.safetensors"


class WeightCache:
    """A folder of stored blocks, at most `max_bytes` large. For use by one thread; folders may be shared."""

    def __init__(self, folder: Path, *, max_bytes: int | None = None) -> None:
        """`max_bytes` None allows a fifth of the disk space that is free at the first write; 0 keeps nothing."""
        self.folder = folder
        self._max_bytes = max_bytes
        self._in_use: set[Path] = set()
        self._gave_up = False

    def __repr__(self) -> str:
        return f"<WeightCache {self.folder}{' (no longer written)' if self._gave_up else ''}>"

    def read(self, key: BlockKey) -> dict[str, torch.Tensor] | None:
        """The stored tensors of a block, in memory of their own; None if there are none, or damaged ones."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / key.relative_path
        tensors: dict[str, torch.Tensor] = {}
        checksum = 0
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if metadata.get(_KEY) != str(key):
                    raise ValueError("it is of something else")
                for name in sorted(file.keys()):
                    tensor = file.get_tensor(name)
                    checksum = _add_to_checksum(checksum, name, tensor)
                    tensors[name] = tensor.clone()
            if metadata.get(_CHECKSUM) != str(checksum):
                raise ValueError("its checksum is another")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            logger.warning("the stored weights %s are damaged (%s) and are made anew", path, error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        self._in_use.add(path)
        with contextlib.suppress(OSError):
            os.utime(path)  # most recently used
        return tensors

    def forget(self, key: BlockKey) -> None:
        """Remove what is stored for a block, because it does not fit the model after all."""
        path = self.folder / key.relative_path
        logger.warning("the stored weights %s do not fit the model and are made anew", path)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def write(self, key: BlockKey, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Store a block's tensors; says whether it was done. Never raises for a disk that can not take them."""
        from safetensors import SafetensorError

        if self._gave_up or self._max_bytes == 0:
            return False
        path = self.folder / key.relative_path
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            obstacle = self._make_room(size_bytes)
            if obstacle is None:
                _write_file(path, key, tensors)
                self._in_use.add(path)
                return True
        except (OSError, SafetensorError) as error:
            obstacle = str(error)
        self._gave_up = True
        logger.warning(
            "quantised weights are not kept on disk, so the next start takes as long as this one: %s (%s)",
            obstacle,
            self.folder,
        )
        return False

    def _make_room(self, size_bytes: int) -> str | None:
        """Remove the least recently used files, but none of this run; what stands in the way, or None."""
        entries = self._entries()
        used_bytes = sum(size for _, size, _ in entries)
        free_bytes = shutil.disk_usage(self.folder).free
        if self._max_bytes is None:
            self._max_bytes = int((free_bytes + used_bytes) * _DEFAULT_SHARE)
        excess_bytes = max(used_bytes + size_bytes - self._max_bytes, size_bytes + _RESERVED_BYTES - free_bytes)
        for path, entry_bytes, _ in sorted(entries, key=lambda entry: entry[2]):
            if excess_bytes <= 0:
                break
            if path in self._in_use:
                continue
            path.unlink(missing_ok=True)
            excess_bytes -= entry_bytes
        if excess_bytes <= 0:
            return None
        if size_bytes + _RESERVED_BYTES > free_bytes:
            return f"the disk has {free_bytes >> 20} MiB left"
        return f"they may take {self._max_bytes >> 20} MiB"

    def _entries(self) -> list[tuple[Path, int, float]]:
        """Path, size and last use of every stored block; remnants of processes that died are removed."""
        entries: list[tuple[Path, int, float]] = []
        now_s = time.time()
        for path in self.folder.glob("*/*"):
            try:
                stat = path.stat()
                if path.name.startswith(".") and now_s - stat.st_mtime > _LEFTOVER_AFTER_S:
                    path.unlink(missing_ok=True)
                elif path.suffix == ".safetensors":
                    entries.append((path, stat.st_size, stat.st_mtime))
            except OSError:  # another server removed it meanwhile
                continue
        return entries


def _write_file(path: Path, key: BlockKey, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksum = 0
    for name in sorted(on_host):
        checksum = _add_to_checksum(checksum, name, on_host[name])
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    try:
        save_file(on_host, temporary, metadata={_KEY: str(key), _CHECKSUM: str(checksum)})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _add_to_checksum(checksum: int, name: str, tensor: torch.Tensor) -> int:
    """CRC-32: it finds what disks and crashes do, at the speed of memory. Nobody is kept out: the folder is our own."""
    import torch

    checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(), checksum)
    if tensor.numel():
        numbers: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(numbers, checksum)
    return checksum
