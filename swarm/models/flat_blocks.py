"""All tensors of a block side by side in one piece of memory, which moves and maps as a whole."""

from __future__ import annotations

import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import torch

from swarm.errors import BadInputError

__all__ = ["BlockFile", "FlatLayout", "FlatTensor", "lay_out"]

_ALIGNMENT_BYTES: Final = 64
"""A cache line: kernels read unaligned weights more slowly."""
_PAGE_BYTES: Final = max(mmap.ALLOCATIONGRANULARITY, 4096)
_TOUCH_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """Where one tensor lies."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class FlatLayout:
    """Where each tensor of a block lies."""

    tensors: Mapping[str, FlatTensor]
    size_bytes: int

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors within `flat` [size_bytes] uint8, sharing its memory."""
        return {
            name: flat[place.offset : place.offset + place.size_bytes].view(place.dtype).view(place.shape)
            for name, place in self.tensors.items()
        }

    def fill(self, flat: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors to their places, from any device."""
        for name, view in self.views(flat).items():
            view.copy_(tensors[name])


def lay_out(tensors: Mapping[str, torch.Tensor]) -> FlatLayout:
    """Places for tensors, each at a cache line of its own."""
    places: dict[str, FlatTensor] = {}
    offset = 0
    for name, tensor in tensors.items():
        places[name] = place = FlatTensor(offset, tuple(tensor.shape), tensor.dtype)
        offset = -(-(offset + place.size_bytes) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return FlatLayout(places, max(offset, _ALIGNMENT_BYTES))


class BlockFile:
    """Blocks in a nameless file: nobody else opens it, and the system deletes it whatever happens to this process.

    Blocks are appended, then the file is mapped once and only read.
    """

    def __init__(self, folder: Path) -> None:
        """Raises BadInputError when `folder` can not be written to."""
        self.folder = folder
        self.size_bytes = 0
        self._places: list[tuple[int, int]] = []
        self._map: mmap.mmap | None = None
        self._mapped: torch.Tensor | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115  # stays open until it is mapped
                dir=folder, prefix="swarm-offload-"
            )
        except OSError as error:
            raise BadInputError(
                f"blocks can not be kept at {folder} ({error.strerror}); set SWARM_CACHE to a folder "
                "that you may write to"
            ) from error

    def append(self, flat: torch.Tensor) -> int:
        """Write a block [size] uint8 (on the host); its number.

        Raises BadInputError when the disk is full.
        """
        assert self._map is None, "the file is mapped already"
        size_bytes = flat.numel()
        try:
            self._file.seek(self.size_bytes)
            self._file.write(flat.numpy().data)
            self._file.flush()
        except OSError as error:
            raise BadInputError(
                f"blocks can not be kept at {self.folder}: {error.strerror} after {self.size_bytes >> 20} MiB; "
                "free some space, set SWARM_CACHE to a larger disk, or serve fewer blocks (--num-blocks)"
            ) from error
        self._places.append((self.size_bytes, size_bytes))
        self.size_bytes += -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        return len(self._places) - 1

    def map(self) -> None:
        """Make the blocks readable; nothing can be appended from then on."""
        self._file.truncate(self.size_bytes)
        # Read only: a writable mapping would count as memory that this process may come to need.
        self._map = mmap.mmap(self._file.fileno(), self.size_bytes, access=mmap.ACCESS_READ)
        self._file.close()  # the mapping keeps it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nobody may write to it is the intention
            self._mapped = torch.frombuffer(self._map, dtype=torch.uint8)

    def close(self) -> None:
        """Give up a file that is not mapped; harmless otherwise."""
        self._file.close()

    def flat(self, number: int) -> torch.Tensor:
        """A block [size] uint8, backed by the file: pages come into memory when they are read. Never write to it."""
        assert self._mapped is not None, "map the file first"
        offset, size_bytes = self._places[number]
        return self._mapped[offset : offset + size_bytes]

    def read_ahead(self, number: int, *, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Bring a block into memory; returns when it is there, or not wanted any more."""
        if not is_wanted():
            return
        offset, size_bytes = self._advise(number, "MADV_WILLNEED")
        assert self._mapped is not None
        end = offset + size_bytes
        for start in range(offset, end, _TOUCH_BYTES):
            if not is_wanted():
                return
            # One byte of each page, in pieces that torch does not share out to other threads.
            self._mapped[start : min(start + _TOUCH_BYTES, end) : _PAGE_BYTES].sum()

    def drop(self, number: int) -> None:
        """Let this process' pages of a block go; the next reader brings them back."""
        self._advise(number, "MADV_DONTNEED")

    def _advise(self, number: int, name: str) -> tuple[int, int]:
        assert self._map is not None
        offset, size_bytes = self._places[number]
        advice = getattr(mmap, name, None)
        if advice is not None and os.name == "posix":
            self._map.madvise(advice, offset, size_bytes)
        return offset, size_bytes
