"""How much memory each block of a model takes at a precision, found without reading any weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from swarm.weights import Precision, WeightFormat

__all__ = ["BlockShape", "BlockSizes", "KVDims", "ModelShape", "measure_model_shape"]

# Letters in shapes: N output features, K input features of a matrix.


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """What the blocks of one model take on one kind of device, in one precision of the weights."""

    precision: str
    """fp32, bf16, int8 or nf4."""
    weight_bytes: tuple[int, ...]
    """Of each block of the model, scales included; embeddings and head are the client's and not among them."""
    kv_bytes_per_token: int
    """What one block keeps of one token; blocks share pages, so this is the largest block's."""
    step_bytes_per_token: int
    """Hidden states and intermediate results of one token while a block runs, generously."""
    scratch_bytes: int
    """Restored weights and the like while a block runs, whatever the number of tokens."""

    def __post_init__(self) -> None:
        if not self.weight_bytes or min(self.weight_bytes) < 0:
            raise ValueError("BlockSizes.weight_bytes needs one size for each block")
        if self.kv_bytes_per_token < 1 or self.step_bytes_per_token < 0 or self.scratch_bytes < 0:
            raise ValueError("BlockSizes needs kv_bytes_per_token above 0 and no negative sizes")

    @property
    def num_blocks(self) -> int:
        return len(self.weight_bytes)

    @property
    def largest_bytes(self) -> int:
        """Of the largest block."""
        return max(self.weight_bytes)

    def with_kv_bytes(self, kv_bytes_per_token: int) -> BlockSizes:
        """The same blocks where pages hold tokens in other sizes (a KV policy)."""
        return replace(self, kv_bytes_per_token=kv_bytes_per_token)

    def step_bytes(self, num_tokens: int) -> int:
        """Memory that a step of so many tokens needs besides weights and KV pages."""
        return self.scratch_bytes + num_tokens * self.step_bytes_per_token


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The weights of one block."""

    matrices: tuple[tuple[int, int, int], ...]
    """(N, K, how many) of matrices that may be kept in few bits; experts of a block count as one entry."""
    num_other_weights: int
    """Norms, biases, routers: always in the precision of the hidden states."""

    def size_bytes(self, weight_format: WeightFormat | None, dtype_bytes: int) -> int:
        """Memory of the block in a format, or as floats of so many bytes (None), as all its other weights are."""
        from swarm.weights.formats import MatrixShape

        num_weights = [n * k * count for n, k, count in self.matrices]
        if weight_format is None:
            return (sum(num_weights) + self.num_other_weights) * dtype_bytes
        # As quantise_block decides, matrix by matrix.
        chosen = weight_format.refine(num_weights)
        in_matrices = sum(
            one.size_bytes(MatrixShape(n, k)) * count for one, (n, k, count) in zip(chosen, self.matrices, strict=True)
        )
        return in_matrices + self.num_other_weights * dtype_bytes


class KVDims(NamedTuple):
    """Keys and values of one token in one block."""

    num_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The weights of all blocks, and what they keep of each token."""

    blocks: tuple[BlockShape, ...]
    hidden_size: int
    kv_dims: KVDims
    """Of what a block keeps of one token."""

    @property
    def kv_values_per_token(self) -> int:
        """Values that a block keeps of one token: keys and values of all KV heads."""
        return self.kv_dims.num_heads * (self.kv_dims.key_dim + self.kv_dims.value_dim)

    def sizes(self, precision: Precision, device: torch.device | str) -> BlockSizes:
        """What the blocks take on `device` ("cpu", "cuda:0").

        Raises:
            MissingDependencyError: this precision needs a package there that is not installed.
        """
        from swarm.weights import format_for, hidden_dtype_for

        dtype_bytes = hidden_dtype_for(precision, device).itemsize
        weight_format = format_for(precision, device)
        shapes = {shape[:2] for block in self.blocks for shape in block.matrices}
        widest = max((max(shape) for shape in shapes), default=self.hidden_size)
        largest = max((n * k for n, k in shapes), default=0)
        # Blocks are mostly alike.
        bytes_by_block = {block: block.size_bytes(weight_format, dtype_bytes) for block in set(self.blocks)}
        return BlockSizes(
            precision=precision.value,
            weight_bytes=tuple(bytes_by_block[block] for block in self.blocks),
            kv_bytes_per_token=max(self.kv_values_per_token * dtype_bytes, 1),
            # Residual, normed input, queries, keys, values and output; gate, up, their product; some in fp32.
            step_bytes_per_token=(8 * self.hidden_size + 4 * widest) * max(dtype_bytes, 4),
            # A long input multiplies with one restored matrix.
            scratch_bytes=0 if weight_format is None else largest * dtype_bytes,
        )


def measure_model_shape(config: PreTrainedConfig) -> ModelShape:
    """The shape of a model's blocks, from its classes built without any memory for weights.

    Raises:
        UnsupportedModelError: its blocks can not be found.
    """
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    from swarm.models.anatomy import dissect
    from swarm.models.loading import model_class_of

    config = copy.deepcopy(config)
    model_class_of(config, AutoModelForCausalLM)
    text_config: Any = config.get_text_config(decoder=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return ModelShape(
        blocks=tuple(_measure_block(block) for block in dissect(model, text_config).stack),
        hidden_size=int(text_config.hidden_size),
        kv_dims=_kv_dims(text_config),
    )


def _measure_block(block: torch.nn.Module) -> BlockShape:
    from swarm.weights.blocks import find_targets

    matrices = tuple(
        (target.shape.out_features, target.shape.in_features, target.num_experts or 1) for target in find_targets(block)
    )
    num_weights = sum(parameter.numel() for parameter in block.parameters())
    return BlockShape(matrices=matrices, num_other_weights=num_weights - sum(n * k * count for n, k, count in matrices))


def _kv_dims(config: Any) -> KVDims:
    """Keys and values of one token in one block, as transformers' attention hands them over."""
    num_heads = int(config.num_attention_heads)
    nope_dim = getattr(config, "qk_nope_head_dim", None)
    if nope_dim is not None:  # multi-head latent attention: heads are restored before they are stored
        return KVDims(num_heads, int(nope_dim + config.qk_rope_head_dim), int(config.v_head_dim))
    num_kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or int(config.hidden_size) // num_heads
    return KVDims(int(num_kv_heads), int(head_dim), int(head_dim))
