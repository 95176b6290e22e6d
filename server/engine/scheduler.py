"""Which tokens run in the next engine step. Pure, no I/O.

Decoding comes first, since somebody is reading along: every session's next tokens share one batch. Long
inputs are cut into chunks that take turns with decoding steps (chunked prefill, as in Sarathi, OSDI 2024,
but in turns rather than mixed: on a CPU a mixed step makes decoders wait for the chunk twice). How large a
chunk may be follows from measured times, so that a decoder's gap stays within a small multiple of its own
step. Training comes last; the engine runs it when nothing is planned here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Candidate", "ChunkSizer", "SchedulerConfig", "Share", "StepEstimate", "plan_step"]


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds of one engine step."""

    max_step_tokens: int = 512
    """Tokens of one step: what a long input gets when nobody decodes."""
    min_chunk_tokens: int = 8
    """A chunk is never smaller, or a long input would never end."""
    decode_tokens: int = 32
    """A session's step of up to so many tokens counts as decoding: beams, drafts, a short question."""
    chunk_share: float = 1.5
    """Time of a chunk beside decoders, as a multiple of a decoding step."""
    decoder_memory_s: float = 1.0
    """A session that decoded within this time is expected back, so chunks stay small."""
    chunk_multiple: int = 16
    """Chunks end at multiples of so many tokens, which should be whole pages: only those can be shared."""
    stateless_wait_s: float = 2.0
    """Training gets a turn after waiting this long, however many sessions there are."""

    gather_share: float = 1.0
    """Longest wait for sessions about to come back, as a multiple of a decoding step; see gathering.py."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_chunk_tokens <= self.max_step_tokens:
            raise ValueError("SchedulerConfig needs 1 <= min_chunk_tokens <= max_step_tokens")
        for name in ("decode_tokens", "chunk_share", "chunk_multiple"):
            if getattr(self, name) <= 0:
                raise ValueError(f"SchedulerConfig.{name} must be above 0")
        if self.gather_share < 0:
            raise ValueError("SchedulerConfig.gather_share must not be negative; 0 never waits")


@dataclass(frozen=True, slots=True)
class Candidate:
    """The oldest unfinished step of one session."""

    num_tokens: int
    """Tokens of the step still to run; 0 for a pure rewind or fork."""
    is_decode: bool
    least_tokens: int = 1
    """Of a part, unless fewer are left: what makes up for a part's own cost."""


@dataclass(frozen=True, slots=True)
class Share:
    """Part of a step that runs now."""

    index: int
    """Of the candidate."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """What steps take at the present load; 0 is not known."""

    step_s: float
    """A step of one token."""
    token_s: float
    """Each further token of a long step."""


def plan_step(
    candidates: Sequence[Candidate],
    *,
    chunk_tokens: int,
    max_step_tokens: int,
    is_prefill_turn: bool,
    chunk_multiple: int = 1,
) -> list[Share]:
    """What to run now, in the order of `candidates` (oldest first).

    Where both kinds wait, `is_prefill_turn` says whose turn it is. A chunk may be shared by several long
    inputs; one that does not finish its input is a multiple of `chunk_multiple` where there is room for
    that much. One whose parts need `least_tokens` gets them as the first in a chunk, though that makes the chunk
    longer, and nothing behind others that leave less. Something runs whenever something waits.
    """
    decoding = [index for index, candidate in enumerate(candidates) if candidate.is_decode]
    prefilling = [index for index, candidate in enumerate(candidates) if not candidate.is_decode]
    runs_prefill = bool(prefilling) and (is_prefill_turn or not decoding)
    chosen, room = (prefilling, min(chunk_tokens, max_step_tokens)) if runs_prefill else (decoding, max_step_tokens)
    shares: list[Share] = []
    for index in chosen:
        wanted = candidates[index].num_tokens
        if runs_prefill:
            least = min(wanted, candidates[index].least_tokens, max_step_tokens)
            if least > room and shares:
                continue
            room = max(room, least)
        num_tokens = min(wanted, room)
        if runs_prefill and num_tokens < wanted and (num_tokens >= chunk_multiple or shares):
            num_tokens -= num_tokens % chunk_multiple
        if num_tokens or wanted == 0 or not shares:
            shares.append(Share(index, max(num_tokens, min(wanted, 1))))
            room -= num_tokens
    return shares


@dataclass
class ChunkSizer:
    """Learns step times and says how many tokens of a long input fit beside decoders."""

    config: SchedulerConfig
    _decode_step_s: float | None = None
    _prefill_token_s: float | None = None
    _last_decode_s: float = field(default=float("-inf"))

    def record(self, *, num_tokens: int, is_prefill: bool, seconds: float, now_s: float) -> None:
        """Learn from a step that has run."""
        if is_prefill:
            if num_tokens >= self.config.min_chunk_tokens:
                self._prefill_token_s = _blend(self._prefill_token_s, seconds / num_tokens)
        else:
            self._decode_step_s = _blend(self._decode_step_s, seconds)
            self._last_decode_s = now_s

    @property
    def decode_step_s(self) -> float:
        """Usual time of a decoding step; 0 before the first."""
        return self._decode_step_s or 0.0

    def chunk_tokens(self, *, now_s: float) -> int:
        """Tokens of the next chunk."""
        config = self.config
        if now_s - self._last_decode_s > config.decoder_memory_s:
            return config.max_step_tokens
        if self._decode_step_s is None or self._prefill_token_s is None:
            return 4 * config.min_chunk_tokens
        wanted = int(config.chunk_share * self._decode_step_s / max(self._prefill_token_s, 1e-9))
        return max(config.min_chunk_tokens, min(wanted, config.max_step_tokens))

    def estimate(self, *, num_prefilling: int, num_decoding: int, first: StepEstimate) -> StepEstimate:
        """What one more session's steps would take beside sessions that prefill and decode now.

        `first` stands for what is not measured yet.
        """
        # A chunk may run before each decoding step, and a decoding step before each chunk; chunks are shared.
        step_s = (self._decode_step_s or first.step_s) * (1 + (self.config.chunk_share if num_prefilling else 0))
        token_s = (self._prefill_token_s or first.token_s) * (num_prefilling + 1) * (2 if num_decoding else 1)
        return StepEstimate(step_s, token_s)


def _blend(old: float | None, new: float) -> float:
    """Exponential mean over about the last five values."""
    return new if old is None else 0.8 * old + 0.2 * new
