"""What the adapter_config.json of a LoRA adapter means for running it; everything else in it is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from swarm.errors import ModelFilesError, UnsupportedModelError

__all__ = ["MAX_RANK", "LoraSettings", "read_settings"]

MAX_RANK: Final = 1024
_MAX_CONFIG_BYTES: Final = 2**20
_MAX_PATTERNS: Final = 4096
_MAX_PATTERN_CHARS: Final = 256
_MAX_REPETITIONS: Final = 4
"""Repetition signs in one pattern: with none inside another, matching takes at most this power of a name's length."""

_UNDERSTOOD: Final = frozenset(
    {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora"}
)
_WITHOUT_EFFECT: Final = frozenset(
    {
        # About the base model, which the swarm names by its hash, and about where things came from.
        "auto_mapping",
        "base_model_name_or_path",
        "peft_version",
        "revision",
        "task_type",
        # About training, or about which modules to adapt: the tensors say which ones were.
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "loftq_config",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "velora_config",
        # Whether base weights are stored transposed; an adapter's own never are.
        "fan_in_fan_out",
    }
)
_HARMLESS_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to initialise an adapter that leave the base weights as they are."""
_REASONS: Final = {
    "alora_invocation_tokens": "is active only after certain tokens (aLoRA)",
    "modules_to_save": "replaces whole modules (modules_to_save)",
    "target_parameters": "adapts fused parameters, experts for example (target_parameters)",
    "trainable_token_indices": "changes embeddings (trainable_token_indices)",
    "use_dora": "is a DoRA adapter (use_dora)",
}


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """How an adapter's tensors are to be used."""

    rank: int
    """Rank of modules that `rank_pattern` does not mention."""
    alpha: float
    """Scale of modules that `alpha_pattern` does not mention, before division by the rank."""
    use_rslora: bool = False
    """Divide by the rank's square root instead of the rank (rank-stabilised LoRA)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """By pattern of module names; the first that fits counts."""
    target_modules: frozenset[str] | None = None
    """Names, or last parts of names, of the modules adapted; None when only a regular expression says which."""

    def scale_of(self, module_name: str, rank: int) -> float:
        """What the adapter's product is multiplied with at a module whose tensors have this rank."""
        alpha = next(
            (alpha for pattern, alpha in self.alpha_pattern.items() if _fits(pattern, module_name)), self.alpha
        )
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def allows_rank(self, rank: int) -> bool:
        """Whether some module may have this rank."""
        return rank == self.rank or rank in self.rank_pattern.values()

    def targets(self, module_name: str) -> bool:
        """Whether a module may be adapted, as far as names say."""
        if self.target_modules is None:
            return True
        return any(module_name == name or module_name.endswith(f".{name}") for name in self.target_modules)

    def meaning(self) -> dict[str, Any]:
        """What distinguishes two adapters of equal tensors, for hashing."""
        return {
            "alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "alpha_pattern": list(map(list, self.alpha_pattern.items())),
        }


def read_settings(data: bytes, *, where: str) -> LoraSettings:
    """The settings in an adapter_config.json.

    Args:
        data: the file.
        where: what to call it in messages.

    Raises:
        ModelFilesError: it is damaged, or says impossible things.
        UnsupportedModelError: it is no LoRA, or uses something that would be served wrongly.
    """
    if len(data) > _MAX_CONFIG_BYTES:
        raise ModelFilesError(f"{where} has {len(data)} bytes, far more than any adapter's settings; fetch it again")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{where} is damaged (no JSON); fetch the adapter again") from error
    if not isinstance(config, dict):
        raise ModelFilesError(f"{where} is damaged (no JSON object); fetch the adapter again")
    _check_kind(config, where)
    settings = LoraSettings(
        rank=_rank(config.get("r", 8), where),
        alpha=_alpha(config.get("lora_alpha", 8), where),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern={name: _rank(value, where) for name, value in _patterns(config, "rank_pattern", where)},
        alpha_pattern={name: _alpha(value, where) for name, value in _patterns(config, "alpha_pattern", where)},
        target_modules=_target_modules(config.get("target_modules"), where),
    )
    for pattern in settings.alpha_pattern:
        _check_pattern(pattern, where)
    return settings


def _check_kind(config: dict[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(f"{where} describes an adapter of type {_shown(kind)}; only LORA is served")
    for name, reason in _REASONS.items():
        if config.get(name):
            raise UnsupportedModelError(
                f"the adapter of {where} {reason}, which is not served; train one with plain LoRA on linear layers"
            )
    if config.get("bias", "none") not in ("none", None) or config.get("lora_bias"):
        raise UnsupportedModelError(
            f"the adapter of {where} trains biases (bias, lora_bias), which is not served; train it with bias='none'"
        )
    start = config.get("init_lora_weights", True)
    if not any(start is harmless or (isinstance(start, str) and start == harmless) for harmless in _HARMLESS_STARTS):
        raise UnsupportedModelError(
            f"the adapter of {where} was started with init_lora_weights={_shown(start)}, which changes the base "
            "weights too; save it with PEFT's path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    # What a later PEFT adds stays off by default; switched on, it means something that we do not know.
    unknown = sorted(
        str(name)
        for name, value in config.items()
        if value and name not in _UNDERSTOOD | _WITHOUT_EFFECT | {"bias", "init_lora_weights"}
    )
    if unknown:
        raise UnsupportedModelError(
            f"the adapter of {where} uses {_shown(unknown[0])}, which is not served; train one with plain LoRA"
        )


def _rank(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise ModelFilesError(f"{where} states a rank of {_shown(value)}; ranks are whole numbers from 1 to {MAX_RANK}")
    return value


def _alpha(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise ModelFilesError(f"{where} states a lora_alpha of {_shown(value)}, which is no sensible number")
    return float(value)


def _patterns(config: dict[str, Any], name: str, where: str) -> list[tuple[str, Any]]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise ModelFilesError(f"{name} in {where} is no table of at most {_MAX_PATTERNS} patterns")
    return list(patterns.items())


def _target_modules(value: object, where: str) -> frozenset[str] | None:
    # A regular expression is not evaluated: the tensors show which modules it fitted, and a foreign one may
    # take forever.
    if value is None or isinstance(value, str):
        return None
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    raise ModelFilesError(f"target_modules in {where} is neither a list of names nor a regular expression")


def _check_pattern(pattern: str, where: str) -> None:
    """Refuse what is no regular expression, or could take forever on some name."""
    repetitions = sum(pattern.count(sign) for sign in "*+?{")
    is_nested = re.search(r"\)[*+?{]", pattern) is not None
    try:
        if len(pattern) > _MAX_PATTERN_CHARS or repetitions > _MAX_REPETITIONS or is_nested:
            raise ValueError("too complicated")
        re.compile(pattern)
        re.compile(_anchored(pattern))
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise UnsupportedModelError(
            f"the pattern {_shown(pattern)} of alpha_pattern in {where} can not be used ({error}); "
            "name the modules one by one"
        ) from error


def _fits(pattern: str, module_name: str) -> bool:
    """PEFT's rule: a pattern fits the whole name or its end after a dot."""
    return re.match(_anchored(pattern), module_name) is not None


def _anchored(pattern: str) -> str:
    return rf"(?:.*\.)?(?:{pattern})$"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]}…"
