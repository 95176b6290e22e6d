"""Runs a whole transformers model with an attention of our choosing: to record it, or over a compressed cache."""

# Letters: t new tokens, Hq query heads, Hk KV heads, D, Dv head dimensions, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from swarm.errors import UnsupportedModelError
from swarm.kvpolicy.layers import ModelShape
from swarm.kvpolicy.reference_cache import ReferenceCache
from swarm.kvpolicy.streaming import cut_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swarm.kvpolicy.settings import KVPolicy
    from swarm.models.source import ModelSource

__all__ = [
    "AttentionCall",
    "FullCache",
    "ReferenceModel",
    "attend_causally",
    "cache_attention",
    "load_reference_model",
    "wrap_model",
]

ATTENTION_NAME: Final = "swarm_kv_reference"


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What one layer hands to its attention."""

    layer: int
    queries: torch.Tensor
    """[Hq, t, D], rotated."""
    keys: torch.Tensor
    """[Hk, t, D], rotated."""
    values: torch.Tensor
    """[Hk, t, Dv]"""
    hidden: torch.Tensor
    """[t, hidden size], input of the attention module."""
    scaling: float
    window: int
    """Positions a query sees, itself included; 0 for all."""
    softcap: float | None
    sink_scores: torch.Tensor | None
    """[Hq]"""


Attend = Callable[[AttentionCall], torch.Tensor]
"""To outputs [Hq, t, Dv]."""

_attend: ContextVar[Attend | None] = ContextVar("swarm_kv_reference", default=None)
_HIDDEN_NAME: Final = "_swarm_attention_input"


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature, [1, H, t, D] to [1, t, Hq, Dv]."""
    attend = _attend.get()
    assert attend is not None, "the model is run through ReferenceModel.run"
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    layer: Any = module.layer_idx
    call = AttentionCall(
        layer=int(layer),
        queries=query[0],
        keys=key[0],
        values=value[0],
        hidden=getattr(module, _HIDDEN_NAME),
        scaling=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=window or 0,
        softcap=softcap,
        sink_scores=s_aux,
    )
    return attend(call).transpose(0, 1).unsqueeze(0), None


