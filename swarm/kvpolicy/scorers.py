"""How much a token matters to a KV head, by the methods that can be chosen; each is one class in this module.

A scorer judges a token when it comes (`score_new`: from the token alone, so the same whatever follows) and again at
each compression event (`rescore`: from what the newest queries attend to). Both see one layer at a time, so it does
not matter how layers are cut.
"""

# Letters: t new tokens, w newest queries, m candidates of a head (or of several, one after another),
# n keys, Hk KV heads, G query heads of each, D head dimension.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from swarm.errors import BadInputError
from swarm.kvpolicy.calibration_file import Calibration
from swarm.kvpolicy.selection import find_nth, rank_scores

__all__ = ["SCORERS", "BlendedScorer", "NewTokens", "Scorer", "attention_received", "build_scorer"]

_MIN_WEIGHT: Final = 1e-6
_PLACE_MASK: Final = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """What one layer knows of tokens that have just been run."""

    layer: int
    """Absolute."""
    positions: torch.Tensor
    """[t] int64, absolute."""
    hidden: torch.Tensor
    """[t, hidden size]: the input of the attention module, after its norm."""
    num_kv_heads: int


class Scorer(Protocol):
    """One way of judging tokens."""

    query_tokens: int
    """Newest queries of a step that `rescore` wants to know of; 0 when it never looks."""

    def score_new(self, new: NewTokens) -> torch.Tensor:
        """First scores [Hk, t] float32 of tokens that have just come."""

    def rescore(
        self, layer: int, head: int, scores: torch.Tensor, is_new: torch.Tensor, received: torch.Tensor
    ) -> torch.Tensor:
        """Scores [m] float32 of a KV head's candidates, by which they are chosen and which are remembered in 16 bit.

        Args:
            scores: [m] float32, so far.
            is_new: [m] bool, whether this is a token's first event.
            received: [m] from `attention_received`.
        """

    def rescore_unseen(self, scores: torch.Tensor, is_new: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        """Likewise for several KV heads at once, at an event without queries to judge by: most while answering.

        Tokens that have been judged before keep their scores.

        Args:
            scores: [m] float32, so far, of all heads' candidates one after another.
            is_new: [m] bool, whether this is a token's first event.
            owners: [m] int64 from 0 on, which head each is of.
        """


def attention_received(queries: torch.Tensor, keys: torch.Tensor, scaling: float, *, num_before: int) -> torch.Tensor:
    """Largest attention weight [n] float32 that each key gets from the newest queries of its group.

    Args:
        queries: [G, w, D].
        keys: [n, D]: all keys these queries see, the last w of them at the queries' own positions.
        scaling: what the model multiplies scores with.
        num_before: keys before the first query, n - w.
    """
    num_new = queries.shape[1]
    scores = torch.matmul(queries.float(), keys.float().transpose(0, 1)) * scaling
    own = torch.ones(num_new, num_new, dtype=torch.bool, device=keys.device).tril()
    scores[:, :, num_before:] = scores[:, :, num_before:].masked_fill(~own, -torch.inf)
    return scores.softmax(dim=-1).amax(dim=(0, 1))


class WindowScorer:
    """What the newest queries attend to (as SnapKV, PyramidInfer); what older ones did counts half at each event.

    While a model answers there are too few queries to judge by. Tokens that no query has judged are taken for average
    ones: as if nobody looked at them, an answer would forget itself at once (0.089 nats over the 320 tokens after a
    prompt of 516, demo model at a quarter of the tokens; so 0.065).
    """

    query_tokens: int = 64

    def __init__(self, calibration: Calibration | None) -> None:
        pass

    def score_new(self, new: NewTokens) -> torch.Tensor:
        return torch.zeros(new.num_kv_heads, len(new.hidden), device=new.hidden.device)

    def rescore(
        self, layer: int, head: int, scores: torch.Tensor, is_new: torch.Tensor, received: torch.Tensor
    ) -> torch.Tensor:
        return torch.maximum(received, torch.where(is_new, 0.0, scores / 2))

    def rescore_unseen(self, scores: torch.Tensor, is_new: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        stored = torch.nonzero(~is_new)[:, 0]
        if not len(stored):
            return scores
        num_owners = int(owners.max()) + 1
        # Distinct keys, so that the choice is the same everywhere: score, place.
        keys = (rank_scores(scores[stored]) << 31) + torch.arange(len(stored), device=scores.device)
        counts = torch.bincount(owners[stored], minlength=num_owners)
        middle = find_nth(keys.cpu().numpy(), owners[stored].cpu().numpy(), counts.cpu().numpy() // 2)
        places = torch.from_numpy(middle.clip(0) & _PLACE_MASK).to(scores.device)
        usual = scores[stored[places]]
        return torch.where(is_new & (counts > 0)[owners], usual[owners], scores)


class LearnedScorer:
    """A linear guess, from the token's own hidden state, of how strongly a second reading would look it up.

    In the manner of KVzap (2601.07891), which imitates KVzip (2505.23416) without its second reading. Knows nothing
    of the question to come, needs no query, and gives the same scores however a prompt is chunked.
    """

    query_tokens: int = 0

    def __init__(self, calibration: Calibration | None) -> None:
        if calibration is None:
            raise BadInputError("the learned scorer needs a calibrated model; run `swarm calibrate MODEL` first")
        self._calibration = calibration
        self._weights: dict[tuple[int, torch.device], torch.Tensor] = {}
        """[hidden size + 1, Hk] float64 by layer, once per device: steps of one token are short."""

    def score_new(self, new: NewTokens) -> torch.Tensor:
        weights = self._weights.get((new.layer, new.hidden.device))
        if weights is None:
            weights = self._calibration.scorer_weights[new.layer].to(new.hidden.device).double()
            self._weights[new.layer, new.hidden.device] = weights
        # In 64 bit, so that how many tokens are scored at once, and thereby the order of sums, does not show in 32.
        return (new.hidden.double() @ weights[:-1] + weights[-1]).float().transpose(0, 1)

    def rescore(
        self, layer: int, head: int, scores: torch.Tensor, is_new: torch.Tensor, received: torch.Tensor
    ) -> torch.Tensor:
        return scores

    def rescore_unseen(self, scores: torch.Tensor, is_new: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        return scores


class BlendedScorer(LearnedScorer):
    """The learned guess, corrected once by what the queries at the end of the token's own chunk attend to.

    How much that counts is measured for every head: some look where they looked before, others do not.
    """

    query_tokens: int = 64

    def rescore(
        self, layer: int, head: int, scores: torch.Tensor, is_new: torch.Tensor, received: torch.Tensor
    ) -> torch.Tensor:
        weight = float(self._calibration.received_weight[layer, head])
        return torch.where(is_new, scores + weight * self.correction(layer, head, received), scores)

    def correction(self, layer: int, head: int, received: torch.Tensor) -> torch.Tensor:
        """By how much more than usual a head's candidates are attended to: [m] logarithms, of weights [m]."""
        return received.clamp_min(_MIN_WEIGHT).log() - float(self._calibration.received_mean[layer, head])


class RandomScorer:
    """The control: what any other scorer must beat. The same on every server, from position, layer and head."""

    query_tokens: int = 0

    def __init__(self, calibration: Calibration | None) -> None:
        pass

    def score_new(self, new: NewTokens) -> torch.Tensor:
        heads = torch.arange(new.num_kv_heads, dtype=torch.float64)[:, None]
        # The classic one-line hash of shader programs: uniform enough for a control, and the same everywhere.
        mixed = torch.sin(new.positions.cpu().double() * 12.9898 + heads * 78.233 + new.layer * 37.719) * 43758.5453
        return (mixed - mixed.floor()).float().to(new.hidden.device)

    def rescore(
        self, layer: int, head: int, scores: torch.Tensor, is_new: torch.Tensor, received: torch.Tensor
    ) -> torch.Tensor:
        return scores

    def rescore_unseen(self, scores: torch.Tensor, is_new: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        return scores


SCORERS: Final[dict[str, Callable[[Calibration | None], Scorer]]] = {
    "blended": BlendedScorer,
    "learned": LearnedScorer,
    "window": WindowScorer,
    "random": RandomScorer,
}


def build_scorer(name: str, calibration: Calibration | None) -> Scorer:
    """The scorer of that name; without a calibration those that need one become `window`.

    Raises:
        BadInputError: there is none.
    """
    if name not in SCORERS:
        raise BadInputError(f"there is no scorer {name!r}; known are {', '.join(SCORERS)}")
    if calibration is None and name in ("blended", "learned"):
        name = "window"
    return SCORERS[name](calibration)


MIN_QUERIES: Final = 16
"""Fewer newest queries than this say too little to judge tokens by."""
