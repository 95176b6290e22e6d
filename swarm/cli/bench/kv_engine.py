"""Measures a KV policy in the real engine: decoding steps beside exact sessions, bytes of pages, codes found.

Exact sessions stand in a backend as a server of `none` has it, compressed ones in one as a server of the policy has it;
both are in one process and take turns, so that what else the machine does strikes both. Eight sessions are copies of
one, page by page: their pages are their own, as those of strangers are.
"""

# Letters: n tokens of a context, H hidden size, t new tokens.

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from swarm.cli.bench.kv_figures import KVFigures
from swarm.cli.bench.kv_methods import Method
from swarm.cli.bench.kv_record import EngineScores, ScoreRecord, name_case
from swarm.cli.bench.kv_texts import HiddenCodes
from swarm.datatypes import Span
from swarm.errors import PeerBusyError, UnsupportedModelError
from swarm.kvpolicy.settings import FULL_CACHE, PRESETS
from swarm.models import load_span
from swarm.models.adapters.rows import NO_ADAPTER
from swarm.server.engine.choosing import choose_backend
from swarm.server.engine.engine import NotNow
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.rowwise import pack_matrices
from swarm.server.engine.work import SessionKey, StepWork
from swarm.server.policy_layers import PolicyWish
from swarm.server.session_mirror import SequenceStep

if TYPE_CHECKING:
    import numpy.typing as npt

    from swarm.kvpolicy.calibration_file import Calibration
    from swarm.kvpolicy.reference_model import ReferenceModel
    from swarm.kvpolicy.settings import KVPolicy
    from swarm.models import SpanModel
    from swarm.models.progress import ProgressReporter
    from swarm.models.source import ModelSource

__all__ = ["NUM_SESSIONS", "EngineBench", "measure_engine"]

logger = logging.getLogger(__name__)

NUM_SESSIONS: Final = 8
_PART_TOKENS: Final = 512
_ROUNDS: Final = 48
"""Three times as many as tokens between two events."""


