"""The routed and the dense MLP in plain jax.numpy: what runs on a CPU, a TPU or an older GPU.

Differentiable, LayerNorm and GELU in float32. A routed MLP computes on the routed tokens only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.float8 import Float8Weight, quantize_rows, quantize_static
from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.reference import layer_norm, linear


def mlp_update(
    x: Float[Array, "... d"], weights: MLPWeights, epsilon: float
) -> Float[Array, "... d"]:
    """`MLP(LN(x))`, without the residual; x's dtype, while products are in that of the weights."""
    kernel1, kernel2 = weights.kernel1, weights.kernel2
    y = layer_norm(x, weights.norm_scale, weights.norm_bias, epsilon, jnp.float32)
    y = quantize_rows(y) if isinstance(kernel1, Float8Weight) else y.astype(kernel1.dtype)
    hidden = linear(y, kernel1).astype(jnp.float32) + weights.bias1
    if isinstance(kernel2, Float8Weight):
        assert weights.hidden_scale is not None, "the public functions check that it is there"
        hidden = quantize_static(gelu(hidden, kernel2.values.dtype), weights.hidden_scale)
    else:
        hidden = gelu(hidden, kernel2.dtype).astype(kernel2.dtype)
    update = linear(hidden, kernel2).astype(jnp.float32) + weights.bias2
    return update.astype(x.dtype)


def gelu(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Exact GELU of float32, before its result is rounded to a dtype.

    JAX's own goes by erfc, which is exact for large negative x and costs a GPU more than the rest
    of the pass. An erf's error, 1e-7 of x, is below the rounding to 16 bits but for results that
    are nearly zero.
    """
    if jnp.dtype(dtype).itemsize > 2:
        return jax.nn.gelu(x, approximate=False)
    return 0.5 * x * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))


def routed_mlp(
    x: Float[Array, "B N d"],
    token_index: Int[Array, "B M"],
    weights: MLPWeights,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "B N d"]:
    """Gather, MLP, scatter; `pallas_kernels.routed_mlp.routed_mlp` documents the arguments."""
    routed = jnp.take_along_axis(x, token_index[..., None], axis=1)
    image = jnp.arange(len(x))[:, None]
    update = mlp_update(routed, weights, epsilon)
    return x.at[image, token_index].add(update, unique_indices=True)


def mlp(
    x: Float[Array, "B N d"], weights: MLPWeights, *, epsilon: float = 1e-6
) -> Float[Array, "B N d"]:
    """`x + MLP(LN(x))` for every token."""
    return x + mlp_update(x, weights, epsilon)
