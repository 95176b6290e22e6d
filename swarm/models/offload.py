"""Streams blocks that do not fit a device in from host memory or disk, ahead of their use.

The idea is ZeRO-Inference's (arXiv 2206.01861): a block's weights are read once for all tokens of a step, so large
batches hide the transfer, and single tokens run at the speed of the link. Weights of streamed blocks are permanent
views of memory that is filled in time, so nothing in a block knows, not even quantised matrices:

- on a CPU the memory is a mapped file: a side thread reads the next block ahead while one computes, and pages of the
  one before are let go, so at most two blocks are resident;
- on a GPU it is one of two or three buffers, which a side thread fills over a stream of its own, from pinned host
  memory or from the mapped file.

Gradients recompute block by block: a block's memory would have changed by the time its backward pass comes.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from swarm.errors import BadInputError, PeerFaultError
from swarm.models.flat_blocks import BlockFile, lay_out
from swarm.models.offload_memory import BufferedMemory, MappedMemory, StreamMemory
from swarm.weights.blocks import module_tensors, put_tensors

if TYPE_CHECKING:
    from swarm.models.span import SpanModel

__all__ = ["BlockStreamer", "Rest", "offload_layers"]

logger = logging.getLogger(__name__)

Rest = Literal["host", "disk"]
"""Where the weights of streamed blocks are kept: in (pinned) main memory, or in a file."""
_DEADLINE_S: Final = 120.0
"""A block that takes longer to arrive comes from a disk that is broken."""


def offload_layers(
    model: SpanModel, which: Sequence[int], *, where: Rest, folder: Path | None = None
) -> BlockStreamer | None:
    """Move the weights of some layers of a loaded span out of its device; None when `which` is empty.

    The span works as before, and gives the same bits. Packed copies of weights (pack_large_linears) must not be made
    of these layers. To load a span that is larger than memory, hand `BlockStreamer.take` the blocks as they arrive.

    Args:
        which: numbers of layers, counted from the span's start (see capacity_plan.spread_evenly).
        folder: for "disk"; None takes the model cache.

    Raises:
        BadInputError: `which` names no layers of the span, the disk is full, or "host" is where they are already.
    """
    chosen = sorted(set(which))
    if not chosen:
        return None
    if chosen[0] < 0 or chosen[-1] >= model.num_layers:
        raise BadInputError(f"layers {chosen} are not all among the {model.num_layers} layers of blocks {model.span}")
    streamer = BlockStreamer(model.device, where=where, folder=folder)
    try:
        for index in chosen:
            streamer.take(index, model.blocks[index])
        streamer.start()
    except BaseException:
        streamer.close()
        raise
    return streamer


class BlockStreamer:
    """Keeps the weights of some blocks elsewhere, and has them in place whenever one of these blocks runs.

    `take` blocks in any order, as they are loaded, then `start`, then run the model.
    """

    def __init__(self, device: torch.device | str, *, where: Rest, folder: Path | None = None) -> None:
        """Raises BadInputError when `where` makes no sense on `device`, or `folder` can not be written to."""
        from swarm.models.source import default_cache_dir

        device = torch.device(device)
        if device.type == "cpu" and where == "host":
            raise BadInputError("on a CPU, weights are in host memory already; offload them to disk")
        file = BlockFile((folder or default_cache_dir()) / "offload") if where == "disk" else None
        if device.type == "cpu":
            assert file is not None
            self._memory: StreamMemory = MappedMemory(file)
        else:
            self._memory = BufferedMemory(device, file)
        self._blocks: list[nn.Module] = []
        self._numbers: list[int] = []
        self._reading: tuple[Future[None], int] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"<BlockStreamer of layers {self._numbers}, {self.size_bytes >> 20} MiB elsewhere>"

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the streamed layers."""
        return tuple(self._numbers)

    @property
    def size_bytes(self) -> int:
        """Weights that are kept elsewhere."""
        return self._memory.size_bytes

    def take(self, index: int, block: nn.Module) -> None:
        """Move a block's weights out; the block is unusable until `start`.

        Raises BadInputError when the disk is full.
        """
        assert self._thread is None, "blocks are taken before the start"
        tensors = module_tensors(block)
        layout = lay_out(tensors)
        self._memory.add(layout, tensors)
        # Shapes and dtypes stay, memory goes.
        put_tensors(block, {name: _hollow(tensor) for name, tensor in tensors.items()})
        self._blocks.append(block)
        self._numbers.append(index)

    def start(self) -> None:
        """Let the blocks run from now on."""
        gc.collect()  # what remains of loading refers to itself, and to the weights as they were published
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="swarm-offload")
        order = sorted(range(len(self._numbers)), key=self._numbers.__getitem__)
        self._numbers = [self._numbers[index] for index in order]
        self._blocks = [self._blocks[index] for index in order]
        for place, (block, views) in enumerate(zip(self._blocks, self._memory.start(order), strict=True)):
            put_tensors(block, views)
            # On the instance: hooks of the block (SpanModel has some) still run around it.
            block.forward = self._streamed(block.forward, place)
        logger.info("layers %s stream in, %d MiB", self._numbers, self.size_bytes >> 20)

    def close(self) -> None:
        """End the side thread; the blocks can not run any more. Harmless when repeated."""
        self._memory.close()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _streamed(self, forward: Callable[..., Any], place: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inputs = (*args, *kwargs.values())
            if not torch.is_grad_enabled() or not any(
                isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
            ):
                self._bring(place, step=1)
                return forward(*args, **kwargs)
            steps = iter((1, -1))

            def recomputable(*args: Any, **kwargs: Any) -> Any:
                # First on the way forward, then on the way back, where the block before comes next.
                self._bring(place, step=next(steps, -1))
                return forward(*args, **kwargs)

            return checkpoint(recomputable, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    def _bring(self, place: int, *, step: int) -> None:
        """Have a block's weights in place, and begin with those of the block that comes next."""
        if self._reading is not None:
            reading, self._reading = self._reading, None
            self._wait(*reading)
        if not self._memory.holds(place):
            self._wait(self._read(place), place)
        following = (place + step) % len(self._blocks)
        self._memory.use(place, following)
        if not self._memory.holds(following):
            reading_ahead = self._read(following)
            if self._memory.must_be_awaited:
                self._reading = reading_ahead, following

    def _read(self, place: int) -> Future[None]:
        assert self._thread is not None, "start the streamer first"
        return self._thread.submit(self._memory.prepare(place))

    def _wait(self, reading: Future[None], place: int) -> None:
        if not self._memory.must_be_awaited:
            return
        try:
            reading.result(_DEADLINE_S)
        except Exception as error:
            self._memory.forget(place)
            reason = f"within {_DEADLINE_S:.0f} s" if isinstance(error, FutureTimeoutError) else f"({error})"
            raise PeerFaultError(
                f"the weights of layer {self._numbers[place]} did not arrive {reason}; the disk may be broken"
            ) from error


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    """Looks like `tensor`, but all of its elements are one and the same."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
