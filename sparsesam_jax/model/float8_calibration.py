"""Static scales of a float8 encoder from photos, in the place of the bounds from its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Num

from sparsesam_jax.model.float8_scales import bounds, input_scales, set_scales
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.layers import add, gelu
from sparsesam_jax.model.sam import SamModel
from sparsesam_jax.model.transforms import normalise, resize_and_pad
from sparsesam_jax.sparsity.plan import Rankings, encoder_plan


def calibrate_float8(
    sam: SamModel, photos: Iterable[Num[np.ndarray, "height width 3"]], *, headroom: float = 2.0
) -> dict[str, float]:
    """Set a float8 model's static scales to what a handful of photos reach.

    The model works without it: its default scales come from bounds that hold for every photo, so
    nothing saturates (`float8_scales`). What a photo reaches is smaller, 1.5 to 5.7 times for
    `vit_t`. Scales that are made for it keep small numbers from e4m3's subnormal end, which helps
    where a few channels are far larger than the others; in return a photo that goes beyond
    `headroom` times what these reach saturates there. No scale gets larger than its bound.

    Args:
        sam: The model, changed in place; make predictors and `compiled()` anew.
        photos: RGB, 0 to 255, any sizes; eight will do.
        headroom: How much larger than on these photos a number may be before it saturates.

    Returns:
        The scale of every layer that has one, by names such as `3.lin2`: JSON for
        `set_float8_scales`.

    Raises:
        ValueError: The model is not in float8, there is no photo, or the headroom is below 1.
    """
    encoder = sam.image_encoder
    if encoder.products != "float8":
        raise ValueError(f'sam must have products="float8", got {encoder.products!r}')
    if not headroom >= 1:
        raise ValueError(f"headroom must be at least 1, got {headroom}")
    side, found = encoder.config.image_size, []
    for photo in photos:
        padded, size = resize_and_pad(photo, side)
        pixels = normalise(jnp.asarray(padded[None]), jnp.asarray([size]))
        found.append(np.asarray(_largest_inputs(encoder, pixels)))
    if not found:
        raise ValueError("photos must hold at least one, got none")
    for block, largest in zip(encoder.blocks, headroom * np.max(found, axis=0), strict=True):
        limits = (jnp.inf, jnp.inf) if block.is_replaced else bounds(block)
        set_scales(block, *map(jnp.minimum, largest, limits))
    return {name: float(x[...]) for name, x in input_scales(encoder.blocks).items()}


def set_float8_scales(sam: SamModel, found: Mapping[str, float]) -> None:
    """Set a float8 model's static scales to those that `calibrate_float8` returned for its weights.

    Args:
        sam: The model, changed in place.
        found: The scale of every layer that has one.

    Raises:
        ValueError: The names are not those of the model's layers, or a scale is not positive.
    """
    scales = input_scales(sam.image_encoder.blocks)
    if found.keys() != scales.keys() or not all(scale > 0 for scale in found.values()):
        expected = ", ".join(scales) or "no layer, for the model is not in float8"
        raise ValueError(f"found must be positive scales of {expected}, got {dict(found)}")
    for name, scale in found.items():
        scales[name][...] = jnp.float32(scale)


@nnx.jit
def _largest_inputs(encoder: ImageEncoder, pixels: Array) -> Array:
    """The largest absolute values of every block's attention output and GELU output, [depth, 2]."""
    x = encoder.embed(pixels)
    plans = encoder_plan(encoder.config, None, (x.shape[1], x.shape[2]), "xla")
    found = []
    for block, plan in zip(encoder.blocks, plans, strict=True):
        attended, _ = block.attn.attend(block.norm1(x), x, plan, Rankings())
        assert isinstance(attended, Array)
        x = block.attn.project(attended, plan, residual=x)
        hidden = gelu(block.mlp.lin1(block.norm2(x)))
        x = add(x, block.mlp.lin2(hidden))
        found.append(jnp.stack([jnp.abs(attended).max(), jnp.abs(hidden).max()]))
    return jnp.stack(found).astype(jnp.float32)
