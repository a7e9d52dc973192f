"""What attention's and GELU's outputs are divided by before they become e4m3: bounds from weights.

The k-th input of a layer behind LayerNorm is `y_k = g_k z_k + b_k`, where z has mean 0 and a length
of at most sqrt(d). So channel j of `y W + c` lies within

    b . W_j + c_j +- sqrt(d) ||P (g W_j)||,    P x = x - mean(x),

whatever the photo. Attention's output is a mean of values, and so within the bounds of the values;
GELU's within those of its input, and at least -0.17. The scale is the power of two that puts the
largest channel's bound just below e4m3's largest number, 448, so that nothing saturates. On one
photo the largest numbers of `vit_t`'s layers were 1.5 to 5.7 times below their bounds. That costs
at most three of the fifteen binary orders in which e4m3 has full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.float8 import LARGEST, quantize_weight
from sparsesam_jax.model.blocks import Block
from sparsesam_jax.model.float8 import (
    PARTS,
    STATIC,
    Float8Kernel,
    Float8Linear,
    Float8Scale,
    chosen_layers,
    kernel_of,
)

Model = TypeVar("Model", bound=nnx.Module)

_ROUNDING = 2.0**-4  # the largest relative error of a number in e4m3
_SLACK = 1.01  # for 16-bit roundings of what is bounded
_LEAST_GELU = 0.17


def quantise_blocks(blocks: Sequence[Block], patterns: Sequence[str] | None) -> None:
    """Put `Float8Linear` in the place of the layers that patterns choose, bounds included.

    Raises:
        ValueError: As `chosen_layers`, or a block has layers that are not SAM's own any more, of
            which no bound is known.
    """
    chosen = chosen_layers(patterns, len(blocks))
    for index in {index for index, _ in chosen}:
        if blocks[index].is_replaced:
            raise ValueError(
                f"block {index} must have SAM's own layers to be put into float8, got others; a "
                "layer that was replaced, as by LoRA, must be merged into SAM's own first"
            )
    for index, name in chosen:
        if type(layer := _layer(blocks[index], name)) is nnx.Linear:
            new = Float8Linear(layer, static=name in STATIC)
            setattr(getattr(blocks[index], PARTS[name]), name, new)
    set_bounds([blocks[index] for index in {index for index, _ in chosen}])


def filled(abstract: Model, load: Callable[[str, str], Any]) -> Model:
    """A model of shapes with values for its parameters; call `set_bounds` of its blocks then.

    Args:
        abstract: What `Sam.abstract` gives, or a part of it.
        load: Takes a parameter's name in the model without float8 and a dtype, and returns its
            array. What is to be quantised is asked for in float32, one at a time.
    """
    graphdef, state = nnx.split(abstract)
    values = []
    for key, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, key))
        if isinstance(leaf, Float8Scale):
            value = jnp.ones((), jnp.float32)
        elif isinstance(leaf, Float8Kernel):
            value = quantize_weight(jnp.asarray(load(name, "float32")))
        else:  # a copy: what is loaded may be a view of a file
            value = jnp.array(load(name, leaf.dtype.name))
        values.append((key, leaf.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(values))


def has_float8(blocks: Sequence[Block]) -> bool:
    """Whether any layer is in float8."""
    return any(isinstance(_layer(b, name), Float8Linear) for b in blocks for name in PARTS)


def input_scales(blocks: Sequence[Block]) -> dict[str, Float8Scale]:
    """The static scale of every layer that has one, by names such as `3.lin2`."""
    return {
        f"{index}.{name}": layer.input_scale
        for index, block in enumerate(blocks)
        for name in STATIC
        if isinstance(layer := _layer(block, name), Float8Linear) and layer.input_scale is not None
    }


def set_bounds(blocks: Sequence[Block]) -> None:
    """Derive all static scales from the weights, as they are when a model is made or loaded."""
    for block in blocks:
        if input_scales([block]):
            set_scales(block, *bounds(block))


def set_scales(block: Block, attended: Float[Array, ""], hidden: Float[Array, ""]) -> None:
    """Set a block's static scales from the largest absolute values of their layers' inputs."""
    scales = input_scales([block])
    for name, largest in (("0.proj", attended), ("0.lin2", hidden)):
        if name in scales:
            scales[name][...] = scale_for(largest)


def scale_for(largest: Float[Array, ""]) -> Float[Array, ""]:
    """The power of two that brings a number to at least 224 and less than 448."""
    _, exponent = jnp.frexp(largest.astype(jnp.float32) / LARGEST)
    return jnp.ldexp(jnp.ones((), jnp.float32), exponent)


def bounds(block: Block) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What the attention's output without the value bias, and GELU's, cannot exceed."""
    d = block.config.embed_dim
    centre, radius = _outputs(block.norm1, kernel_of(block.attn.qkv, jnp.float32)[:, 2 * d :])
    attended = (jnp.abs(centre) + radius).max()
    centre, radius = _outputs(block.norm2, kernel_of(block.mlp.lin1, jnp.float32))
    assert block.mlp.lin1.bias is not None
    largest = (centre + block.mlp.lin1.bias[...].astype(jnp.float32) + radius).max()
    return _SLACK * attended, _SLACK * jnp.maximum(largest, _LEAST_GELU)


def _layer(block: Block, name: str) -> Any:
    return getattr(getattr(block, PARTS[name]), name)


def _outputs(norm: nnx.LayerNorm, kernel: Float[Array, "d n"]) -> tuple[Array, Array]:
    """Middle and half-width of what each channel of `LayerNorm(x) kernel` can be."""
    assert norm.scale is not None and norm.bias is not None
    return _interval(norm.scale[...], norm.bias[...], kernel)


@jax.jit
def _interval(scale: Array, bias: Array, kernel: Array) -> tuple[Array, Array]:
    scaled = scale.astype(jnp.float32)[:, None] * kernel
    shifts = bias.astype(jnp.float32)[:, None] * kernel
    side = jnp.sqrt(jnp.float32(len(kernel)))
    radius = side * jnp.linalg.norm(scaled - scaled.mean(0), axis=0)
    # LayerNorm's output itself is rounded to e4m3.
    rounding = side * jnp.linalg.norm(scaled, axis=0) + jnp.abs(shifts).sum(0)
    return shifts.sum(0), radius + _ROUNDING * rounding
