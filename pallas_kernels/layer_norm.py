"""LayerNorm of tokens, as plain XLA or by the Mosaic GPU kernel that routed MLPs gather with.

XLA's own fusion reaches three quarters of the bandwidth that the kernel does (H200, ViT-L, batch 8:
46 against 35 us).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import gather_norm_kernel, reference
from pallas_kernels.choices import Implementation
from pallas_kernels.float8 import DTYPE, Float8Rows, quantize_rows
from pallas_kernels.hopper import KERNEL_DTYPES, OPERANDS, VECTOR_DTYPES, dtype_problems
from pallas_kernels.implementation import resolve


class Statics(NamedTuple):
    """What a launch knows when it is traced; `interpret` as in `plgpu.kernel`."""

    dtype: jnp.dtype  # of the result
    epsilon: float
    interpret: Any


def layer_norm(
    x: Float[Array, "*rows d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    *,
    dtype: DTypeLike | None = None,
    epsilon: float = 1e-6,
    implementation: Implementation = "auto",
) -> Float[Array, "*rows d"] | Float8Rows:
    """`(x - mean x) / sqrt(var x + epsilon) scale + bias` over the last axis, float32 inside.

    Args:
        x: Rows of any number and shape; for the kernel bfloat16 or float16.
        scale: For the kernel float32 or 16-bit.
        bias: Likewise.
        dtype: Of the result; None is x's. For the kernel bfloat16, float16 or float8_e4m3fn, which
            gives every row a scale.
        epsilon: Added to the variance.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        The normalised rows.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernel is differentiated; `"xla"` is differentiable.
    """
    d, dtype = x.shape[-1], jnp.dtype(dtype or x.dtype)
    problems = dtype_problems(KERNEL_DTYPES, x=x.dtype)
    problems += dtype_problems(tuple(OPERANDS), dtype=dtype)
    widest = gather_norm_kernel.widest()
    if d % 64 or not 64 <= d <= widest:
        problems.append(f"d must be a multiple of 64 up to {widest}, got {d}")
    for name, array in (("scale", scale), ("bias", bias)):
        if array.shape != (d,):
            raise ValueError(f"{name} must have shape {(d,)}, got {array.shape}")
    problems += dtype_problems(VECTOR_DTYPES, scale=scale.dtype, bias=bias.dtype)
    if resolve(implementation, function="layer_norm", problems=problems) == "xla":
        if dtype == DTYPE:
            return quantize_rows(reference.layer_norm(x, scale, bias, epsilon, jnp.float32))
        return reference.layer_norm(x, scale, bias, epsilon, dtype)
    statics, operands = prepare(x, scale, bias, dtype=dtype, epsilon=epsilon)
    return launch(statics, *operands)


def prepare(
    x: Array,
    scale: Array,
    bias: Array,
    *,
    dtype: DTypeLike | None = None,
    epsilon: float = 1e-6,
    interpret: Any = False,
) -> tuple[Statics, tuple[Array, Array, Array]]:
    """What `launch` takes, for checked arguments of `layer_norm`; `interpret` is for tests."""
    return Statics(jnp.dtype(dtype or x.dtype), epsilon, interpret), (x, scale, bias)


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def launch(statics: Statics, x: Array, scale: Array, bias: Array) -> Array | Float8Rows:
    """Run the kernel on what `prepare` gives; the result is that of `layer_norm`."""
    num_rows = x.size // x.shape[-1]
    kernel_statics, operands = gather_norm_kernel.prepare(
        x.reshape(num_rows, -1), scale, bias, **statics._asdict()
    )
    out = gather_norm_kernel.launch(kernel_statics, *operands)
    # A row of x in the place of a row, whether of values or of scales.
    return jax.tree.map(lambda y: y[:num_rows].reshape(*x.shape[:-1], *y.shape[1:]), out)
