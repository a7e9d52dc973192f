"""A linear layer with its bias and residual in one pass over the output.

The public function, which runs as plain XLA or as the Mosaic GPU kernel of `matmul_kernel`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import matmul_kernel
from pallas_kernels.choices import Implementation
from pallas_kernels.float8 import Float8Rows, Float8Weight, checked_shape
from pallas_kernels.hopper import KERNEL_DTYPES, VECTOR_DTYPES, dtype_problems
from pallas_kernels.implementation import resolve, undifferentiable
from pallas_kernels.matmul_kernel import Config, Epilogue
from pallas_kernels.reference import linear
from pallas_kernels.tuning import fitting_matmul, padded


class Statics(NamedTuple):
    """What a launch knows when it is traced; `interpret` as in `plgpu.kernel`."""

    epilogue: Epilogue
    config: Config
    dtype: jnp.dtype  # of the result
    interpret: Any


def projection(
    x: Float[Array, "*rows d"] | Float8Rows,
    kernel: Float[Array, "d n"] | Float8Weight,
    bias: Float[Array, " n"],
    *,
    residual: Float[Array, "*rows n"] | None = None,
    dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*rows n"]:
    """`x kernel + bias`, or `residual + x kernel + bias`.

    The kernel accumulates and adds the bias in float32 and rounds once, and a second time behind
    the residual, which it updates in place where XLA finds it unused afterwards.

    Args:
        x: Rows of any number and shape; for the kernel 16-bit floats or `Float8Rows`.
        kernel: Dtype of x, or a `Float8Weight` for `Float8Rows`.
        bias: Dtype of x or float32.
        residual: What the product is added to; for the kernel bfloat16 or float16.
        dtype: Of the result, where x has 8 bits and there is no residual.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        The layer's output, dtype of x or of the residual, or the given one.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernel is differentiated; `"xla"` is differentiable.
    """
    if isinstance(x, Float8Rows) != isinstance(kernel, Float8Weight):
        got = f"{type(x).__name__} and {type(kernel).__name__}"
        raise ValueError(f"x and kernel must both have 8 bits or neither, got {got}")
    (*lead, d), n = checked_shape("x", x), bias.shape[0]
    if (shape := checked_shape("kernel", kernel)) != (d, n):
        raise ValueError(f"kernel must have shape {(d, n)}, got {shape}")
    if residual is not None and residual.shape != (*lead, n):
        raise ValueError(f"residual must have shape {(*lead, n)}, got {residual.shape}")
    own_dtype = getattr(x if residual is None else residual, "dtype", None)
    if dtype is None and own_dtype is None:
        raise ValueError("dtype must be given where x has 8 bits and no residual, got None")
    dtype = jnp.dtype(dtype or own_dtype)
    if own_dtype not in (None, dtype):
        raise ValueError(f"dtype must be {own_dtype} as x or the residual, got {dtype}")
    problems = []
    if isinstance(x, Float8Rows) or isinstance(kernel, Float8Weight):
        problems += dtype_problems(KERNEL_DTYPES, dtype=dtype)
        problems += dtype_problems(VECTOR_DTYPES, bias=bias.dtype)
    elif x.dtype not in KERNEL_DTYPES or kernel.dtype != x.dtype:
        dtypes = f"{x.dtype} and {kernel.dtype}"
        problems.append(f"x and kernel must be both bfloat16 or both float16, got {dtypes}")
    if residual is not None:
        problems += dtype_problems(KERNEL_DTYPES, residual=residual.dtype)
    for name, width in (("d", d), ("n", n)):
        if width % 64:
            problems.append(f"{name} must be a multiple of 64, got {width}")
    if resolve(implementation, function="projection", problems=problems) == "xla":
        out = linear(x, kernel)
        out = (out + bias.astype(out.dtype)).astype(dtype)
        return out if residual is None else residual + out
    statics, operands = prepare(x, kernel, bias, residual=residual, dtype=dtype)
    return launch(statics, *operands)


def prepare(
    x: Array | Float8Rows,
    kernel: Array | Float8Weight,
    bias: Array,
    *,
    residual: Array | None = None,
    dtype: DTypeLike | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> tuple[Statics, tuple[Array | Float8Rows, Array | Float8Weight, Array, Array | None]]:
    """What `launch` takes, for checked arguments of `projection`.

    Args:
        x: Rows of any number and shape.
        kernel: [d, n].
        bias: [n].
        residual: What the product is added to.
        dtype: Of the result; None is the residual's, or else x's.
        config: How the kernel runs; None is the tuned one.
        interpret: For tests: parameters of Mosaic GPU's interpret mode.
    """
    epilogue = "bias" if residual is None else "add"
    values = x.values if isinstance(x, Float8Rows) else x
    d, n = values.shape[-1], bias.shape[0]
    config = config or fitting_matmul(epilogue, padded(values.size // d), n, d, values.dtype)
    assert config is not None, "a tile of 128 x 64 fits every width that is checked for"
    dtype = jnp.dtype(dtype or (values if residual is None else residual).dtype)
    return Statics(epilogue, config, dtype, interpret), (x, kernel, bias, residual)


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def launch(
    statics: Statics,
    x: Array | Float8Rows,
    kernel: Array | Float8Weight,
    bias: Array,
    residual: Array | None = None,
) -> Array:
    """Run the kernel on what `prepare` gives; the result is that of `projection`."""
    x, kernel, bias, residual = undifferentiable("projection", (x, kernel, bias, residual))
    values = x.values if isinstance(x, Float8Rows) else x
    (*lead, d), n = values.shape, bias.shape[0]
    num_rows = values.size // d
    padding, rows = padded(num_rows) - num_rows, None

    def flat(array: Array, *width: int) -> Array:
        array = array.reshape(num_rows, *width)
        return jnp.pad(array, ((0, padding), (0, 0))[: array.ndim]) if padding else array

    if isinstance(x, Float8Rows):
        scale = flat(x.scale) if x.scale.ndim else x.scale
        a = Float8Rows(flat(values, d), scale)
    else:
        a = flat(values, d)
    if padding and residual is not None:
        rows = jnp.pad(jnp.arange(num_rows, dtype=jnp.int32), (0, padding), mode="edge")
    kernel_statics, operands = matmul_kernel.prepare(
        a,
        kernel,
        bias,
        rows,
        None if residual is None else residual.reshape(num_rows, n),
        num_rows=num_rows,
        **statics._asdict(),
    )
    out = matmul_kernel.launch(kernel_statics, *operands)
    return out[:num_rows].reshape(*lead, n)
