"""Transformers models whose blocks live in a swarm: embeddings and head run here, everything between elsewhere."""

# Letters: B rows of a batch, T columns of a batch, N new tokens.

from __future__ import annotations

import copy
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn

import torch
from transformers import AutoModelForSequenceClassification, GenerationConfig, GenerationMixin, StoppingCriteriaList

from swarm.client.generation_cache import GenerationCache
from swarm.client.generation_hooks import PromptStreamer, WatchedCriteria, bounded_candidates
from swarm.client.generation_length import NewTokens, resolve_new_tokens
from swarm.client.generation_session import GenerationSession
from swarm.client.remote_base import RemoteModel
from swarm.client.token_columns import pad_left
from swarm.errors import BadInputError, LengthLimitError

__all__ = ["SwarmModelForCausalLM", "SwarmModelForSequenceClassification"]

_DEFAULT_SESSION_LENGTH = 2048
"""For models that state no context length."""

_current_cache: ContextVar[GenerationCache | None] = ContextVar("_current_cache", default=None)
"""The cache of the generate call under way in this thread."""


class SwarmModelForSequenceClassification(RemoteModel):
    """A transformers sequence classification model over remote blocks.

    A head that the checkpoint lacks is freshly initialised, to be trained.
    """

    _task_class = AutoModelForSequenceClassification


