"""Measures what ways of keeping a context cost in quality: what follows under each, against the full cache.

Every context is read once with a full cache; each method is given that reading and compresses it before it sees what
follows. What follows comes in small steps, so that compression goes on as in a long answer.
"""

# Letters: t new tokens, V vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from swarm.cli.bench.kv_asking import ask, peek_at
from swarm.cli.bench.kv_methods import KeptContext, Method, Reading, keep_full, read
from swarm.cli.bench.kv_record import CodeScores, DocumentScores, ScoreRecord, name_case
from swarm.cli.bench.kv_texts import Document, HiddenCodes
from swarm.kvpolicy.reference_model import ReferenceModel
from swarm.kvpolicy.settings import FULL_CACHE

if TYPE_CHECKING:
    from swarm.models.progress import ProgressReporter

__all__ = ["FULL", "measure_codes", "measure_documents", "steps_of_an_answer"]

FULL: Final = "full"
"""The full cache's own fingerprint."""


def measure_documents(
    model: ReferenceModel,
    methods: Sequence[Method],
    documents: Sequence[Document],
    record: ScoreRecord,
    *,
    greedy_tokens: int,
    report: ProgressReporter,
) -> dict[str, list[DocumentScores]]:
    """Scores of every document by method name, and those of the full cache by FULL.

    Args:
        record: what it holds is not measured again.
        greedy_tokens: of the full cache's own answer, along which methods are judged token by token; 0 for none.
    """
    scores: dict[str, list[DocumentScores]] = {name: [] for name in (FULL, *(method.name for method in methods))}
    total = sum(len(each.context) + len(each.continuation) * (len(methods) + 1) for each in documents)
    report.start("Continuing texts", total, "tokens")
    for document in documents:
        case = name_case("document", [*document.context, *document.continuation], [greedy_tokens])
        judge = _DocumentJudge(model, document, greedy_tokens, report)
        for name, fingerprint, method in _with_full(methods):
            known = record.find(case, fingerprint)
            if not isinstance(known, DocumentScores):
                known = judge.judge(method)
                record.add(case, fingerprint, known)
            scores[name].append(known)
            report.advance(len(document.continuation))
        if judge.is_idle:
            report.advance(len(document.context))
    report.finish()
    return scores


def measure_codes(
    model: ReferenceModel,
    methods: Sequence[Method],
    texts: Sequence[HiddenCodes],
    record: ScoreRecord,
    *,
    report: ProgressReporter,
) -> dict[str, list[CodeScores]]:
    """Likewise, of texts with hidden codes."""
    scores: dict[str, list[CodeScores]] = {name: [] for name in (FULL, *(method.name for method in methods))}
    asked = [sum(map(len, [*text.questions, *text.answers])) for text in texts]
    total = sum(len(text.context) + count * (len(methods) + 1) for text, count in zip(texts, asked, strict=True))
    report.start("Asking for codes", total, "tokens")
    for text, num_asked in zip(texts, asked, strict=True):
        joined = [token for part in [*text.questions, *text.answers] for token in part]
        case = name_case("codes", [*text.context, *joined], [])
        reading: Reading | None = None
        for name, fingerprint, method in _with_full(methods):
            known = record.find(case, fingerprint)
            if not isinstance(known, CodeScores):
                with torch.no_grad():
                    reading = reading or read(model, text.context, report)
                    kept = method.keep(reading) if method is not None else keep_full(reading)
                    known = ask(model, text, peek_at(kept))
                record.add(case, fingerprint, known)
            scores[name].append(known)
            report.advance(num_asked)
        if reading is None:
            report.advance(len(text.context))
    report.finish()
    return scores


