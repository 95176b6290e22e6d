"""Where and how precisely a server computes: settled once, before blocks are chosen, and kept through all moves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from swarm.errors import BadInputError
from swarm.server.device_memory import measure_device_memory
from swarm.server.planning import plan_server
from swarm.server.spread_plan import plan_spread
from swarm.weights.precision import AUTO, Precision, parse_precision

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.models import ModelSource
    from swarm.server.capacity_plan import CapacityPlan
    from swarm.server.node_config import NodeConfig
    from swarm.server.spread_plan import SpreadPlan

__all__ = ["CPU_KV_BYTES", "Workplace", "find_workplace"]

logger = logging.getLogger(__name__)
CPU_KV_BYTES: Final = 2**30
"""For keys and values on a CPU when nobody says how much: people do other things with main memory."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Devices and precision of one server."""

    devices: tuple[str, ...]
    """One, or several that share the blocks."""
    precision: Precision
    double_quantised: bool = False
    """Whether the scales of 4-bit weights are in few bits as well."""
    reason: str
    """Why this precision, when nobody asked for it, as half a sentence; else empty."""

    @property
    def is_cpu(self) -> bool:
        return self.devices == ("cpu",)

    def count_fitting(self, source: ModelSource, config: NodeConfig) -> int:
        """How many blocks a server that was not told may hold at most.

        Raises BadInputError when not even one fits.
        """
        if len(self.devices) > 1:
            kv_bytes = None if config.kv_memory_bytes is None else config.kv_memory_bytes // len(self.devices)
            fitting = [
                plan_server(source, self.precision, device, kv_bytes=kv_bytes).num_blocks for device in self.devices
            ]
            return min(sum(fitting), source.num_blocks)
        return plan_server(
            source, self.precision, self.devices[0], kv_bytes=self._kv_bytes(config), policy=config.policy
        ).num_blocks

    def plan(self, source: ModelSource, span: Span, config: NodeConfig) -> CapacityPlan:
        """What is streamed, and how much memory pages get, when one device serves `span`.

        Raises BadInputError when it does not fit; the message says what would.
        """
        return plan_server(
            source,
            self.precision,
            self.devices[0],
            span=span,
            kv_bytes=self._kv_bytes(config),
            policy=config.policy,
            may_stream=config.offload,
        )

    def spread(self, source: ModelSource, span: Span, config: NodeConfig) -> SpreadPlan:
        """What each of several devices takes of `span`.

        Raises BadInputError when it does not fit all of them together; the message says what would.
        """
        from swarm.models.block_sizes import measure_model_shape

        sizes = measure_model_shape(source.config).sizes(self.precision, self.devices[0])
        wanted = config.kv_memory_bytes
        kv_tokens = None if wanted is None else wanted // (sizes.kv_bytes_per_token * len(span))
        memories = [replace(measure_device_memory(name), name=name) for name in self.devices]
        return plan_spread(sizes, memories, span, kv_tokens=kv_tokens)

    def _kv_bytes(self, config: NodeConfig) -> int | None:
        if config.kv_memory_bytes is None and self.is_cpu:
            return CPU_KV_BYTES
        return config.kv_memory_bytes


def find_workplace(source: ModelSource, config: NodeConfig) -> Workplace:
    """Resolve `auto`. Takes a second or two where precisions must be tried.

    Raises BadInputError for devices or precisions that do not exist, MissingDependencyError.
    """
    devices = _choose_devices(config.device)
    if len(devices) > 1 and config.offload:
        raise BadInputError("--offload is not offered over several devices; name one with --device")
    if config.weights != AUTO:
        return _workplace(config, devices, parse_precision(config.weights))
    import torch

    from swarm.weights import choose_automatically

    published = getattr(source.config, "dtype", None)
    if len(devices) > 1 or (devices[0] == "cpu" and published is not torch.bfloat16):
        # Slices of matrices are cut from floats; and only weights published in bf16 leave a CPU a choice.
        precision = Precision.BF16 if devices[0] != "cpu" else Precision.FP32
        return _workplace(config, devices, precision)
    hidden_size = int(source.config.get_text_config(decoder=True).hidden_size)
    choice = choose_automatically(devices[0], hidden_size=hidden_size, published_dtype=published)
    logger.info("weights: %s", choice.reason)
    return _workplace(config, devices, choice.precision, choice.reason)


def _workplace(config: NodeConfig, devices: tuple[str, ...], precision: Precision, reason: str = "") -> Workplace:
    return Workplace(devices=devices, precision=precision, double_quantised=config.double_quantised, reason=reason)


def _choose_devices(names: str) -> tuple[str, ...]:
    devices = tuple(_choose_device(name.strip()) for name in names.split(","))
    if len(set(devices)) < len(devices):
        raise BadInputError(f"--device {names} names a device twice; name each once, for example cuda:0,cuda:1")
    if len(devices) > 1 and "cpu" in devices:
        raise BadInputError(
            f"--device {names} mixes a GPU and the CPU; name GPUs only, and --offload for what is too much"
        )
    return devices


def _choose_device(name: str) -> str:
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda:0" if num_gpus else "cpu"
    if name == "cpu":
        return name
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise BadInputError(f"--device {name} is unknown; use auto, cpu, cuda, cuda:N or cuda:N,cuda:M")
    if not num_gpus:
        raise BadInputError(f"--device {name} was asked for, but torch sees no CUDA device; use --device cpu")
    if int(number or 0) >= num_gpus:
        raise BadInputError(f"--device {name} was asked for, but there are {num_gpus}: cuda:0 to cuda:{num_gpus - 1}")
    return f"cuda:{number or 0}"
