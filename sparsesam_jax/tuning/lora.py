"""Low-rank updates of the image encoder's qkv layers (LoRA, Hu et al., arXiv 2106.09685).

`qkv(x) = x W + b + x A B` with A [d, r] and B [r, 3 d]. Only A and B are tuned; merged, they are a
plain model again, `W + A B`.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.model.blocks import Block
from sparsesam_jax.model.layers import linear
from sparsesam_jax.model.sam import SamModel

Model = TypeVar("Model", bound=SamModel)


def add_lora(sam: Model, rank: int, seed: int = 0) -> Model:
    """The same model, sharing its parameters, with a low-rank update that is zero at first.

    Args:
        sam: A model without one.
        rank: Columns r of A.
        seed: Of A; B is zero.

    Raises:
        ValueError: `rank` is not positive, or the model has an update already.
    """
    if rank < 1:
        raise ValueError(f"rank must be positive, got {rank}")
    if has_lora(sam):
        raise ValueError("sam must have plain qkv layers, got a low-rank update; merge it first")
    model, rngs = nnx.merge(*nnx.split(sam)), nnx.Rngs(seed)
    for block in model.image_encoder.blocks:
        layer, dtypes = block.attn.qkv, block.dtypes
        block.attn.qkv = nnx.LoRALinear(
            layer.in_features,
            layer.out_features,
            lora_rank=rank,
            dtype=dtypes.compute,
            lora_dtype=dtypes.compute,
            precision=dtypes.precision,
            rngs=rngs,
        )
        block.attn.qkv.kernel, block.attn.qkv.bias = layer.kernel, layer.bias
    return model


def merge_lora(sam: Model) -> Model:
    """The plain model that computes the same; one without an update comes back as it is."""
    if not has_lora(sam):
        return sam
    model = nnx.merge(*nnx.split(sam))
    for block in model.image_encoder.blocks:
        layer = block.attn.qkv
        plain = linear(layer.in_features, layer.out_features, dtypes=block.dtypes, rngs=nnx.Rngs(0))
        a, b = (leaf.get_value() for leaf in _update(block))
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        plain.kernel[...] = (layer.kernel[...] + update).astype(layer.kernel.dtype)
        plain.bias = layer.bias
        block.attn.qkv = plain
    return model


def has_lora(sam: SamModel) -> bool:
    """Whether the qkv layers have a low-rank update."""
    return any(isinstance(block.attn.qkv, nnx.LoRALinear) for block in sam.image_encoder.blocks)


def save_lora(sam: SamModel, path: str | os.PathLike[str]) -> None:
    """Write the update alone, as safetensors: some hundredths of the model's size.

    Raises:
        ValueError: The model has none.
    """
    if not has_lora(sam):
        raise ValueError("sam must have a low-rank update to save, got plain qkv layers")
    arrays = {name: np.asarray(leaf.get_value()) for name, leaf in _leaves(sam).items()}
    with atomic_path(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary)


def load_lora(sam: Model, path: str | os.PathLike[str]) -> Model:
    """A plain model with the update that `save_lora` wrote.

    Raises:
        ValueError: The file is none of such a model.
    """
    arrays = safetensors.numpy.load_file(path)
    ranks = {array.shape[1] for name, array in arrays.items() if name.endswith("lora_a")}
    if len(ranks) != 1:
        raise ValueError(f"{path} must hold a low-rank update of qkv, got {len(ranks)} ranks")
    model = add_lora(sam, ranks.pop())
    leaves = _leaves(model)
    found = {name: array.shape for name, array in arrays.items()}
    expected = {name: leaf.get_value().shape for name, leaf in leaves.items()}
    if found != expected:
        raise ValueError(f"{path} must hold the update of such a model, got other names or shapes")
    for name, leaf in leaves.items():
        leaf.set_value(jnp.asarray(arrays[name]))
    return model


def _leaves(sam: SamModel) -> dict[str, Any]:
    """The model's own variables of the update by name."""
    return {
        f"image_encoder.blocks.{index}.attn.qkv.lora.{name}": leaf
        for index, block in enumerate(sam.image_encoder.blocks)
        for name, leaf in zip(("lora_a", "lora_b"), _update(block), strict=True)
    }


def _update(block: Block) -> tuple[nnx.Variable, nnx.Variable]:
    """A and B of a block."""
    layer = block.attn.qkv
    assert isinstance(layer, nnx.LoRALinear)
    return layer.lora.lora_a, layer.lora.lora_b
