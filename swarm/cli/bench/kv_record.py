"""Figures of single texts under single methods, remembered in a file so that a stopped benchmark goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from swarm.errors import BadInputError

__all__ = ["CodeScores", "DocumentScores", "EngineScores", "ScoreRecord", "name_case"]


@dataclass(frozen=True, kw_only=True)
class DocumentScores:
    """One text continued under one method."""

    kl_nats: float
    """KL(full || ours), mean over the continuation."""
    loss_nats: float
    """Mean negative log-probability of the text's own tokens."""
    agreement: float
    """Share of positions where the likeliest token is the full cache's."""
    num_bytes: int
    """Held at the context's end."""
    num_kept: int
    """Entries (token, layer, KV head) held then."""
    num_tokens: int
    """Of the context."""
    hop_rows: float
    """Rows that a hop sends on while it reads the context, mean over all places to cut the model."""
    greedy_kl_nats: float | None
    greedy_agreed_tokens: float | None


@dataclass(frozen=True, kw_only=True)
class CodeScores:
    """One text with hidden codes under one method."""

    digits: float
    """Share of digits that were predicted."""
    exact: float
    """Share of codes of which every digit was."""


@dataclass(frozen=True, kw_only=True)
class EngineScores:
    """A policy in the engine, beside exact sessions."""

    none_step_ms: float
    """Of an exact session that decodes alone."""
    step_ms: float
    """Of a compressed one, its share of compression events included."""
    none_step_ms_8_sessions: float
    step_ms_8_sessions: float
    kv_ratio: float
    """Bytes of pages of 8 sessions, over a 16-bit full cache of their contexts."""
    digits: float | None = None
    """Share of digits of hidden codes that were predicted."""


Scores = DocumentScores | CodeScores | EngineScores
_KINDS = {"document": DocumentScores, "codes": CodeScores, "engine": EngineScores}


def name_case(kind: str, token_ids: Sequence[int], settings: Sequence[int]) -> str:
    """A name of what was asked of a text, the same whenever the same is asked."""
    return f"{kind}-{hashlib.sha256(repr((list(token_ids), list(settings))).encode()).hexdigest()[:16]}"


class ScoreRecord:
    """Scores by case and method; appended to a file at once, if there is one."""

    def __init__(self, path: Path | None, model_hash: str) -> None:
        """Raises BadInputError when the file is something else."""
        self._path = path
        self._model_hash = model_hash
        self._scores: dict[tuple[str, str], Scores] = {}
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if entry["model_hash"] == self._model_hash:
                    kind = entry["case"].split("-")[0]
                    self._scores[entry["case"], entry["method"]] = _KINDS[kind](**entry["scores"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(f"{path} is no record of `swarm bench kv`; name another file") from error

    def find(self, case: str, fingerprint: str) -> Scores | None:
        """What was measured of this before."""
        return self._scores.get((case, fingerprint))

    def add(self, case: str, fingerprint: str, scores: Scores) -> None:
        """Remember, and write down."""
        self._scores[case, fingerprint] = scores
        if self._path is not None:
            entry = {"model_hash": self._model_hash, "case": case, "method": fingerprint, "scores": asdict(scores)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
