"""Fills a cut model class with the tensors it still has."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from swarm.errors import ModelFilesError, UnsupportedModelError
from swarm.models.anatomy import describe_architecture
from swarm.models.checkpoint import renumber_tensor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from swarm.models.progress import ProgressReporter
    from swarm.models.source import ModelSource

__all__ = ["load_model", "model_class_of"]

logger = logging.getLogger(__name__)
_loading = threading.RLock()
"""Held while transformers loads: it patches its own classes meanwhile, and of two loads at once the one that ends last
would leave the other's patches in place for good (tied weights are lost then)."""


def model_class_of(config: PreTrainedConfig, auto_class: Any) -> type[PreTrainedModel]:
    """The class that `auto_class` (AutoModelForCausalLM, …) would take for `config`.

    Raises:
        UnsupportedModelError: there is none.
    """
    try:
        found = auto_class._model_mapping[type(config)]
    except KeyError as error:
        raise UnsupportedModelError(
            f"{describe_architecture(config)} is no text generation model: "
            f"transformers' {auto_class.__name__} has no class for it"
        ) from error
    # Some configs stand for several classes; the first is transformers' own default.
    cls: type[PreTrainedModel] = found[0] if isinstance(found, list | tuple) else found
    return cls


def load_model(
    source: ModelSource,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    wanted: Callable[[str], bool],
    *,
    dtype: torch.dtype | None,
    what: str,
    first_block: int = 0,
    may_lack: Callable[[str], bool] = lambda name: False,
    report: ProgressReporter | None = None,
) -> PreTrainedModel:
    """An instance of `cls` with its weights read from the tensors of `source` that `wanted` accepts.

    Args:
        config: altered by `cls`; give a copy.
        dtype: of the weights; None takes bf16 or fp16 if all those tensors are, else fp32.
        what: the part of the model that is loaded, for messages.
        first_block: the block of the model that is block 0 of `cls`.
        may_lack: parameters that may be left as initialised, because checkpoints do not hold them.

    Raises:
        ModelFilesError: tensors are missing, damaged or of other shapes than the config says.
        UnsupportedModelError: the model's own code fails when it is cut.
    """
    with source.open_tensors(wanted, report=report) as slices, _loading, _quiet_transformers():
        try:
            if dtype is None:
                dtype = _common_dtype(slices.values())
            loaded: Any = cls.from_pretrained(
                None,
                config=config,
                state_dict={renumber_tensor(name, first_block): value for name, value in slices.items()},
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in one sentence
            )
        except SafetensorError as error:
            raise ModelFilesError(f"weights of {source.name} are damaged ({error}); fetch them again") from error
        except RuntimeError as error:
            if "Error(s) in loading" not in str(error) and "conversion of the weights" not in str(error):
                raise
            raise ModelFilesError(f"weights of {source.name} do not fit its config.json ({error})") from error
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            # Foreign model code that did not expect to be cut.
            raise UnsupportedModelError(
                f"{describe_architecture(config)} can not be loaded in parts: {type(error).__name__}: {error}"
            ) from error
    model: PreTrainedModel = loaded[0]
    problems: dict[str, Any] = loaded[1]
    for name, in_file, in_model in sorted(problems["mismatched_keys"])[:1]:
        raise ModelFilesError(
            f"the tensor {name} of {source.name} is {list(in_file)}, but by its config.json it should be "
            f"{list(in_model)}; config and weights are of different models"
        )
    lacking = sorted(name for name in problems["missing_keys"] if not may_lack(name))
    if lacking:
        raise ModelFilesError(
            f"the files of {source.name} lack {len(lacking)} tensors that {what} need, the first being {lacking[0]}"
        )
    return model


def _common_dtype(slices: Iterable[Any]) -> torch.dtype:
    """The narrowest float type that holds every one of these safetensors slices."""
    import torch

    in_files = {str(part.get_dtype()) for part in slices}
    return {frozenset({"BF16"}): torch.bfloat16, frozenset({"F16"}): torch.float16}.get(
        frozenset(in_files), torch.float32
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars or load reports of transformers: callers have their own."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