def _with_full(methods: Sequence[Method]) -> list[tuple[str, str, Method | None]]:
    return [(FULL, FULL, None), *((method.name, method.fingerprint, method) for method in methods)]


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a kept context is before anything follows."""

    num_bytes: int
    num_kept: int
    hop_rows: float


class _DocumentJudge:
    """One document; reads its context when the first method needs it."""

    def __init__(self, model: ReferenceModel, document: Document, greedy_tokens: int, report: ProgressReporter) -> None:
        self._model, self._document, self._report = model, document, report
        self._greedy_tokens = greedy_tokens
        self._reading: Reading | None = None
        self._expected = torch.zeros(0)
        self._answer: list[int] = []
        self._answer_expected = torch.zeros(0)

    @property
    def is_idle(self) -> bool:
        """Whether nothing had to be read."""
        return self._reading is None

    def judge(self, method: Method | None) -> DocumentScores:
        """One method, or the full cache."""
        with torch.no_grad():
            reading = self._read()
            if method is None:
                return self._compare(self._expected, self._weigh(keep_full(reading)), None)
            kept = method.keep(reading)
            held = self._weigh(kept)
            answered = None
            if self._answer:
                answered = self._follow(method.copy(kept), self._answer, [1] * len(self._answer))
            counts = steps_of_an_answer(len(self._document.context), len(self._document.continuation))
            seen = self._follow(kept, self._document.continuation, counts)
            return self._compare(seen, held, answered)

    def _read(self) -> Reading:
        if self._reading is None:
            context = self._document.context
            self._reading = reading = read(self._model, context, self._report)
            logits = self._model.run(self._document.continuation, len(context), reading.cache.attend)
            self._expected = logits.log_softmax(dim=-1)
            reading.cache.cut(len(context))
            if self._greedy_tokens:
                self._answer_greedily(reading)
        return self._reading

    def _answer_greedily(self, reading: Reading) -> None:
        """What the full cache says after a context: tokens fed, and log-probabilities [t, V] after each."""
        num_context = len(reading.token_ids)
        fed, parts = [self._document.continuation[0]], []
        for index in range(self._greedy_tokens):
            logits = self._model.run([fed[-1]], num_context + index, reading.cache.attend)
            parts.append(logits.log_softmax(dim=-1))
            fed.append(int(logits[0].argmax()))
        reading.cache.cut(num_context)
        self._answer, self._answer_expected = fed[:-1], torch.cat(parts)

    def _follow(self, kept: KeptContext, token_ids: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [t, V] of tokens fed in steps of `counts`, the context going on being compressed."""
        start = len(self._document.context)
        parts, first = [], 0
        for count in counts:
            parts.append(self._model.run(token_ids[first : first + count], start + first, kept.attend))
            first += count
        return torch.cat(parts).log_softmax(dim=-1)

    def _weigh(self, kept: KeptContext) -> _Held:
        shape = self._model.shape
        heads = [(layer, head) for layer in range(shape.num_layers) for head in range(shape.num_kv_heads)]
        # Where all rows go on, they go over every border.
        borders = list(kept.stream_lengths)[1:] or [len(self._document.context)]
        return _Held(
            num_bytes=kept.count_bytes(),
            num_kept=sum(len(kept.keys_of(layer, head)[0]) for layer, head in heads),
            hop_rows=sum(borders) / len(borders),
        )

    def _compare(self, seen: torch.Tensor, held: _Held, answered: torch.Tensor | None) -> DocumentScores:
        targets = torch.tensor(self._document.continuation[1:])[:, None]
        greedy_kl, agreed = None, None
        if answered is not None:
            greedy_kl = float(_divergence(self._answer_expected, answered).mean())
            differs = (answered.argmax(dim=-1) != self._answer_expected.argmax(dim=-1)).nonzero()
            agreed = float(differs[0, 0]) if len(differs) else float(len(answered))
        return DocumentScores(
            kl_nats=float(_divergence(self._expected, seen).mean()),
            loss_nats=float(-seen[:-1].gather(1, targets).mean()),
            agreement=float((self._expected.argmax(dim=-1) == seen.argmax(dim=-1)).float().mean()),
            num_bytes=held.num_bytes,
            num_kept=held.num_kept,
            num_tokens=len(self._document.context),
            hop_rows=held.hop_rows,
            greedy_kl_nats=greedy_kl,
            greedy_agreed_tokens=agreed,
        )


def steps_of_an_answer(start: int, num_tokens: int) -> list[int]:
    """Steps compressed as single tokens would be: each fits the tail's ring and ends where an event is due."""
    size = FULL_CACHE.block_tokens
    counts, position, end = [], start, start + num_tokens
    while position < end:
        counts.append(min(size - (position - FULL_CACHE.num_sinks) % size, end - position))
        position += counts[-1]
    return counts


def _divergence(expected: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """KL(full || ours) [t] of log-probabilities [t, V]."""
    return (expected.exp() * (expected - seen)).sum(dim=-1)