class SwarmModelForCausalLM(RemoteModel, GenerationMixin):
    """A transformers causal language model over remote blocks, with all of transformers' `generate`."""

    def session(self, max_length: int | None = None, batch_size: int = 1) -> GenerationSession:
        """A conversation that several `generate(..., session=session)` calls continue; use it in a `with` block.

        Args:
            max_length: tokens that each sequence may have; None for the model's context length.
            batch_size: number of sequences.

        Raises:
            LengthLimitError: more tokens than the model's context.
        """
        limit = self.source.max_positions
        if max_length is None:
            max_length = limit or _DEFAULT_SESSION_LENGTH
        if max_length < 1 or batch_size < 1:
            raise BadInputError(f"a session of {batch_size} sequences of {max_length} tokens holds nothing")
        if limit is not None and max_length > limit:
            raise LengthLimitError(
                f"a session of {max_length} tokens is longer than {self.source.name}'s context; ask for at most {limit}"
            )
        return GenerationSession(self.remote_blocks, max_length=max_length, batch_size=batch_size)

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        session: GenerationSession | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, with all its arguments (by keyword); token ids are those of the model run locally.

        Without `session` the servers' memory is freed when the call ends, however it ends.

        With `session` the call continues the session's history. `inputs` are then either the new tokens
        alone, or the whole history and new tokens after it: they count as whole where they begin with exactly
        the tokens that the session has sent. Either way only what has not been sent travels, logits processors
        and stop criteria see the whole history, and what is returned begins with `inputs`.

        Args:
            inputs: [B, T] int64 token ids, padded on the left; None in a session continues its history as it is.
            generation_config: as in transformers.
            session: from `session()`.
            **kwargs: as in transformers, for example max_new_tokens, do_sample, num_beams, streamer.

        Returns:
            [B, T + N] int64, or transformers' output object with `return_dict_in_generate`.

        Raises:
            LengthLimitError: longer than the model's context or the session, before anything is computed; or than any
                server's memory holds.
            BadInputError: arguments that a swarm can not serve.
            NoRouteError, DeadlineError, SessionClosedError: from the swarm.
        """
        given = _given_settings(kwargs, generation_config)
        self._check_settings(given, kwargs)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is not None and "input_ids" in kwargs:
            raise BadInputError("the prompt was given twice, as inputs and as input_ids")
        prompt = input_ids
        mask = kwargs.get("attention_mask")
        if mask is None and input_ids is not None:
            mask = self._infer_mask(input_ids, given)
        if session is not None:
            input_ids, prompt, mask = self._continue(session, input_ids, mask, given, kwargs)
            kwargs["attention_mask"] = mask
        if mask is not None and mask.ndim == 2 and not bool((mask[:, -1] != 0).all()):
            raise BadInputError(
                "a row of the batch ends with padding, so nothing can follow it; pad on the left"
                " (tokenizer.padding_side = 'left')"
            )
        num_tokens, num_columns = _count_prompt(input_ids, kwargs.get("inputs_embeds"), mask)
        limit, limit_name = self._limit(session)
        new_tokens = resolve_new_tokens(
            given,
            self.generation_config.to_dict(),
            num_tokens=num_tokens,
            num_columns=num_columns,
            limit=limit,
            limit_name=limit_name,
        )
        if new_tokens.is_capped:
            generation_config = self._cap(generation_config, kwargs, num_columns, new_tokens)
        if self._setting(given, "use_cache") is False:
            return super().generate(input_ids, generation_config, **kwargs)  # type: ignore[misc]
        if session is not None:
            cache = session.cache
            cache.begin_call()
        else:
            cache = GenerationCache(
                self.remote_blocks,
                max_length=num_tokens + max(new_tokens.count, 1),
                num_new_tokens=max(new_tokens.count, 1),
                limit=limit,
            )
        token = _current_cache.set(cache)
        try:
            result: Any = super().generate(input_ids, generation_config, past_key_values=cache, **kwargs)  # type: ignore[misc]
        finally:
            _current_cache.reset(token)
            if session is None:
                cache.close()
            else:
                cache.end_call()
        return result if session is None else _begin_with(prompt, result, num_columns)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: GenerationCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What transformers' generate gives to `forward`: the newest columns, without copies or masks."""
        kwargs.pop("labels", None)
        if inputs_embeds is not None and is_first_iteration:
            newest = inputs_embeds if next_sequence_length is None else inputs_embeds[:, -next_sequence_length:]
            kwargs["inputs_embeds"], kwargs["input_ids"] = newest, None
        else:
            newest = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
            kwargs["input_ids"] = newest
        position_ids = kwargs.get("position_ids")
        if position_ids is not None and position_ids.shape[-1] != newest.shape[1]:
            kwargs["position_ids"] = position_ids[..., -newest.shape[1] :]
        kwargs["attention_mask"] = attention_mask
        kwargs["past_key_values"] = past_key_values
        device = self.device
        if newest.device != device:
            kwargs = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()
            }
        return kwargs

    def _reorder_cache(self, past_key_values: GenerationCache, beam_idx: torch.Tensor) -> GenerationCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria: StoppingCriteriaList = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]
        cache = _current_cache.get()
        return criteria if cache is None else WatchedCriteria(criteria, cache)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator: Any = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        generation_config = kwargs["generation_config"]
        # Prompt lookup proposes tokens beyond the end, which transformers drops only after computing them.
        cache = _current_cache.get()
        generator.get_candidates = partial(
            bounded_candidates,
            generator.get_candidates,
            generation_config.max_length,
            _any_number if cache is None else cache.num_candidates,
        )
        return generator

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise BadInputError("continuous batching happens on the servers; call generate")

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise BadInputError("continuous batching happens on the servers; call generate")

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise BadInputError("continuous batching happens on the servers; call generate")

    def _check_settings(self, given: dict[str, Any], kwargs: dict[str, Any]) -> None:
        if given.get("cache_implementation") not in (None, "dynamic"):
            raise BadInputError(
                f"cache_implementation={given['cache_implementation']!r} is not for a swarm, whose servers choose how"
                " they keep their caches; leave it out"
            )
        if kwargs.pop("past_key_values", None) is not None:
            raise BadInputError("generate takes no past_key_values; use model.session() and give session=session")
        if isinstance(kwargs.get("assistant_model"), RemoteModel):
            raise BadInputError("an assistant must be faster than the model it helps; load it locally")

    def _infer_mask(self, input_ids: torch.Tensor, given: dict[str, Any]) -> torch.Tensor | None:
        """As transformers does: padding shows where the pad token is not also an end token."""
        pad_token_id, eos = (self._setting(given, name) for name in ("pad_token_id", "eos_token_id"))
        if pad_token_id is None or pad_token_id in (eos if isinstance(eos, list) else [eos]):
            return None
        mask = input_ids != pad_token_id
        return None if bool(mask.all()) else mask.long()

    def _setting(self, given: dict[str, Any], name: str) -> Any:
        value = given.get(name)
        return value if value is not None else getattr(self.generation_config, name, None)

    def _limit(self, session: GenerationSession | None) -> tuple[int | None, str]:
        if session is not None:
            return session.max_length, "the session"
        return self.source.max_positions, f"the context of {self.source.name}"

    def _cap(
        self,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
        num_columns: int,
        new_tokens: NewTokens,
    ) -> GenerationConfig | None:
        """Set the default that was too large to what fits."""
        defaults = self.generation_config
        if defaults.max_new_tokens is None and defaults.max_length is not None:
            name, value = "max_length", num_columns + new_tokens.count
        else:
            name, value = "max_new_tokens", new_tokens.count
        if generation_config is None:
            kwargs[name] = value
            return None
        generation_config = copy.deepcopy(generation_config)
        setattr(generation_config, name, value)
        return generation_config

    def _continue(
        self,
        session: GenerationSession,
        input_ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        given: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """History with new tokens [B, T], what the result is to begin with, and the mask of the former."""
        session.check_open()
        for name in ("num_beams", "num_return_sequences"):
            count = self._setting(given, name) or 1
            if count > 1:
                raise BadInputError(f"{name} is {count}, and a session continues one answer per sequence; use 1")
        if kwargs.get("inputs_embeds") is not None:
            raise BadInputError("a session keeps token ids; give input_ids instead of inputs_embeds")
        if self._setting(given, "use_cache") is False:
            raise BadInputError("a session is a cache; leave out use_cache=False")
        if input_ids is None:
            input_ids = torch.empty((session.batch_size, 0), dtype=torch.long, device=self.device)
            mask = None
        if mask is not None and mask.shape != input_ids.shape:
            raise BadInputError(
                f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}; give one number"
                " per token, for these tokens only"
            )
        rows = session.extend_history(input_ids, mask)
        pad_token_id = self._setting(given, "pad_token_id")
        whole, whole_mask = pad_left(rows, pad_token_id=pad_token_id or 0, device=input_ids.device)
        # Servers cut prompts themselves, and only they know where what was sent before ends.
        if self._setting(given, "prefill_chunk_size") is not None:
            kwargs["prefill_chunk_size"] = None
        streamer = kwargs.get("streamer")
        if streamer is not None:
            kwargs["streamer"] = PromptStreamer(streamer, input_ids)
        return whole, input_ids, whole_mask


