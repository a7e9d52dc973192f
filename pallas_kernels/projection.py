"""A linear layer with its bias and residual in one pass over the output.

The public function, which runs as plain XLA or as the Mosaic GPU kernel of `matmul_kernel`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import matmul_kernel
from pallas_kernels.implementation import KERNEL_DTYPES, Implementation, no_gradient, resolve
from pallas_kernels.matmul_kernel import Config
from pallas_kernels.reference import matmul_precision
from pallas_kernels.tuning import fitting_matmul, padded, tuned


def projection(
    x: Float[Array, "*rows d"],
    kernel: Float[Array, "d n"],
    bias: Float[Array, " n"],
    *,
    residual: Float[Array, "*rows n"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*rows n"]:
    """`x kernel + bias`, or `residual + x kernel + bias`.

    The kernel accumulates and adds the bias in float32 and rounds once, and a second time behind
    the residual, which it updates in place where XLA finds it unused afterwards.

    Args:
        x: Rows of any number and shape; for the kernel bfloat16 or float16.
        kernel: Dtype of x.
        bias: Dtype of x or float32.
        residual: What the product is added to; for the kernel bfloat16 or float16.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        The layer's output, dtype of x or of the residual.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernel is differentiated; `"xla"` is differentiable.
    """
    d, n = x.shape[-1], bias.shape[0]
    if kernel.shape != (d, n):
        raise ValueError(f"kernel must have shape {(d, n)}, got {kernel.shape}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"residual must have shape {(*x.shape[:-1], n)}, got {residual.shape}")
    problems = []
    if x.dtype not in KERNEL_DTYPES or kernel.dtype != x.dtype:
        dtypes = f"{x.dtype} and {kernel.dtype}"
        problems.append(f"x and kernel must be both bfloat16 or both float16, got {dtypes}")
    if residual is not None and residual.dtype not in KERNEL_DTYPES:
        problems.append(f"residual must be bfloat16 or float16, got {residual.dtype}")
    for name, width in (("d", d), ("n", n)):
        if width % 64:
            problems.append(f"{name} must be a multiple of 64, got {width}")
    chosen = resolve(implementation, function="projection", problems=problems)
    if chosen == "mosaic_gpu":
        return mosaic_projection(x, kernel, bias, residual=residual)
    out = jnp.matmul(x, kernel, precision=matmul_precision(x.dtype)) + bias.astype(x.dtype)
    return out if residual is None else residual + out.astype(residual.dtype)


def mosaic_projection(
    x: Array,
    kernel: Array,
    bias: Array,
    *,
    residual: Array | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Array:
    """The kernel on checked arguments; `config` and `interpret` are for tests and tuning."""
    rows, (d, n) = x.size // x.shape[-1], kernel.shape
    table = tuned().to_output if residual is None else tuned().to_residual
    config = config or fitting_matmul(table, padded(rows), n, d)
    assert config is not None, "a tile of 128 x 64 fits every width that is checked for"
    statics = matmul_kernel.Statics("bias" if residual is None else "add", config, rows, interpret)
    flat = None if residual is None else residual.reshape(rows, n)
    out = _launch(statics, x.reshape(rows, d), kernel, bias, flat)
    return out.reshape(*x.shape[:-1], n)


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def _launch(
    statics: matmul_kernel.Statics, x: Array, kernel: Array, bias: Array, residual: Array | None
) -> Array:
    x, kernel, bias = _undifferentiable(x, kernel, bias)
    num_rows = statics.num_rows
    padding = padded(num_rows) - num_rows
    rows = None
    if padding:
        x = jnp.pad(x, ((0, padding), (0, 0)))
        rows = jnp.pad(jnp.arange(num_rows, dtype=jnp.int32), (0, padding), mode="edge")
    if residual is None:
        return matmul_kernel.launch(statics, x, kernel, bias)[:num_rows]
    return matmul_kernel.launch(statics, x, kernel, bias, rows=rows, x=residual)


# Around the arguments and not the launch: a reference cannot live in a function with its own rule.
@jax.custom_jvp
def _undifferentiable(x: Array, kernel: Array, bias: Array) -> tuple[Array, Array, Array]:
    return x, kernel, bias


_undifferentiable.defjvp(no_gradient("projection"))
