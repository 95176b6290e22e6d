"""Loads a span onto the devices it was planned for, and makes the backend that runs it there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.errors import BadInputError, UnsupportedModelError
from swarm.kvpolicy.settings import FULL_CACHE
from swarm.server.adapters import load_adapters
from swarm.server.planned_kv import UNLIMITED_POSITIONS

if TYPE_CHECKING:
    from torch import nn

    from swarm.datatypes import AdapterInfo, Span
    from swarm.kvcache.footprint import Footprint
    from swarm.kvpolicy.settings import KVPolicy
    from swarm.models import ModelSource, SpanModel
    from swarm.models.adapters.source import AdapterSource
    from swarm.models.offload import BlockStreamer
    from swarm.models.progress import ProgressReporter
    from swarm.server.engine.engine import SpanBackend
    from swarm.server.node_config import NodeConfig
    from swarm.server.policy_layers import PolicyLayers, PolicyWish
    from swarm.server.preparing import Workplace

__all__ = ["LoadedSpan", "load_backend", "make_wish", "note_on_calibration"]


def _nothing() -> None:
    pass


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class LoadedSpan:
    """Blocks ready to run."""

    span: Span
    hidden_size: int
    backend: SpanBackend
    weights: str
    """Precision, as announced."""
    plan: str
    """What was put where, in one sentence for the operator."""
    adapters: tuple[AdapterInfo, ...]
    close: Callable[[], None]
    """Gives back what garbage collection would not: threads, processes, files."""
    kv_policy: str = FULL_CACHE.preset
    """Preset that sessions are kept by; `none` also where the one asked for can not be served."""
    kv_note: str = ""
    """What the operator should know about that, in a sentence or two; empty when there is nothing to say."""
    rules_hash: str = ""
    """Of all that decides what the policy keeps and how; empty where everything is kept."""
    footprint: Footprint | None = None
    """What compressed sequences take; None where there are none."""
    is_broken: Callable[[], bool] = _never
    """Whether the backend has lost a part of itself for good."""


def load_backend(
    source: ModelSource,
    span: Span,
    config: NodeConfig,
    workplace: Workplace,
    adapters: Sequence[AdapterSource],
    report: ProgressReporter | None,
) -> LoadedSpan:
    """Load and check blocks.

    Raises UnsupportedModelError when they would be served wrongly, BadInputError when the memory is too small or an
    adapter is for another model, ModelFilesError for files that can not be read.
    """
    import torch

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with ExitStack() as undo:
        if len(workplace.devices) == 1:
            loaded = _on_one_device(source, span, config, workplace, adapters, report, undo)
        else:
            loaded = _on_several_devices(source, span, config, workplace, adapters, report, undo)
        undo.pop_all()
    return loaded


def _on_one_device(
    source: ModelSource,
    span: Span,
    config: NodeConfig,
    workplace: Workplace,
    adapters: Sequence[AdapterSource],
    report: ProgressReporter | None,
    undo: ExitStack,
) -> LoadedSpan:
    from swarm.server.capacity_plan import spread_evenly
    from swarm.server.engine.choosing import choose_backend
    from swarm.server.engine.ragged import RaggedBackend
    from swarm.server.engine.rowwise import pack_matrices

    wish = make_wish(source, span, config.policy)
    plan = workplace.plan(source, span, config)
    close: Callable[[], None] = _nothing
    streamed: frozenset[int] = frozenset()
    streamer: BlockStreamer | None = None
    if plan.num_streamed:
        from swarm.models import offload

        streamed = frozenset(spread_evenly(plan.num_blocks, plan.num_streamed))
        streamer = offload.BlockStreamer(workplace.devices[0], where="disk" if workplace.is_cpu else "host")
        close = streamer.close
        undo.callback(close)
    model = _load_model(source, span, workplace, workplace.devices[0], report, streamer=streamer, streamed=streamed)
    if workplace.is_cpu and streamer is None:
        pack_matrices(model, for_compressing=wish is not None, reserved_bytes=plan.kv_bytes)
    found = load_adapters(model, adapters, num_blocks=source.num_blocks, report=report)
    chosen = choose_backend(model, memory_bytes=plan.kv_bytes, wish=wish)
    backend = chosen.backend
    layers = backend.policy_layers if isinstance(backend, RaggedBackend) else None
    if layers is not None:
        notes = (note_on_calibration(source, wish), _note_on_inputs(backend, layers))
        note = ". ".join(filter(None, notes))
    else:
        note = _note_on_fallback(config.policy, chosen.kv_problem or chosen.reason) if wish is not None else ""
    return LoadedSpan(
        span=span,
        hidden_size=model.hidden_size,
        backend=backend,
        weights=str(workplace.precision),
        plan=plan.sentence_for(backend.num_tokens_total) if wish is not None else plan.sentence,
        adapters=found,
        close=close,
        kv_policy=layers.policy.preset if layers is not None else FULL_CACHE.preset,
        kv_note=note,
        rules_hash=layers.rules_hash if layers is not None else "",
        footprint=layers.footprint if layers is not None else None,
    )


def make_wish(source: ModelSource, span: Span, policy: KVPolicy) -> PolicyWish | None:
    """What a server needs to compress by, None when it is not to; raises BadInputError for a damaged calibration."""
    from swarm.kvpolicy.calibration_file import find_calibration
    from swarm.models.source import default_cache_dir
    from swarm.server.policy_layers import PolicyWish

    if not policy.compresses:
        return None
    return PolicyWish(
        policy=policy,
        num_layers=source.num_blocks,
        first_layer=span.start,
        max_positions=source.max_positions or UNLIMITED_POSITIONS,
        calibration=find_calibration(source.model_hash, cache_dir=default_cache_dir()),
    )


def note_on_calibration(source: ModelSource, wish: PolicyWish | None) -> str:
    """That a measurement would help, where there is none."""
    if wish is None or wish.calibration is not None:
        return ""
    return (
        f"KV policy {wish.policy.preset} goes by defaults, because {source.name} was never measured; "
        f"`swarm calibrate {source.name} --text FILE` on every server gives better answers in the same memory"
    )


def _note_on_inputs(backend: SpanBackend, layers: PolicyLayers) -> str:
    """That long inputs do not fit, where the memory holds less than what is read before it is compressed."""
    from swarm.server.capacity_plan import note_on_inputs

    limit = backend.memory.longest_input(layers.footprint.max_positions) if backend.memory is not None else None
    if limit is None:
        return ""
    longest, enough_bytes = limit
    return note_on_inputs(layers.policy.preset, backend.kv_usage.total_bytes, f"{longest:,}", enough_bytes)


def _note_on_fallback(policy: KVPolicy, reason: str) -> str:
    return f"KV policy {policy.preset} can not be served, so caches are kept exactly (none): {reason}"


def _on_several_devices(
    source: ModelSource,
    span: Span,
    config: NodeConfig,
    workplace: Workplace,
    adapters: Sequence[AdapterSource],
    report: ProgressReporter | None,
    undo: ExitStack,
) -> LoadedSpan:
    """Slices of every matrix where the family can be cut so; else whole layers, some on each device."""
    from swarm.models.tensor_slices import refusal_of_slices
    from swarm.weights.choice import format_for

    if adapters:
        raise BadInputError("--adapter is not offered over several devices yet; name one with --device")
    in_few_bits = format_for(workplace.precision, workplace.devices[0]) is not None
    if in_few_bits or refusal_of_slices(source.config, len(workplace.devices)) is not None:
        return _in_a_row(source, span, config, workplace, report)
    from swarm.server.engine.tensor_parallel import SliceConfig, start_tensor_parallel
    from swarm.weights.choice import hidden_dtype_for

    plan = workplace.spread(source, span, config)
    backend = start_tensor_parallel(
        source,
        span,
        SliceConfig(
            devices=workplace.devices,
            dtype=hidden_dtype_for(workplace.precision, workplace.devices[0]),
            memory_bytes=sum(share.kv_bytes for share in plan.shares),
            num_threads=config.num_threads,
        ),
    )
    undo.callback(backend.close)
    return LoadedSpan(
        span=span,
        hidden_size=backend.model.hidden_size,
        backend=backend,
        weights=str(workplace.precision),
        plan=f"{', '.join(workplace.devices)} hold a slice of each of blocks {span}",
        adapters=(),
        close=backend.close,
        kv_note=_note_on_devices(config.policy),
        is_broken=lambda: backend.is_broken,
    )


def _in_a_row(
    source: ModelSource, span: Span, config: NodeConfig, workplace: Workplace, report: ProgressReporter | None
) -> LoadedSpan:
    from swarm.server.engine.chained import ChainedBackend, Stage
    from swarm.server.engine.choosing import choose_backend

    plan = workplace.spread(source, span, config)
    stages: list[Stage] = []
    hidden_size = 0
    for share in plan.shares:
        model = _load_model(source, share.span, workplace, share.device, report)
        hidden_size = model.hidden_size
        stages.append(Stage(share.span, choose_backend(model, memory_bytes=share.kv_bytes).backend))
    return LoadedSpan(
        span=span,
        hidden_size=hidden_size,
        backend=ChainedBackend(stages),
        weights=str(workplace.precision),
        plan=plan.sentence,
        adapters=(),
        close=_nothing,
        kv_note=_note_on_devices(config.policy),
    )


def _note_on_devices(policy: KVPolicy) -> str:
    return _note_on_fallback(policy, "several devices hold the blocks") if policy.compresses else ""


def _load_model(
    source: ModelSource,
    span: Span,
    workplace: Workplace,
    device: str,
    report: ProgressReporter | None,
    *,
    streamer: BlockStreamer | None = None,
    streamed: Collection[int] = (),
) -> SpanModel:
    """Blocks in `streamed` go to the streamer as they arrive, so they need not fit while they are loaded either."""
    from swarm.models import check_span, default_weight_cache, load_span

    def on_block(index: int, block: nn.Module) -> None:
        if streamer is not None and index in streamed:
            streamer.take(index, block)

    model = load_span(
        source,
        span,
        weights=workplace.precision,
        device=device,
        weight_cache=default_weight_cache(),
        double_quantised=workplace.double_quantised,
        on_block=on_block,
        report=report,
    )
    if streamer is not None:
        streamer.start()
    verdict = check_span(model)
    if not verdict.ok:
        raise UnsupportedModelError(f"{source.name} is not served: {verdict.reason}")
    return model