def _any_number(num_columns: int) -> None:
    """Without a cache nothing is taken back."""


def _given_settings(kwargs: dict[str, Any], generation_config: GenerationConfig | None) -> dict[str, Any]:
    """Generation settings that the caller gives, by keyword or in a config; keywords win."""
    given = {} if generation_config is None else dict(vars(generation_config))
    given.update({name: value for name, value in kwargs.items() if value is not None})
    return given


def _count_prompt(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, mask: torch.Tensor | None
) -> tuple[int, int]:
    """(tokens of the longest row, columns)."""
    given = inputs_embeds if inputs_embeds is not None else input_ids
    if given is None:
        return 1, 1  # transformers begins with the beginning-of-text token
    num_columns = given.shape[1]
    if mask is None or mask.shape[1:] != (num_columns,):
        return num_columns, num_columns
    return int((mask != 0).sum(1).max()), num_columns


def _begin_with(prompt: torch.Tensor, result: Any, num_columns: int) -> Any:
    """Put `prompt` in the place of the first `num_columns` columns of the generated sequences."""
    if isinstance(result, torch.Tensor):
        return torch.cat([prompt.to(result.device), result[:, num_columns:]], dim=1)
    result["sequences"] = _begin_with(prompt, result.sequences, num_columns)
    return result
