"""What remote models of every task share: transformers' own model, with the swarm in the place of its blocks."""

# Letters: B rows of a batch, T columns of a batch, H hidden size.

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from transformers.utils.generic import ModelOutput

from swarm.client.block_pass import BlockPass, SessionPass, StatelessPass, current_pass
from swarm.client.blocks import RemoteBlocks
from swarm.client.cache_plan import CachePlan
from swarm.client.config import ClientConfig
from swarm.client.generation_cache import GenerationCache
from swarm.client.remote_layer import RemoteLayer
from swarm.client.token_columns import Columns, check_consecutive, count_tokens, real_columns
from swarm.errors import BadInputError, LengthLimitError
from swarm.models.client_model import NO_MASK_ATTENTION, load_client_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swarm.models import ModelSource, ProgressReporter

    _Base = PreTrainedModel
else:
    _Base = object  # the real base is known only when a model is loaded

__all__ = ["RemoteModel"]

_NOT_AVAILABLE = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Outputs of single blocks, which stay where the blocks are."""


class RemoteModel(_Base):
    """A transformers model whose blocks live in a swarm; the classes of each task build on it.

    Mixed into transformers' own class of the model, so everything outside the blocks is theirs:
    embeddings, final norm, head, loss. Parameters are trainable, as in transformers.
    """

    _task_class: ClassVar[Any] = None
    """Transformers' auto class of the task; None for causal language models."""
    _hf_parameters: ClassVar[frozenset[str]] = frozenset()
    """What the forward of transformers' own class takes."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str,
        initial_peers: Sequence[str] | str = (),
        *,
        dtype: torch.dtype | str = torch.float32,
        client_config: ClientConfig | None = None,
        report: ProgressReporter | None = None,
        num_labels: int | None = None,
        **options: Any,
    ) -> Self:
        """Join a swarm and load the client's part of a model.

        Args:
            name: built-in model, local folder or Hugging Face id.
            initial_peers: addresses to join at, as `swarm serve` and `swarm bootstrap` print them.
            dtype: of embeddings, head and the hidden states between them and the swarm.
            client_config: the client's settings.
            report: told about downloads and conversions.
            num_labels: classes of a sequence classification head.
            **options: single settings of ClientConfig, over those in `client_config`.

        Raises:
            ModelNotFoundError, ModelFilesError, UnsupportedModelError, DownloadError: about the model.
            JoinError: nobody answers at the addresses.
            BadInputError: an unknown option or dtype.
        """
        dtype = _as_dtype(dtype)
        client_config = _merge_options(client_config or ClientConfig(), options)
        peers = [initial_peers] if isinstance(initial_peers, str) else list(initial_peers)
        if not peers:
            raise BadInputError("give initial_peers, the addresses that `swarm serve` and `swarm bootstrap` print")
        from swarm.client.connection import connect
        from swarm.models import resolve_model

        source = resolve_model(name, report=report)
        blocks = connect(
            model_hash=source.model_hash,
            model_name=source.name,
            num_blocks=source.num_blocks,
            initial_peers=peers,
            config=client_config,
        )
        try:
            return cls.from_blocks(source, blocks, dtype=dtype, report=report, num_labels=num_labels)
        except BaseException:
            blocks.close()
            raise

    @classmethod
    def from_blocks(
        cls,
        source: ModelSource,
        blocks: RemoteBlocks,
        *,
        dtype: torch.dtype | str = torch.float32,
        report: ProgressReporter | None = None,
        num_labels: int | None = None,
    ) -> Self:
        """The client's part of a model over blocks that are at hand already; closing the model closes them."""
        extra = {} if cls._task_class is None else {"auto_class": cls._task_class}
        if num_labels is not None:
            head_config = copy.deepcopy(source.config)
            head_config.num_labels = num_labels
            source = dataclasses.replace(source, config=head_config)
        model: Any = load_client_parts(source, dtype=_as_dtype(dtype), make_layer=RemoteLayer, report=report, **extra)
        hf_class = type(model)
        # transformers looks up features of a class in the source of its module.
        namespace = {"__module__": hf_class.__module__, "_hf_parameters": _named_parameters(hf_class)}
        model.__class__ = type(f"Swarm{hf_class.__name__}", (cls, hf_class), namespace)
        model._attach(source, blocks)
        remote: Self = model
        return remote

    def _attach(self, source: ModelSource, blocks: RemoteBlocks) -> None:
        self.source = source
        self.remote_blocks = blocks
        config: Any = self.config
        # Under a name without a mask function no masks are built; nobody would look at them.
        config._attn_implementation_internal = NO_MASK_ATTENTION
        for name in _NOT_AVAILABLE:
            # A checkpoint's default gives way; only what a caller asks for is refused.
            if getattr(config, name, False):
                setattr(config, name, False)
        generation_config: Any = getattr(self, "generation_config", None)
        if generation_config is not None:
            generation_config.cache_implementation = None  # likewise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all sessions and connections; harmless when repeated."""
        self.remote_blocks.close()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; only tokens that the mask shows travel.

        Without `past_key_values` whole sequences run at once, leave nothing behind, and are
        differentiable through the remote blocks. At padding logits are finite but mean nothing.

        Args:
            input_ids: [B, T] int64; or give `inputs_embeds`.
            attention_mask: [B, T] (with a cache also [B, columns so far + T]), nonzero for tokens.
            position_ids: [B or 1, T] int64, rising by one from token to token.
            past_key_values: `session.cache`, to append to a session.
            inputs_embeds: [B, T, H].
            labels: as the model's loss takes them.
            use_cache: ignored; state is kept only with `past_key_values`.
            logits_to_keep: how many last columns need logits; 0 for all.
            **kwargs: for transformers' forward.

        Raises:
            BadInputError: a foreign cache, or outputs that a swarm does not have.
            LengthLimitError: more tokens than the model's context, before anything is sent.
            NoRouteError, DeadlineError, SessionClosedError: from the swarm.
        """
        for name in _NOT_AVAILABLE:
            if kwargs.get(name):
                raise BadInputError(f"{name} is not available: a swarm returns only what its last block puts out")
        block_pass: BlockPass
        if past_key_values is None:
            columns = self._stateless_columns(input_ids, inputs_embeds, attention_mask, position_ids)
            block_pass = StatelessPass(self.remote_blocks, columns)
        elif isinstance(past_key_values, GenerationCache):
            num_outputs = logits_to_keep if isinstance(logits_to_keep, int) else 0
            plan = _plan(past_key_values, input_ids, inputs_embeds, attention_mask, num_outputs)
            unneeded = 0
            if plan.is_replay:
                if position_ids is not None:
                    plan.check_positions(position_ids)
                unneeded = plan.leave_out_sent(num_outputs)
            if unneeded:
                input_ids = None if input_ids is None else input_ids[:, unneeded:]
                inputs_embeds = None if inputs_embeds is None else inputs_embeds[:, unneeded:]
                position_ids = None if position_ids is None else position_ids[:, unneeded:]
            if position_ids is None and (unneeded or not plan.is_replay):
                position_ids = plan.positions(self.device)[:, : plan.num_columns - unneeded]
            block_pass = SessionPass(past_key_values, plan, token_ids=input_ids, num_outputs=num_outputs)
        else:
            raise BadInputError(
                f"a {type(past_key_values).__name__} can not hold a swarm's state; use model.session() and give"
                " session=session to generate, or past_key_values=session.cache"
            )
        if position_ids is not None and "position_ids" in self._hf_parameters:
            kwargs["position_ids"] = position_ids
        if "logits_to_keep" in self._hf_parameters:
            kwargs["logits_to_keep"] = logits_to_keep
        token = current_pass.set(block_pass)
        try:
            # No mask: which tokens are real is settled, and attention happens elsewhere.
            outputs = super().forward(
                input_ids=input_ids, inputs_embeds=inputs_embeds, labels=labels, use_cache=False, **kwargs
            )
        finally:
            current_pass.reset(token)
        if past_key_values is not None and isinstance(outputs, ModelOutput):
            outputs["past_key_values"] = past_key_values
        return outputs

    def _stateless_columns(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> list[Columns]:
        num_rows, num_columns = _shape_of(input_ids, inputs_embeds)
        if attention_mask is not None and attention_mask.shape != (num_rows, num_columns):
            raise BadInputError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, the tokens {(num_rows, num_columns)}; give"
                " one number per token"
            )
        columns = real_columns(attention_mask, num_rows, num_columns)
        check_consecutive(columns, position_ids)
        longest, limit = max(map(count_tokens, columns), default=0), self.source.max_positions
        if limit is not None and longest > limit:
            raise LengthLimitError(
                f"a sequence has {longest} tokens, and {self.source.name} holds {limit}; shorten it or split it"
            )
        return columns


def _merge_options(config: ClientConfig, options: dict[str, Any]) -> ClientConfig:
    known = [field.name for field in dataclasses.fields(ClientConfig)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise BadInputError(f"there is no client setting {unknown[0]}; there are {', '.join(known)}")
    try:
        return dataclasses.replace(config, **options)
    except ValueError as error:
        raise BadInputError(str(error)) from error


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BadInputError(f"{dtype} is not a dtype for hidden states; give torch.float32 or torch.bfloat16")
    return found


def _named_parameters(hf_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(hf_class.forward).parameters)  # type: ignore[attr-defined]


def _shape_of(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> tuple[int, int]:
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise BadInputError("give either input_ids or inputs_embeds")
    name, shape = (
        ("input_ids", "batch, tokens") if input_ids is not None else ("inputs_embeds", "batch, tokens, hidden")
    )
    if given.ndim != shape.count(",") + 1:
        raise BadInputError(f"{name} must have shape [{shape}], and these have {list(given.shape)}")
    return given.shape[0], given.shape[1]


def _plan(
    cache: GenerationCache,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    num_outputs: int,
) -> CachePlan:
    num_rows, num_columns = _shape_of(input_ids, inputs_embeds)
    if input_ids is None and cache.keeps_token_ids:
        raise BadInputError("a session keeps token ids; give input_ids instead of inputs_embeds")
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] < num_columns):
        raise BadInputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; give one number per token, [batch, tokens]"
        )
    return cache.plan(num_rows=num_rows, num_columns=num_columns, mask=attention_mask, num_outputs=num_outputs)
