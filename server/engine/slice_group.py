"""Sums over the processes of one machine that share a span, through torch.distributed. The one file that meets it."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from swarm.errors import PeerFaultError

__all__ = ["ProcessGroup"]


class ProcessGroup:
    """Processes 0 to size - 1, each with a device of its own. After a failure it is broken for good."""

    def __init__(self, meeting_place: Path, *, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        """Meet the others; all call this at about the same time.

        Args:
            meeting_place: a file in a folder that only this user can read; nothing listens on a network but loopback.
            timeout_s: for meeting, and for every later call.

        Raises PeerFaultError when they do not come.
        """
        self.rank = rank
        self.size = size
        self.is_broken = False
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._device = device
        try:
            self._host_group, self._group = _connect(meeting_place, rank, size, device, self._timeout)
        except (RuntimeError, ValueError) as error:
            raise PeerFaultError(f"the processes that share the blocks did not find each other: {error}") from error

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by the sum of all processes' tensors; returns it."""
        tensor = tensor.contiguous()
        self._run(lambda: self._group.allreduce([tensor]))
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """All processes' tensors, of equal shape, by rank."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        self._run(lambda: self._group.allgather([gathered], [tensor]))
        return gathered

    def share(self, tensor: torch.Tensor) -> None:
        """Give process 0's tensor, on the host, to the others, who bring one of the same shape to fill."""
        # As bytes: what it means is nobody's business on the way.
        raw = tensor.view(torch.uint8) if tensor.numel() else tensor
        if raw.numel():
            self._run(lambda: self._host_group.broadcast(raw, 0))

    def _run(self, begin: Callable[[], Any]) -> None:
        if self.is_broken:
            raise PeerFaultError("a process that shares the blocks is gone; restart the server")
        try:
            begin().wait(self._timeout)
        except (RuntimeError, ValueError) as error:
            self.is_broken = True
            raise PeerFaultError(f"a process that shares the blocks is gone or does not answer: {error}") from error


def _connect(
    meeting_place: Path, rank: int, size: int, device: torch.device, timeout: datetime.timedelta
) -> tuple[Any, Any]:
    """Groups for tensors on the host, and for those on the device."""
    # Without types: torch has none for groups that are not its global one, which a server that moves can not use.
    distributed: Any = importlib.import_module("torch.distributed")
    gloo = distributed.ProcessGroupGloo
    store = distributed.FileStore(str(meeting_place), size)
    store.set_timeout(timeout)
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    host_group = gloo(distributed.PrefixStore("host", store), rank, size, options)
    if device.type == "cpu":
        return host_group, host_group
    # Not run yet: there was no machine with two GPUs.
    return host_group, distributed.ProcessGroupNCCL(distributed.PrefixStore("device", store), rank, size, timeout)
