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
from pallas_kernels.choices import Implementation
from pallas_kernels.float8 import Float8Rows, Float8Weight, checked_shape, dtype_of
from pallas_kernels.hopper import KERNEL_DTYPES, VECTOR_DTYPES, dtype_problems
from pallas_kernels.implementation import resolve, undifferentiable
from pallas_kernels.matmul_kernel import Config
from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.tuning import fitting_matmul, padded


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
    shapes = {n: checked_shape(n, a) for n, a in weights._asdict().items() if a is not None}
    if len(shapes["kernel1"]) != 2:
        raise ValueError(f"kernel1 must have shape [d, h], got {shapes['kernel1']}")
    d, h = x.shape[2], shapes["kernel1"][1]
    expected = ((d,), (d,), (d, h), (h,), (h, d), (d,), ())
    for (name, got), shape in zip(shapes.items(), expected, strict=False):
        if got != shape:
            raise ValueError(f"{name} must have shape {shape} for x {x.shape}, got {got}")
    if (weights.hidden_scale is None) == isinstance(weights.kernel2, Float8Weight):
        got = f"{weights.hidden_scale} with {type(weights.kernel2).__name__}"
        raise ValueError(f"hidden_scale must be there for a kernel2 in 8 bits alone, got {got}")


def _problems(x: Array, weights: MLPWeights) -> list[str]:
    """What keeps the kernels from running a call, each as one clause."""
    kernel1, kernel2 = weights.kernel1, weights.kernel2
    problems = dtype_problems(KERNEL_DTYPES, x=x.dtype)
    dtypes = [k.dtype for k in (kernel1, kernel2) if not isinstance(k, Float8Weight)]
    if set(dtypes) not in [set(), *({dtype} for dtype in KERNEL_DTYPES)]:
        got = " and ".join(map(str, dtypes))
        problems.append(f"kernel1 and kernel2 must be both bfloat16 or both float16, got {got}")
    vectors = ("norm_scale", "norm_bias", "bias1", "bias2")
    vector_dtypes = {name: getattr(weights, name).dtype for name in vectors}
    problems += dtype_problems(VECTOR_DTYPES, **vector_dtypes)
    widest = {"d": gather_norm_kernel.widest(), "h": 8192}
    for name, width in (("d", x.shape[2]), ("h", len(weights.bias1))):
        if width % 64 or not 64 <= width <= widest[name]:
            problems.append(f"{name} must be a multiple of 64 up to {widest[name]}, got {width}")
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
        weights: The block's arrays; for the kernels, those of products all bfloat16 or all float16,
            or in 8 bits, vectors 16-bit or float32.
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
    if resolve(implementation, function="routed_mlp", problems=problems) == "xla":
        return mlp_reference.routed_mlp(x, token_index, weights, epsilon=epsilon)
    statics, operands = prepare(x, token_index, weights, epsilon=epsilon)
    return launch(statics, *operands)


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
        weights: The block's arrays; for the kernels, those of products all bfloat16 or all float16,
            or in 8 bits, vectors 16-bit or float32.
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
    if resolve(implementation, function="mlp", problems=problems) == "xla":
        return mlp_reference.mlp(x, weights, epsilon=epsilon)
    statics, operands = prepare(x, None, weights, epsilon=epsilon)
    return launch(statics, *operands)


def prepare(
    x: Array,
    token_index: Array | None,
    weights: MLPWeights,
    *,
    epsilon: float = 1e-6,
    configs: tuple[Config, Config] | None = None,
    interpret: Any = False,
) -> tuple[Statics, tuple[Array, Array | None, MLPWeights]]:
    """What `launch` takes, for checked arguments of `routed_mlp` or `mlp`.

    Args:
        x: The residual stream [B, N, d].
        token_index: The routed tokens of every image, int32 [B, M]; None is all tokens.
        weights: The block's arrays.
        epsilon: Added to the variance.
        configs: Tilings of the two products; None is the tuned ones.
        interpret: For tests: parameters of Mosaic GPU's interpret mode.

    Returns:
        Statics and operands, the tokens as rows of all images.
    """
    (batch, num_tokens, d), h = x.shape, len(weights.bias1)
    if token_index is not None:
        first_rows = jnp.arange(batch, dtype=jnp.int32)[:, None] * num_tokens
        rows = (token_index + first_rows).reshape(-1)
    elif (num_rows := batch * num_tokens) != padded(num_rows):
        rows = jnp.arange(num_rows, dtype=jnp.int32)
    else:
        rows = None
    m = padded(batch * num_tokens if rows is None else len(rows))
    config1, config2 = configs or (
        fitting_matmul("gelu", m, h, d, dtype_of(weights.kernel1)),
        fitting_matmul("add", m, d, h, dtype_of(weights.kernel2)),
    )
    assert config1 and config2, "a tile of 128 x 64 fits every width that is checked for"
    return Statics(epsilon, config1, config2, interpret), (x, rows, weights)


# Jitted, so that an encoder traces and lowers the kernels once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def launch(statics: Statics, x: Array, rows: Array | None, weights: MLPWeights) -> Array:
    """Run the three kernels on what `prepare` gives; the result is that of the public function.

    Args:
        statics: What is known when the launch is traced.
        x: The residual stream [B, N, d].
        rows: Rows of x as [B N, d] that are routed, int32 [M]; None is all, a multiple of
            `tuning.ROW_MULTIPLE`.
        weights: The block's arrays.
    """
    x, weights = undifferentiable("routed_mlp", (x, weights))
    flat = x.reshape(-1, x.shape[2])
    num_rows = len(flat) if rows is None else len(rows)
    if rows is not None:
        # Padding repeats the last row: it may be read again, and is not written.
        rows = jnp.pad(rows, (0, padded(num_rows) - num_rows), mode="edge")
    options: dict[str, Any] = dict(num_rows=num_rows, interpret=statics.interpret)
    norm_statics, operands = gather_norm_kernel.prepare(
        flat,
        weights.norm_scale,
        weights.norm_bias,
        rows,
        dtype=dtype_of(weights.kernel1),
        epsilon=statics.epsilon,
        **options,
    )
    normed = gather_norm_kernel.launch(norm_statics, *operands)

    gelu_statics, operands = matmul_kernel.prepare(
        normed,
        weights.kernel1,
        weights.bias1,
        epilogue="gelu",
        config=statics.config1,
        dtype=dtype_of(weights.kernel2),
        out_scale=weights.hidden_scale,
        **options,
    )
    hidden = matmul_kernel.launch(gelu_statics, *operands)
    if weights.hidden_scale is not None:
        hidden = Float8Rows(hidden, weights.hidden_scale)

    add_statics, operands = matmul_kernel.prepare(
        hidden,
        weights.kernel2,
        weights.bias2,
        rows,
        flat,
        epilogue="add",
        config=statics.config2,
        **options,
    )
    return matmul_kernel.launch(add_statics, *operands).reshape(x.shape)
