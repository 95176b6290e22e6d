"""What a KV policy is: how many tokens a layer keeps, how they are chosen, and in how many bits they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from swarm.errors import BadInputError

__all__ = [
    "FULL_CACHE",
    "POLICIES",
    "PRESETS",
    "KVPolicy",
    "PruningSettings",
    "QuantisationSettings",
    "find_policy",
]

BudgetShape = Literal["calibrated", "pyramidinfer", "linear", "uniform"]


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """Which tokens of which layers are kept."""

    keep_ratio: float
    """Share of all (token, layer, KV head) entries that is kept, averaged over the model; in (0, 1]."""
    shape: BudgetShape = "calibrated"
    """How the budget is spread over layers and KV heads; `calibrated` falls back to a default that falls with depth."""
    scorer: str = "blended"
    """A name of swarm.kvpolicy.scorers."""
    recent_tokens: int = 64
    """Newest positions, never dropped; where a model was calibrated, what was measured of each KV head counts."""
    recent_share: float = 0.0
    """Newest share of the context, never dropped, where that is more than `recent_tokens`."""
    extra_tokens: int = 32
    """Kept beyond the ratio, averaged over the model, so that short contexts keep a larger share."""
    has_summary: bool = True
    """Whether each KV head keeps one entry that stands for all tokens it has dropped."""

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio is {self.keep_ratio}; give a share above 0 and at most 1")
        for name in ("recent_tokens", "recent_share", "extra_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more")

    def num_recent(self, num_tokens: int) -> int:
        """Newest positions of a context of `num_tokens` that are never dropped."""
        return max(self.recent_tokens, int(self.recent_share * num_tokens))


@dataclass(frozen=True, kw_only=True)
class QuantisationSettings:
    """In how many bits what is kept is stored."""

    key_bits: float = 4
    """Bits of one key number, averaged over the head dimension."""
    value_bits: float = 4
    """Likewise, for values."""
    is_calibrated: bool = True
    """Whether the model's measured axes are used, where there are any; else a rotation that fits all models."""

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            if not 1 <= getattr(self, name) <= 8:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 to 8")


@dataclass(frozen=True, kw_only=True)
class KVPolicy:
    """One way of keeping a cache; equal policies on servers of one route keep equal sets however layers are cut."""

    name: Literal["none", "pyramid", "gear", "pyramid+gear"]
    """What `--kv` and `status` say."""
    preset: str
    """Which settings of that name."""
    pruning: PruningSettings | None = None
    """None keeps every token."""
    quantisation: QuantisationSettings | None = None
    """None stores 16 bit."""
    num_sinks: int = 4
    """First positions of a sequence: always kept, always 16 bit."""
    block_tokens: int = 16
    """Tokens that leave the 16-bit tail at once."""
    tail_tokens: int = 16
    """Newest tokens that stay in 16 bit; the tail holds at least this many and fewer than one block more."""
    chunk_tokens: int = 2048
    """A long step is cut at multiples of this position, and compressed at each cut."""

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.chunk_tokens % self.block_tokens:
            raise ValueError(f"chunk_tokens ({self.chunk_tokens}) is no multiple of block_tokens ({self.block_tokens})")
        if self.tail_tokens < 0:
            raise ValueError(f"tail_tokens is {self.tail_tokens}; give 0 or more")
        if self.pruning is not None and self.pruning.recent_tokens < self.tail_tokens:
            raise ValueError("recent_tokens is less than tail_tokens; the tail holds recent tokens only")

    @property
    def compresses(self) -> bool:
        """Whether anything is dropped or coded at all."""
        return self.pruning is not None or self.quantisation is not None


FULL_CACHE: Final = KVPolicy(name="none", preset="none")

_FOUR_BIT: Final = QuantisationSettings(key_bits=4, value_bits=4)
_SHORT_VALUES: Final = QuantisationSettings(key_bits=4, value_bits=3.5)
"""Where most tokens are dropped, more of them are worth more than the last half bit of their values."""
_PRESETS: Final = (
    FULL_CACHE,
    KVPolicy(name="pyramid", preset="pyramid", pruning=PruningSettings(keep_ratio=0.4)),
    KVPolicy(name="gear", preset="gear", quantisation=QuantisationSettings(key_bits=4.25, value_bits=4)),
    KVPolicy(
        name="pyramid+gear",
        preset="pyramid+gear",
        pruning=PruningSettings(keep_ratio=0.27),
        quantisation=_FOUR_BIT,
    ),
    KVPolicy(
        name="pyramid+gear",
        preset="smallest",
        pruning=PruningSettings(keep_ratio=0.165),
        quantisation=_SHORT_VALUES,
    ),
    # Read in longer chunks than others: what is compressed early costs the rest of the prompt.
    KVPolicy(
        name="pyramid+gear",
        preset="twentieth",
        pruning=PruningSettings(keep_ratio=0.144),
        quantisation=_SHORT_VALUES,
        chunk_tokens=4096,
    ),
    # What is left at half the bits: an option for long contexts of models that stand it.
    KVPolicy(name="gear", preset="gear-2bit", quantisation=QuantisationSettings(key_bits=2, value_bits=2)),
    # Settings as published, for comparison: PyramidInfer's 7B file (arXiv 2405.12532) ...
    KVPolicy(
        name="pyramid",
        preset="pyramidinfer",
        pruning=PruningSettings(
            keep_ratio=0.757,
            shape="pyramidinfer",
            scorer="window",
            recent_share=0.2,
            extra_tokens=0,
            has_summary=False,
        ),
    ),
    # ... and 4 bit that knows nothing of the model: Hadamard axes, one scale for each token.
    KVPolicy(
        name="gear",
        preset="gear-uncalibrated",
        quantisation=QuantisationSettings(key_bits=4, value_bits=4, is_calibrated=False),
    ),
)
PRESETS: Final[dict[str, KVPolicy]] = {policy.preset: policy for policy in _PRESETS}
"""By preset name; the first of a policy's name is its default."""
POLICIES: Final = ("none", "pyramid", "gear", "pyramid+gear")


def find_policy(name: str) -> KVPolicy:
    """The preset of that name, or the default preset of the policy of that name.

    Raises:
        BadInputError: there is neither; the message lists both.
    """
    presets = PRESETS.values()
    # Compared, not looked up: what a program passes need not even be hashable.
    found = [each for each in presets if each.preset == name] or [each for each in presets if each.name == name]
    if found:
        return found[0]
    known = ", ".join([*POLICIES, *(preset for preset in PRESETS if preset not in POLICIES)])
    raise BadInputError(f"there is no KV policy {name!r}; known are {known}")