def _remember_input(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if isinstance(hidden, torch.Tensor):
        # Not an attribute of the module proper: that would register nothing, but copy and compare slowly.
        module.__dict__[_HIDDEN_NAME] = hidden[0]


class FullCache:
    """Every key and value in the model's own precision: what compressed caches are measured against."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        """[Hk, n, D] by layer"""
        self.values: dict[int, torch.Tensor] = {}
        self._positions = 0

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Append and attend."""
        keys, values = call.keys, call.values
        if call.layer in self.keys:
            keys = torch.cat((self.keys[call.layer], keys), dim=1)
            values = torch.cat((self.values[call.layer], values), dim=1)
        self.keys[call.layer], self.values[call.layer] = keys, values
        return attend_causally(call, keys, values)

    def cut(self, length: int) -> None:
        """Forget what comes after the first `length` positions."""
        for layer in self.keys:
            self.keys[layer] = self.keys[layer][:, :length]
            self.values[layer] = self.values[layer][:, :length]


def attend_causally(call: AttentionCall, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The new tokens' queries over keys [Hk, n, D] whose last t are the new tokens' own: [Hq, t, Dv]."""
    num_new, num_keys = call.queries.shape[1], keys.shape[1]
    first = num_keys - num_new
    mask = torch.ones(num_new, num_keys, dtype=torch.bool).tril(first)
    if call.window:
        mask &= torch.ones(num_new, num_keys, dtype=torch.bool).triu(first - call.window + 1)
    if call.softcap is None and call.sink_scores is None:
        return scaled_dot_product_attention(
            call.queries[None], keys[None], values[None], attn_mask=mask, scale=call.scaling, enable_gqa=True
        )[0]
    group = len(call.queries) // len(keys)
    scores = torch.matmul(call.queries, keys.repeat_interleave(group, dim=0).transpose(1, 2)) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if call.sink_scores is not None:
        scores = torch.cat((scores, call.sink_scores[:, None, None].expand(-1, num_new, 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., :num_keys]
    return torch.matmul(weights, values.repeat_interleave(group, dim=0))


class ReferenceModel:
    """A causal LM of transformers, one sequence at a time, with the attention handed in at every call."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model` must have been loaded with `attn_implementation=ATTENTION_NAME`; gets hooks.

        Raises:
            UnsupportedModelError: its attention does not go through transformers' AttentionInterface.
        """
        self.model = model.eval()
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.register_forward_pre_hook(_remember_input, with_kwargs=True)
        self.shape = self._probe()

    def _probe(self) -> ModelShape:
        calls: dict[int, AttentionCall] = {}

        def record(call: AttentionCall) -> torch.Tensor:
            calls[call.layer] = call
            return attend_causally(call, call.keys, call.values)

        try:
            with torch.no_grad():
                self.run([0, 0], 0, record)
        except AssertionError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"the attention of {self.model.config.model_type} can not be replaced ({error}); use --kv none"
            ) from error
        config: Any = self.model.config.get_text_config(decoder=True)
        shapes = {(call.keys.shape[0], call.keys.shape[2], call.values.shape[2]) for call in calls.values()}
        if len(calls) != config.num_hidden_layers or len(shapes) != 1:
            raise UnsupportedModelError(
                f"{self.model.config.model_type} has layers without keys and values of their own, or of different"
                " shapes, which KV compression does not cover; use --kv none"
            )
        num_kv_heads, key_dim, value_dim = shapes.pop()
        return ModelShape(
            num_layers=len(calls),
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            windows={layer: call.window for layer, call in calls.items() if call.window},
        )

    def run(
        self, token_ids: Sequence[int], start: int, attend: Attend, *, positions: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Logits [t, V] float32 of tokens at absolute positions from `start` on (or at `positions`)."""
        return self.head(self.run_hidden(token_ids, start, attend, positions=positions))

    def run_hidden(
        self, token_ids: Sequence[int], start: int, attend: Attend, *, positions: Sequence[int] | None = None
    ) -> torch.Tensor:
        """As `run`, but the decoder's output [t, hidden size] before the head."""
        places = list(positions) if positions is not None else list(range(start, start + len(token_ids)))
        token = _attend.set(attend)
        try:
            decoder: Any = self.model.base_model
            output = decoder(
                input_ids=torch.tensor([list(token_ids)]), position_ids=torch.tensor([places]), use_cache=False
            )
        finally:
            _attend.reset(token)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [t, V] float32 of decoder outputs [t, hidden size]."""
        head: Any = self.model.get_output_embeddings()
        logits: torch.Tensor = head(hidden).float()
        softcap = getattr(self.model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    def step(
        self,
        cache: ReferenceCache,
        policy: KVPolicy,
        token_ids: Sequence[int],
        start: int,
        *,
        is_unfinished: bool = False,
    ) -> torch.Tensor:
        """One step over a compressed cache, cut and compressed as the policy says: decoder outputs [t, hidden size].

        Args:
            is_unfinished: whether more tokens of the same input follow in a later step.
        """
        outputs = []
        position, end = start, start + len(token_ids)
        for count in cut_step(policy, start, len(token_ids)):
            part = token_ids[position - start : position - start + count]
            position += count
            attend = cache_attention(cache, is_unfinished=is_unfinished or position < end)
            outputs.append(self.run_hidden(part, position - count, attend))
        return torch.cat(outputs)


def cache_attention(cache: ReferenceCache, *, is_unfinished: bool = False) -> Attend:
    """Attention over a compressed cache; of an input of which more follows, or the whole of one or its end."""

    def attend(call: AttentionCall) -> torch.Tensor:
        return cache.attend(
            call.layer,
            call.queries,
            call.keys,
            call.values,
            call.hidden,
            scaling=call.scaling,
            softcap=call.softcap,
            sink_scores=call.sink_scores,
            is_unfinished=is_unfinished,
        )

    return attend


def load_reference_model(source: ModelSource) -> ReferenceModel:
    """A whole model in float32 on the CPU.

    Raises:
        UnsupportedModelError: transformers has no causal LM for it, or its attention can not be replaced.
        ModelFilesError: its files are damaged or missing.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION_NAME, _attention)
    source.ensure_tensors()
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=torch.float32, attn_implementation=ATTENTION_NAME, local_files_only=True
    )
    return ReferenceModel(model)


def wrap_model(model: PreTrainedModel) -> ReferenceModel:
    """A model that is in memory already."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)
    model.set_attn_implementation(ATTENTION_NAME)
    return ReferenceModel(model)
