"""LayerNorm of tokens, as plain XLA or by the Mosaic GPU kernel that routed MLPs gather with.

XLA's own fusion reaches three quarters of the bandwidth that the kernel does (H200, ViT-L, batch 8:
46 against 35 us).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import gather_norm_kernel, reference
from pallas_kernels.gather_norm_kernel import BLOCK_ROWS
from pallas_kernels.implementation import KERNEL_DTYPES, Implementation, no_gradient, resolve


def layer_norm(
    x: Float[Array, "*rows d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    *,
    dtype: DTypeLike | None = None,
    epsilon: float = 1e-6,
    implementation: Implementation = "auto",
) -> Float[Array, "*rows d"]:
    """`(x - mean x) / sqrt(var x + epsilon) scale + bias` over the last axis, float32 inside.

    Args:
        x: Rows of any number and shape; for the kernel bfloat16 or float16.
        scale: For the kernel float32 or 16-bit.
        bias: Likewise.
        dtype: Of the result; None is x's. For the kernel bfloat16 or float16.
        epsilon: Added to the variance.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        The normalised rows.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernel is differentiated; `"xla"` is differentiable.
    """
    d, dtype = x.shape[-1], jnp.dtype(dtype or x.dtype)
    problems = []
    for name, of in (("x", x.dtype), ("dtype", dtype)):
        if of not in KERNEL_DTYPES:
            problems.append(f"{name} must be bfloat16 or float16, got {of}")
    if d % 64 or not 64 <= d <= 8192:
        problems.append(f"d must be a multiple of 64 up to 8192, got {d}")
    for name, array in (("scale", scale), ("bias", bias)):
        if array.shape != (d,):
            raise ValueError(f"{name} must have shape {(d,)}, got {array.shape}")
        if array.dtype not in (*KERNEL_DTYPES, jnp.float32):
            problems.append(f"{name} must be float32, bfloat16 or float16, got {array.dtype}")
    chosen = resolve(implementation, function="layer_norm", problems=problems)
    if chosen == "mosaic_gpu":
        return mosaic_layer_norm(x, scale, bias, dtype=dtype, epsilon=epsilon)
    return reference.layer_norm(x, scale, bias, epsilon, dtype)


def mosaic_layer_norm(
    x: Array,
    scale: Array,
    bias: Array,
    *,
    dtype: DTypeLike | None = None,
    epsilon: float = 1e-6,
    interpret: Any = False,
) -> Array:
    """The kernel on checked arguments; `interpret` is for tests."""
    num_rows = x.size // x.shape[-1]
    dtype = jnp.dtype(dtype or x.dtype)
    statics = gather_norm_kernel.Statics(dtype, epsilon, BLOCK_ROWS, num_rows, interpret)
    return _launch(statics, x.reshape(num_rows, -1), scale, bias).reshape(x.shape)


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def _launch(statics: gather_norm_kernel.Statics, x: Array, scale: Array, bias: Array) -> Array:
    x, scale, bias = _undifferentiable(x, scale, bias)
    num_rows, padding = statics.num_rows, -statics.num_rows % BLOCK_ROWS
    rows = None
    if padding:
        rows = jnp.pad(jnp.arange(num_rows, dtype=jnp.int32), (0, padding), mode="edge")
    return gather_norm_kernel.launch(statics, x, scale, bias, rows=rows)[:num_rows]


# Around the arguments and not the launch: a reference cannot live in a function with its own rule.
@jax.custom_jvp
def _undifferentiable(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    return x, scale, bias


_undifferentiable.defjvp(no_gradient("layer_norm"))
