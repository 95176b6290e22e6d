"""The memory that streamed blocks' weights are permanent views of, and how it is filled."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from swarm.models.flat_blocks import BlockFile, FlatLayout

__all__ = ["BufferedMemory", "MappedMemory", "StreamMemory"]

logger = logging.getLogger(__name__)


class StreamMemory(ABC):
    """The memory that streamed blocks' weights are views of. Places count the blocks in order."""

    size_bytes = 0
    must_be_awaited = True
    """Whether a block may run only after what `prepare` gave has ended."""

    @abstractmethod
    def close(self) -> None:
        """Give up what was begun, if it has not started."""

    @abstractmethod
    def add(self, layout: FlatLayout, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the weights of the next block."""

    @abstractmethod
    def start(self, order: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """The views of each block's weights; nothing is added afterwards.

        `order` names the blocks, as they were added, in the order in which they run: places count that way.
        """

    @abstractmethod
    def holds(self, place: int) -> bool:
        """Whether a block's views show its weights now, without waiting."""

    @abstractmethod
    def forget(self, place: int) -> None:
        """A block's weights did not arrive."""

    @abstractmethod
    def prepare(self, place: int) -> Callable[[], None]:
        """What the side thread must do to have a block in place; called by the computing thread."""

    @abstractmethod
    def use(self, place: int, following: int) -> None:
        """A block is about to run on the current stream; it and the following one are wanted, others may go."""


class MappedMemory(StreamMemory):
    """A file that is mapped: every block has its own memory, which comes and goes.

    Nobody waits for pages to be read ahead: those that are late come when they are touched.
    """

    must_be_awaited = False

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self._layouts: list[FlatLayout] = []
        self._numbers: Sequence[int] = ()
        """Of each place's block in the file."""
        self._present: set[int] = set()

    def add(self, layout: FlatLayout, tensors: Mapping[str, torch.Tensor]) -> None:
        flat = torch.empty(layout.size_bytes, dtype=torch.uint8)
        layout.fill(flat, tensors)
        self._file.append(flat)
        self._layouts.append(layout)
        self.size_bytes += layout.size_bytes

    def start(self, order: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        self._file.map()
        self._numbers = order
        return [self._layouts[number].views(self._file.flat(number)) for number in order]

    def close(self) -> None:
        self._file.close()

    def holds(self, place: int) -> bool:
        return place in self._present

    def forget(self, place: int) -> None:
        self._present.discard(place)

    def prepare(self, place: int) -> Callable[[], None]:
        self._present.add(place)
        # Pages that come late may not come back after they were let go.
        return lambda: self._file.read_ahead(self._numbers[place], is_wanted=lambda: place in self._present)

    def use(self, place: int, following: int) -> None:
        # Here and not after the block: a backward pass reads weights after the block has returned.
        for other in self._present - {place, following}:
            self._file.drop(self._numbers[other])
        self._present &= {place, following}


class BufferedMemory(StreamMemory):
    """Buffers on the device that blocks take turns in; neighbours never share one."""

    def __init__(self, device: torch.device, file: BlockFile | None) -> None:
        self._device = device
        self._file = file
        self._is_cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self._is_cuda else None
        self._layouts: list[FlatLayout] = []
        self._kept: list[torch.Tensor] = []
        """Each block on the host."""
        self._buffers: list[_Buffer] = []

    def add(self, layout: FlatLayout, tensors: Mapping[str, torch.Tensor]) -> None:
        flat = torch.empty(layout.size_bytes, dtype=torch.uint8) if self._file else self._host_memory(layout.size_bytes)
        layout.fill(flat, tensors)
        if self._file is not None:
            self._file.append(flat)
        else:
            self._kept.append(flat)
        self._layouts.append(layout)
        self.size_bytes += layout.size_bytes

    def _host_memory(self, size_bytes: int) -> torch.Tensor:
        if self._is_cuda:
            try:
                return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                logger.warning("host memory can not be pinned, blocks stream in more slowly: %s", error)
        return torch.empty(size_bytes, dtype=torch.uint8)

    def start(self, order: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        if self._file is not None:
            self._file.map()
            self._kept = [self._file.flat(number) for number in range(len(self._layouts))]
        self._layouts = [self._layouts[number] for number in order]
        self._kept = [self._kept[number] for number in order]
        num_blocks = len(self._layouts)
        num_buffers = min(3 if num_blocks % 2 else 2, num_blocks)
        for number in range(num_buffers):
            size_bytes = max(
                layout.size_bytes for place, layout in enumerate(self._layouts) if self._buffer_number(place) == number
            )
            buffer = _Buffer(torch.empty(size_bytes, dtype=torch.uint8, device=self._device))
            if self._file is not None and self._is_cuda:
                buffer.staging = self._host_memory(size_bytes)
            self._buffers.append(buffer)
        return [
            layout.views(self._buffer(place).memory[: layout.size_bytes]) for place, layout in enumerate(self._layouts)
        ]

    def _buffer_number(self, place: int) -> int:
        """Blocks run in a circle, so with an odd number of them the last one has a buffer of its own."""
        num_blocks = len(self._layouts)
        return 2 if num_blocks % 2 and num_blocks > 1 and place == num_blocks - 1 else place % 2

    def _buffer(self, place: int) -> _Buffer:
        return self._buffers[self._buffer_number(place)]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def holds(self, place: int) -> bool:
        return self._buffer(place).place == place

    def forget(self, place: int) -> None:
        self._buffer(place).place = None

    def prepare(self, place: int) -> Callable[[], None]:
        buffer = self._buffer(place)
        buffer.place = place
        if not self._is_cuda:
            return lambda: self._copy(place, buffer)
        # Everything queued so far may still read what the buffer holds, a backward pass included.
        buffer.is_free = torch.cuda.current_stream(self._device).record_event()
        return lambda: self._copy_to_gpu(place, buffer)

    def _copy(self, place: int, buffer: _Buffer) -> None:
        kept = self._kept[place]
        buffer.memory[: kept.numel()].copy_(kept)

    def _copy_to_gpu(self, place: int, buffer: _Buffer) -> None:
        kept = self._kept[place]
        if buffer.staging is not None:
            if buffer.is_ready is not None:
                buffer.is_ready.synchronize()  # the last copy out of it
            kept = buffer.staging[: kept.numel()].copy_(kept)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(buffer.is_free)
            buffer.memory[: kept.numel()].copy_(kept, non_blocking=True)
            buffer.is_ready = self._stream.record_event()

    def use(self, place: int, following: int) -> None:
        ready = self._buffer(place).is_ready
        if ready is not None:
            torch.cuda.current_stream(self._device).wait_event(ready)


class _Buffer:
    """Device memory for one block at a time."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.place: int | None = None
        """The block that is here, or on its way."""
        self.staging: torch.Tensor | None = None
        """Pinned host memory on the way from disk."""
        self.is_free: Any = None
        """CUDA event: what was here before has been used."""
        self.is_ready: Any = None
        """CUDA event: what is here has arrived."""
