"""8-bit floats (e4m3) with their scales: operands of products at twice the rate of 16 bits.

e4m3 has 3 bits of fraction and ends at 448. What it holds is `values * scale`, where the scale is
float32: one of every row for what LayerNorm gives, whose outliers would cost the other rows their
precision; one of the whole array, known beforehand, for what GELU and attention give; one of every
output channel for weights. So no product needs a scale inside its sums, and nothing is read twice
to find one. Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

DTYPE = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = float(jnp.finfo(DTYPE).max)  # 448
SMALLEST_MAXIMUM = 1e-30  # of a row or channel: zeros have a scale that one can divide by


class Float8Rows(NamedTuple):
    """Activations, `values * scale`.

    Attributes:
        values: e4m3.
        scale: Of every row, or [] of all.
    """

    values: Float[Array, "*rows d"]
    scale: Float[Array, "*rows"]


class Float8Weight(NamedTuple):
    """The kernel of a linear layer, `(values * scale[:, None]).T` as [d, n].

    Attributes:
        values: e4m3, an output channel's inputs beside each other, as the tensor core reads 8 bits.
        scale: Of every output channel.
    """

    values: Float[Array, "n d"]
    scale: Float[Array, " n"]


def quantize_rows(x: Float[Array, "*rows d"]) -> Float8Rows:
    """The rows with a scale each: their largest absolute value over 448."""
    x = x.astype(jnp.float32)
    scale, inverse = scales_of(jnp.abs(x).max(axis=-1))
    return Float8Rows(saturated(x * inverse[..., None]), scale)


def quantize_static(x: Float[Array, "*rows d"], scale: Float[ArrayLike, ""]) -> Float8Rows:
    """The rows with a given scale; what is beyond 448 of it saturates, NaN stays NaN."""
    scale = jnp.asarray(scale, jnp.float32)
    return Float8Rows(saturated(x.astype(jnp.float32) / scale), scale)


def quantize_weight(kernel: Float[Array, "d n"]) -> Float8Weight:
    """A linear layer's kernel with a scale an output channel."""
    return Float8Weight(*quantize_rows(kernel.T))


def scales_of(
    maximum: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Scales for the largest absolute values of rows, and what the rows are multiplied by."""
    maximum = jnp.maximum(maximum, SMALLEST_MAXIMUM)
    return maximum / LARGEST, LARGEST / maximum


def dequantize(x: Float8Rows | Float8Weight, dtype: DTypeLike = jnp.float32) -> Array:
    """The rows, or the kernel as [d, n]."""
    scale = x.scale[..., None] if x.scale.ndim else x.scale
    full = (x.values.astype(jnp.float32) * scale).astype(dtype)
    return full.T if isinstance(x, Float8Weight) else full


def checked_shape(name: str, x: Array | Float8Rows | Float8Weight) -> tuple[int, ...]:
    """The shape of what x stands for: of an array, of rows [*rows, d] or of a kernel [d, n].

    Raises:
        ValueError: Values are not e4m3, or the scale is not theirs.
    """
    if not isinstance(x, Float8Rows | Float8Weight):
        return x.shape
    values, scale = x
    shapes = [values.shape[:-1], *([()] if isinstance(x, Float8Rows) else [])]
    if values.dtype != DTYPE or scale.dtype != jnp.float32 or scale.shape not in shapes:
        expected = f"{DTYPE} values and a float32 scale of shape {' or '.join(map(str, shapes))}"
        got = f"{values.dtype} and {scale.dtype} {scale.shape}"
        raise ValueError(f"{name} must have {expected}, got {got}")
    return values.shape[::-1] if isinstance(x, Float8Weight) else values.shape


def dtype_of(x: Array | Float8Rows | Float8Weight) -> jnp.dtype:
    """The dtype of an operand of a product."""
    return x.values.dtype if isinstance(x, Float8Rows | Float8Weight) else x.dtype


def saturated(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """To e4m3: the nearest, at most 448. XLA's own conversion makes NaN of what is beyond."""
    return jnp.clip(x, -LARGEST, LARGEST).astype(DTYPE)


def product(x: Float8Rows, weight: Float8Weight) -> Float[Array, "*rows n"]:
    """`dequantize(x) @ dequantize(weight)` in float32 by a product of 8-bit operands."""
    lhs, rhs = x.values, weight.values
    if not _multiplies_float8():
        lhs, rhs = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)  # exact
    contraction = ((lhs.ndim - 1,), (1,)), ((), ())
    sums = lax.dot_general(lhs, rhs, contraction, preferred_element_type=jnp.float32)
    if x.scale.ndim:
        return sums * x.scale[..., None] * weight.scale
    return sums * (x.scale * weight.scale)


def _multiplies_float8() -> bool:
    """Whether XLA multiplies 8-bit floats on the default device: GPUs before Ada do not."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None:
        return True
    return tuple(map(int, str(capability).split("."))) >= (8, 9)
