"""Plans what a server takes on: from a model and this machine's free memory to blocks and KV tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarm.kvpolicy.settings import FULL_CACHE, KVPolicy
from swarm.server.capacity_plan import check_room_to_read, plan_capacity
from swarm.server.device_memory import measure_device_memory

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.models import ModelSource
    from swarm.server.capacity_plan import CapacityPlan
    from swarm.weights import Precision

__all__ = ["plan_server"]


def plan_server(
    source: ModelSource,
    precision: Precision,
    device: str,
    *,
    span: Span | None = None,
    num_blocks: int | None = None,
    kv_bytes: int | None = None,
    kv_tokens: int | None = None,
    policy: KVPolicy = FULL_CACHE,
    may_stream: bool = False,
) -> CapacityPlan:
    """How many blocks and KV tokens fit `device` ("cpu", "cuda:1") now; nothing is loaded.

    Args:
        span, num_blocks: what was asked for; with neither, as many blocks as fit.
        kv_bytes, kv_tokens: KV memory asked for; with neither, the planner's choice.
        policy: how keys and values will be kept.
        may_stream: blocks beyond the memory may stream in (`swarm.models.offload`; which ones:
            `capacity_plan.spread_evenly(plan.num_blocks, plan.num_streamed)`).

    Raises:
        BadInputError: it does not fit; the message says what would.
        UnsupportedModelError: the model's blocks can not be found.
        MissingDependencyError: the precision needs a package on this device that is not installed.
    """
    from swarm.models.block_sizes import measure_model_shape
    from swarm.server.planned_kv import sizes_under

    shape = measure_model_shape(source.config)
    plan = plan_capacity(
        sizes_under(
            policy,
            shape,
            precision,
            device,
            model_hash=source.model_hash,
            max_positions=source.max_positions,
        ),
        measure_device_memory(device),
        span=span,
        num_blocks=num_blocks,
        kv_bytes=kv_bytes,
        kv_tokens=kv_tokens,
        may_stream=may_stream,
    )
    if policy.compresses:
        check_room_to_read(plan, shape.sizes(precision, device))
    return plan