class EngineBench:
    """A whole model in one engine that serves one policy."""

    def __init__(
        self,
        source: ModelSource,
        policy: KVPolicy,
        calibration: Calibration | None,
        embed: Callable[[Sequence[int]], torch.Tensor],
        *,
        context_tokens: int,
    ) -> None:
        """Load it.

        Args:
            embed: hidden states [t, H] that the first block gets for some tokens.

        Raises:
            UnsupportedModelError: the engine does not serve the policy for this model; the message says why.
        """
        self._span = Span(start=0, end=source.num_blocks)
        model = self._load(source, for_compressing=True)
        wish = PolicyWish(
            policy=policy,
            num_layers=source.num_blocks,
            first_layer=0,
            max_positions=source.max_positions or 2 * context_tokens,
            calibration=calibration,
        )
        # Room for more than the exact sessions there will be; the system backs only what is touched.
        probe = model.config.get_text_config(decoder=True)
        head_dim = getattr(probe, "head_dim", None) or probe.hidden_size // probe.num_attention_heads
        token_bytes = 2 * 4 * source.num_blocks * probe.num_key_value_heads * head_dim
        memory_bytes = 2 * (NUM_SESSIONS + 1) * (context_tokens + 2 * _ROUNDS + 64) * token_bytes
        chosen = choose_backend(model, memory_bytes=memory_bytes, wish=wish)
        if not isinstance(chosen.backend, RaggedBackend) or chosen.kv_problem:
            raise UnsupportedModelError(chosen.kv_problem or chosen.reason)
        self._compressing = chosen.backend
        self._exact = RaggedBackend(self._load(source, for_compressing=False), memory_bytes=memory_bytes)
        self._policy = policy
        self._embed = embed
        self._full_token_bytes = token_bytes // 2

    def _load(self, source: ModelSource, *, for_compressing: bool) -> SpanModel:
        model = load_span(source, self._span, device="cpu", dtype=torch.float32)
        pack_matrices(model, for_compressing=for_compressing, reserved_bytes=0)
        return model

    def measure(self, context: Sequence[int], report: ProgressReporter) -> EngineScores:
        """Steps after a context and the pages that hold it."""
        exact, compressed = self._names("exact"), self._names("compressed")
        report.start("Timing the engine", 2 * len(context), "tokens")
        self._read(compressed[0], context, compresses=True, report=report)
        for name in compressed[1:]:
            self._copy(compressed[0], name, len(context), compresses=True)
        self._compressing.memory.update_free()
        used_bytes = self._compressing.kv_usage.used_bytes
        self._read(exact[0], context, compresses=False, report=report)
        for name in exact[1:]:
            self._copy(exact[0], name, len(context), compresses=False)
        times: dict[tuple[bool, int], list[tuple[bool, float]]] = {}
        hidden = self._embed([context[-1]])
        lengths = dict.fromkeys([*exact, *compressed], len(context))
        for _ in range(_ROUNDS):
            for num_sessions in (1, NUM_SESSIONS):
                for names, compresses in ((exact, False), (compressed, True)):
                    chosen = names[:num_sessions] if num_sessions > 1 else names[-1:]
                    works = [self._work(name, hidden, lengths[name], compresses=compresses) for name in chosen]
                    is_event = any(self._has_event(lengths[name]) for name in chosen)
                    begin_s = time.perf_counter()
                    self._run(works)
                    step_s = time.perf_counter() - begin_s
                    times.setdefault((compresses, num_sessions), []).append((is_event, step_s))
                    for name in chosen:
                        lengths[name] += 1
        for backend, names in ((self._exact, exact), (self._compressing, compressed)):
            for name in names:
                backend.forget(name)
        report.finish()
        num_tokens = NUM_SESSIONS * len(context)
        return EngineScores(
            none_step_ms=1000 * self._typical(times[False, 1]),
            step_ms=1000 * self._typical(times[True, 1]),
            none_step_ms_8_sessions=1000 * self._typical(times[False, NUM_SESSIONS]),
            step_ms_8_sessions=1000 * self._typical(times[True, NUM_SESSIONS]),
            kv_ratio=used_bytes / (num_tokens * self._full_token_bytes),
        )

    def ask(self, codes: HiddenCodes, head: Callable[[torch.Tensor], torch.Tensor], report: ProgressReporter) -> float:
        """Share of digits that are predicted; all questions are forks of one compressed context.

        Args:
            head: logits of what the last block gives, [t, H] to [t, V].
        """
        name = (b"codes", 1)
        report.start("Asking through the engine", len(codes.context), "tokens")
        self._read(name, codes.context, compresses=True, report=report)
        items: list[SequenceStep] = []
        token_ids: list[int] = []
        places: list[int] = []
        for index, (question, answer) in enumerate(zip(codes.questions, codes.answers, strict=True)):
            items.append(SequenceStep(index + 1, 0, len(codes.context), len(question) + len(answer)))
            places += [len(token_ids) + len(question) - 1 + digit for digit in range(len(answer))]
            token_ids += [*question, *answer]
        work = StepWork(name, self._span, items, self._embed(token_ids), _ignore, compresses=True)
        (output,) = self._run([work])
        self._compressing.forget(name)
        report.finish()
        guesses = head(output[torch.tensor(places)]).argmax(dim=-1)
        right = guesses == torch.tensor([token for answer in codes.answers for token in answer])
        return float(right.float().mean())

    def _names(self, kind: str) -> list[SessionKey]:
        return [(f"{kind}{index}".encode(), 1) for index in range(NUM_SESSIONS)]

    def _has_event(self, length: int) -> bool:
        """Whether compression was due at a length, and so is done by the step that begins there."""
        return self._policy.compresses and (length - self._policy.num_sinks) % self._policy.block_tokens == 0

    def _typical(self, times: Sequence[tuple[bool, float]]) -> float:
        """Mean step, from medians of steps with and without an event, as often as each comes."""
        plain = statistics.median([step_s for is_event, step_s in times if not is_event])
        events = [step_s for is_event, step_s in times if is_event]
        share = 1 / self._policy.block_tokens
        return plain * (1 - share) + share * (statistics.median(events) if events else plain)

    def _work(self, name: SessionKey, hidden: torch.Tensor, start: int, *, compresses: bool) -> StepWork:
        item = SequenceStep(0, 0, start, len(hidden))
        return StepWork(name, self._span, [item], hidden, _ignore, compresses=compresses)

    def _read(self, name: SessionKey, context: Sequence[int], *, compresses: bool, report: ProgressReporter) -> None:
        """One input, in several parts."""
        for start in range(0, len(context), _PART_TOKENS):
            part = context[start : start + _PART_TOKENS]
            is_unfinished = start + len(part) < len(context)
            item = SequenceStep(0, 0, start, len(part), is_unfinished=is_unfinished)
            work = StepWork(name, self._span, [item], self._embed(part), _ignore, compresses=compresses)
            self._run([work])
            report.advance(len(part))

    def _backend_of(self, *, compresses: bool) -> RaggedBackend:
        return self._compressing if compresses else self._exact

    def _run(self, works: list[StepWork]) -> list[torch.Tensor]:
        outputs = []
        for result in self._backend_of(compresses=works[0].compresses).run_steps(works):
            if isinstance(result, BaseException):
                raise result
            if isinstance(result, NotNow):
                raise PeerBusyError(f"the KV memory is too small for this benchmark ({result.reason})")
            outputs.append(result)
        return outputs

    def _copy(self, source: SessionKey, target: SessionKey, length: int, *, compresses: bool) -> None:
        """A session with pages of its own and the same content."""
        backend = self._backend_of(compresses=compresses)
        store, memory = backend.store, backend.memory
        held, _ = memory.held_pages(source, [length])
        pages = np.unique(np.concatenate([part.ravel() for each in held.values() for part in each.page_lists()]))
        copies = np.array(store.pool.allocate(len(pages)), dtype=np.int64)
        store.load_pages(copies, store.save_pages(pages))

        def renumber(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return copies[np.searchsorted(pages, numbers)]

        moved = {sequence: each.map_pages(renumber) for sequence, each in held.items()}
        memory.add_session(target, self._span, moved, adapter=NO_ADAPTER, compresses=compresses)
        store.pool.release(copies)


def measure_engine(
    source: ModelSource,
    reference: ReferenceModel,
    figures: Sequence[KVFigures],
    methods: Sequence[Method],
    calibration: Calibration | None,
    *,
    context: Sequence[int],
    codes: Sequence[HiddenCodes],
    full_digits: Sequence[float],
    record: ScoreRecord,
    report: ProgressReporter,
) -> list[KVFigures]:
    """The same figures with those of the engine, for every policy that servers offer.

    Args:
        reference: the same model; lends its embeddings and its head.
        methods: of the figures, by name.
        full_digits: share of the digits of `codes` that the full cache finds.
        record: what it holds is not measured again.
    """

    def embed(token_ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            hidden: torch.Tensor = reference.model.get_input_embeddings()(torch.tensor(list(token_ids)))
        return hidden

    def finish(hidden: torch.Tensor) -> torch.Tensor:
        """Logits of what the last block gives: a model without blocks is its final norm and its head."""
        decoder: Any = reference.model.base_model
        layers, decoder.layers = decoder.layers, torch.nn.ModuleList()
        try:
            with torch.no_grad():
                output = decoder(inputs_embeds=hidden[None], use_cache=False)
        finally:
            decoder.layers = layers
        return reference.head(output.last_hidden_state[0])

    fingerprints = {method.name: method.fingerprint for method in methods}
    done = []
    for each in figures:
        if each.policy not in PRESETS or each.policy == FULL_CACHE.preset:
            done.append(each)
            continue
        asked = [token for text in codes for token in text.context]
        case = name_case("engine", [*context, *asked], [_ROUNDS])
        scores = record.find(case, fingerprints[each.policy])
        if not isinstance(scores, EngineScores):
            policy = PRESETS[each.policy]
            try:
                bench = EngineBench(source, policy, calibration, embed, context_tokens=len(context))
            except UnsupportedModelError as error:
                logger.warning("the engine is not measured under %s: %s", each.policy, error)
                done.append(each)
                continue
            scores = bench.measure(context, report)
            if codes:
                with torch.no_grad():
                    found = [bench.ask(text, finish, report) for text in codes]
                scores = replace(scores, digits=sum(found) / len(found))
            record.add(case, fingerprints[each.policy], scores)
        retrieval = None
        if scores.digits is not None:
            retrieval = scores.digits * len(full_digits) / max(sum(full_digits), 1e-9)
        done.append(
            replace(
                each,
                step_time_ratio=scores.step_ms / scores.none_step_ms,
                step_time_ratio_8_sessions=scores.step_ms_8_sessions / scores.none_step_ms_8_sessions,
                engine_kv_ratio=scores.kv_ratio,
                engine_retrieval_ratio=retrieval,
            )
        )
    return done


def _ignore(output: torch.Tensor | None, error: BaseException | None) -> None:
    """The backend is called directly, so nobody waits."""
