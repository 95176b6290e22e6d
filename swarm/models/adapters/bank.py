"""Holds the adapters of a loaded span: checks that they fit its layers, reads their matrices, gives them up."""

from __future__ import annotations

import logging
import re

from torch import nn

from swarm.datatypes import AdapterHash, AdapterInfo
from swarm.errors import BadInputError, ModelFilesError, UnsupportedModelError
from swarm.models.adapters.layer import AdaptedLayer, Factors, sizes_of_linear
from swarm.models.adapters.probing import NUM_PROBE_TOKENS, probe_layers
from swarm.models.adapters.source import AdaptedModule, AdapterSource
from swarm.models.span import SpanModel

__all__ = ["AdapterBank"]

logger = logging.getLogger(__name__)


class AdapterBank:
    """The adapters of one loaded span. Adapters are added and removed by one thread; spans may run meanwhile."""

    def __init__(self, model: SpanModel, *, num_blocks: int) -> None:
        """`num_blocks` are those of the whole model."""
        self._model = model
        self._num_blocks = num_blocks
        self._stack_name = _stack_name(model)
        self._layers: dict[str, AdaptedLayer] = {}
        """By path in the span: `0.self_attn.q_proj` is in its first block."""
        self._infos: dict[str, AdapterInfo] = {}
        self._sizes_bytes: dict[AdapterHash, int] = {}

    def __repr__(self) -> str:
        return f"<AdapterBank {', '.join(self._infos) or 'empty'}, {self.size_bytes} bytes>"

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """What sessions may choose."""
        return tuple(self._infos.values())

    @property
    def size_bytes(self) -> int:
        """Memory of all matrices."""
        return sum(self._sizes_bytes.values())

    def add(self, source: AdapterSource) -> AdapterInfo:
        """Read an adapter's matrices for the blocks of the span; sessions may choose it from then on.

        They are kept in the dtype in which the adapted layers compute. On failure nothing stays behind.

        Raises:
            BadInputError: the name is taken, or the adapter was made for another model.
            ModelFilesError: its tensors are damaged.
            UnsupportedModelError: it adapts what is not a linear layer that all tokens pass through.
        """
        info = source.info
        if info.name in self._infos:
            raise BadInputError(f"two adapters are named {info.name}; give each a name of its own")
        wanted = self._layers_of(source)
        if info.adapter_hash not in self._sizes_bytes:
            factors = self._read(source, wanted)
            for path, pair in factors.items():
                self._layer(path).factors[info.adapter_hash] = pair
            self._sizes_bytes[info.adapter_hash] = sum(pair.size_bytes for pair in factors.values())
        self._infos[info.name] = info
        logger.info("adapter %s changes %d layers of blocks %s", info.name, len(wanted), self._model.span)
        return info

    def remove(self, name: str) -> None:
        """Forget an adapter; sessions that still use it go on without. Raises KeyError for an unknown name."""
        info = self._infos.pop(name)
        if any(other.adapter_hash == info.adapter_hash for other in self._infos.values()):
            return
        self._sizes_bytes.pop(info.adapter_hash, None)
        for path, layer in list(self._layers.items()):
            layer.factors.pop(info.adapter_hash, None)
            if not layer.factors:
                layer.handle.remove()
                del self._layers[path]

    # -- adding --------------------------------------------------------------------------------

    def _layers_of(self, source: AdapterSource) -> dict[str, AdaptedModule]:
        """The adapted layers in this span, by path; every claim about them is checked."""
        found: dict[str, AdaptedModule] = {}
        span = self._model.span
        for adapted in source.modules.values():
            if not _is_same_stack(adapted.stack, self._stack_name):
                raise UnsupportedModelError(
                    f"the adapter {source.info.name} adapts {adapted.name}, but the blocks of "
                    f"{self._model.architecture} are {self._stack_name}.0, {self._stack_name}.1, …; only adapters of "
                    "these are served"
                )
            if adapted.block >= self._num_blocks:
                raise BadInputError(
                    f"the adapter {source.info.name} adapts block {adapted.block}, and this model has "
                    f"{self._num_blocks}; it was made for another model"
                )
            if adapted.block in span:
                path = f"{adapted.block - span.start}.{adapted.path}"
                self._check_layer(source, adapted, path)
                found[path] = adapted
        return found

    def _check_layer(self, source: AdapterSource, adapted: AdaptedModule, path: str) -> None:
        module = self._module(path)
        if module is None:
            raise BadInputError(
                f"the adapter {source.info.name} adapts {adapted.name}, which this model does not have; it was made "
                "for another model"
            )
        if re.search(r"\.\d+(\.|$)", adapted.path):
            raise UnsupportedModelError(
                f"the adapter {source.info.name} adapts {adapted.name}, one of several experts; only layers that all "
                "tokens pass through can be adapted"
            )
        sizes = sizes_of_linear(module)
        if sizes is None:
            raise UnsupportedModelError(
                f"the adapter {source.info.name} adapts {adapted.name}, which is a {type(module).__name__}; only "
                "linear layers can be adapted"
            )
        if sizes != (adapted.in_features, adapted.out_features):
            raise BadInputError(
                f"the adapter {source.info.name} is for a {adapted.name} of {adapted.in_features} inputs and "
                f"{adapted.out_features} outputs, and here it has {sizes[0]} and {sizes[1]}; it was made for another "
                "model"
            )

    def _read(self, source: AdapterSource, wanted: dict[str, AdaptedModule]) -> dict[str, Factors]:
        if not wanted:  # it leaves these blocks as they are
            return {}
        layers = {path: module for path in wanted if (module := self._module(path)) is not None}
        seen = probe_layers(self._model, layers)
        factors: dict[str, Factors] = {}
        with source.open_factors() as reader:
            for path, adapted in wanted.items():
                given = seen.get(path)
                if given is None or given.num_rows != NUM_PROBE_TOKENS:
                    raise UnsupportedModelError(
                        f"the adapter {source.info.name} adapts {adapted.name}, which does not see every token; only "
                        "layers that all tokens pass through can be adapted"
                    )
                a, b = reader.read(adapted, "A"), reader.read(adapted, "B")
                if tuple(a.shape) != (adapted.rank, adapted.in_features) or b.shape[0] != adapted.out_features:
                    raise ModelFilesError(f"the files of the adapter {source.info.name} changed while they were read")
                factors[path] = Factors(
                    # As views of the stored layout, in which each row of A and B is contiguous.
                    a=a.to(device=given.device, dtype=given.dtype).t(),
                    b=(b.float() * adapted.scale).to(device=given.device, dtype=given.dtype).t(),
                )
        return factors

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self._model.blocks.get_submodule(path)
        except AttributeError:
            return None

    def _layer(self, path: str) -> AdaptedLayer:
        layer = self._layers.get(path)
        if layer is None:
            module = self._module(path)
            assert module is not None
            sizes = sizes_of_linear(module)
            assert sizes is not None
            layer = self._layers[path] = AdaptedLayer(module, *sizes)
        return layer


def _stack_name(model: SpanModel) -> str:
    """Where the blocks are in the whole model: `model.layers`."""
    names: dict[int, str] = {id(module): name for name, module in model.model.named_modules()}
    return names[id(model.blocks)]


def _is_same_stack(in_adapter: str, in_model: str) -> bool:
    """Whether two names mean the same list of blocks.

    Adapters may have been trained on the bare decoder (`layers`), or on the model with eyes that this language
    model is a part of (`model.language_model.layers`); a tower of another kind has another name of its own.
    """
    left, right = _without_eyes(in_adapter), _without_eyes(in_model)
    return left == right or right.endswith(f".{left}")


def _without_eyes(stack_name: str) -> str:
    return ".".join(part for part in stack_name.split(".") if part != "language_model")
