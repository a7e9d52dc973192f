"""The MLP block of a transformer with its LayerNorm and residual, on all tokens or on routed ones.

The public functions, which run as plain XLA (`mlp_reference`) or as three Mosaic GPU kernels:
gather + LayerNorm to a compact buffer (`gather_norm_kernel`), the first product with bias and GELU,
and the second with bias, residual and scatter (`matmul_kernel`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import gather_norm_kernel, matmul_kernel, mlp_reference
from pallas_kernels.gather_norm_kernel import BLOCK_ROWS
from pallas_kernels.implementation import KERNEL_DTYPES, Implementation, no_gradient, resolve
from pallas_kernels.matmul_kernel import Config
from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.tuning import fitting_matmul, padded, tuned


class Statics(NamedTuple):
    """What a launch knows when it is traced.

    Attributes:
        epsilon: LayerNorm's.
        config1: Tiling of the first product.
        config2: Tiling of the second.
        interpret: False, or parameters of Mosaic GPU's interpret mode.
    """

    epsilon: float
    config1: Config
    config2: Config
    interpret: Any


def _check(x: Array, weights: MLPWeights) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, N, d], got {x.shape}")
    if weights.kernel1.ndim != 2:
        raise ValueError(f"kernel1 must have shape [d, h], got {weights.kernel1.shape}")
    d, h = x.shape[2], weights.kernel1.shape[1]
    shapes = ((d,), (d,), (d, h), (h,), (h, d), (d,))
    for (name, array), shape in zip(weights._asdict().items(), shapes, strict=True):
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for x {x.shape}, got {array.shape}")


def _problems(x: Array, weights: MLPWeights) -> list[str]:
    """What keeps the kernels from running a call, each as one clause."""
    problems = []
    kernel1, kernel2 = weights.kernel1, weights.kernel2
    if x.dtype not in KERNEL_DTYPES:
        problems.append(f"x must be bfloat16 or float16, got {x.dtype}")
    if kernel1.dtype not in KERNEL_DTYPES or kernel1.dtype != kernel2.dtype:
        dtypes = f"{kernel1.dtype} and {kernel2.dtype}"
        problems.append(f"kernel1 and kernel2 must be both bfloat16 or both float16, got {dtypes}")
    for name in ("norm_scale", "norm_bias", "bias1", "bias2"):
        array = getattr(weights, name)
        if array.dtype not in (*KERNEL_DTYPES, jnp.float32):
            problems.append(f"{name} must be float32, bfloat16 or float16, got {array.dtype}")
    for name, width in (("d", x.shape[2]), ("h", kernel1.shape[1])):
        if width % 64 or not 64 <= width <= 8192:
            problems.append(f"{name} must be a multiple of 64 up to 8192, got {width}")
    return problems


def routed_mlp(
    x: Float[Array, "B N d"],
    token_index: Int[Array, "B M"],
    weights: MLPWeights,
    *,
    epsilon: float = 1e-6,
    implementation: Implementation = "auto",
) -> Float[Array, "B N d"]:
    """An MLP block that runs on the routed tokens of every image and leaves the others alone.

    `x'[b, t] = x[b, t] + GELU(LN(x[b, t]) kernel1 + bias1) kernel2 + bias2` for t in
    `token_index[b]`, `x'[b, t] = x[b, t]` for all others; `LN(y) = (y - mean y) / sqrt(var y +
    epsilon) norm_scale + norm_bias`, GELU exact. LayerNorm, GELU and the sums of products are
    float32; the normalised rows and GELU's output are rounded to the products' dtype, the update to
    x's, which may be another. The kernels work in place where XLA finds x unused afterwards, and
    touch no token that is not routed.
    Source: the Residual-Consistency MLP, SparseSAM, arXiv 2605.17633.

    Args:
        x: The residual stream.
        token_index: The routed tokens of every image, int32, none twice, in any order.
        weights: The block's arrays; for the kernels, those of products both bfloat16 or both
            float16, vectors these or float32.
        epsilon: Added to the variance.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        The residual stream after the block, x's dtype.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernels are differentiated; `"xla"` is differentiable.
    """
    _check(x, weights)
    num_tokens = x.shape[1]
    if token_index.ndim != 2 or len(token_index) != len(x) or not token_index.shape[1]:
        raise ValueError(f"token_index must have shape [{len(x)}, M], got {token_index.shape}")
    if token_index.dtype != jnp.int32 or token_index.shape[1] > num_tokens:
        got = f"{token_index.dtype} {token_index.shape}"
        raise ValueError(f"token_index must be int32, at most {num_tokens} an image, got {got}")
    problems = [] if implementation == "xla" else _problems(x, weights)
    chosen = resolve(implementation, function="routed_mlp", problems=problems)
    program = mosaic_routed_mlp if chosen == "mosaic_gpu" else mlp_reference.routed_mlp
    return program(x, token_index, weights, epsilon=epsilon)


def mlp(
    x: Float[Array, "B N d"],
    weights: MLPWeights,
    *,
    epsilon: float = 1e-6,
    implementation: Implementation = "auto",
) -> Float[Array, "B N d"]:
    """An MLP block on all tokens, `x + GELU(LN(x) kernel1 + bias1) kernel2 + bias2`.

    Rounds as `routed_mlp` does.

    Args:
        x: The residual stream.
        weights: The block's arrays; for the kernels, those of products both bfloat16 or both
            float16, vectors these or float32.
        epsilon: Added to the variance.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        The residual stream after the block, x's dtype.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernels are differentiated; `"xla"` is differentiable.
    """
    _check(x, weights)
    problems = [] if implementation == "xla" else _problems(x, weights)
    chosen = resolve(implementation, function="mlp", problems=problems)
    program = mosaic_mlp if chosen == "mosaic_gpu" else mlp_reference.mlp
    return program(x, weights, epsilon=epsilon)


def mosaic_routed_mlp(
    x: Array,
    token_index: Array,
    weights: MLPWeights,
    *,
    epsilon: float = 1e-6,
    configs: tuple[Config, Config] | None = None,
    interpret: Any = False,
) -> Array:
    """The kernels on checked arguments; `configs` and `interpret` are for tests and tuning."""
    batch, num_tokens, d = x.shape
    rows = (token_index + jnp.arange(batch, dtype=jnp.int32)[:, None] * num_tokens).reshape(-1)
    statics = _statics(padded(len(rows)), weights, epsilon, configs, interpret)
    return _launch(statics, x.reshape(-1, d), rows, weights).reshape(x.shape)


def mosaic_mlp(
    x: Array,
    weights: MLPWeights,
    *,
    epsilon: float = 1e-6,
    configs: tuple[Config, Config] | None = None,
    interpret: Any = False,
) -> Array:
    """The kernels on checked arguments; `configs` and `interpret` are for tests and tuning."""
    d = x.shape[2]
    num_rows = x.size // d
    whole = num_rows == padded(num_rows)
    rows = None if whole else jnp.arange(num_rows, dtype=jnp.int32)
    statics = _statics(padded(num_rows), weights, epsilon, configs, interpret)
    return _launch(statics, x.reshape(-1, d), rows, weights).reshape(x.shape)


def _statics(
    num_rows: int,
    weights: MLPWeights,
    epsilon: float,
    configs: tuple[Config, Config] | None,
    interpret: Any,
) -> Statics:
    d, h = weights.kernel1.shape
    config1, config2 = configs or (
        fitting_matmul(tuned().to_output, num_rows, h, d),
        fitting_matmul(tuned().to_residual, num_rows, d, h),
    )
    assert config1 and config2, "a tile of 128 x 64 fits every width that is checked for"
    return Statics(epsilon, config1, config2, interpret)


# Jitted, so that an encoder traces and lowers the kernels once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def _launch(statics: Statics, x: Array, rows: Array | None, weights: MLPWeights) -> Array:
    """The three kernels on rows of x [any, d]: those that `rows` names, or all."""
    epsilon, config1, config2, interpret = statics
    x, weights = _undifferentiable(x, weights)
    num_rows = x.shape[0] if rows is None else len(rows)
    if rows is not None:
        # Padding repeats the last row: it may be read again, and is not written.
        rows = jnp.pad(rows, (0, padded(num_rows) - num_rows), mode="edge")
    norm_scale, norm_bias, kernel1, bias1, kernel2, bias2 = weights
    dtype = kernel1.dtype
    norm_statics = gather_norm_kernel.Statics(dtype, epsilon, BLOCK_ROWS, num_rows, interpret)
    normed = gather_norm_kernel.launch(norm_statics, x, norm_scale, norm_bias, rows=rows)
    gelu = matmul_kernel.Statics("gelu", config1, num_rows, interpret)
    hidden = matmul_kernel.launch(gelu, normed, kernel1, bias1)
    add = matmul_kernel.Statics("add", config2, num_rows, interpret)
    return matmul_kernel.launch(add, hidden, kernel2, bias2, rows=rows, x=x)


# Around the arguments and not the launch: a reference cannot live in a function with its own rule.
@jax.custom_jvp
def _undifferentiable(x: Array, weights: MLPWeights) -> tuple[Array, MLPWeights]:
    return x, weights


_undifferentiable.defjvp(no_gradient("routed_mlp"))
