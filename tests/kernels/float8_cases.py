"""Operands of 8-bit products, and what float32 makes of the values that they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from test_routed_mlp import block

from pallas_kernels import mlp_reference
from pallas_kernels.float8 import (
    DTYPE,
    Float8Rows,
    dequantize,
    quantize_static,
    quantize_weight,
)
from pallas_kernels.mlp_weights import MLPWeights

# The kernels' error beside float32 of the same operands: their result is rounded once to 16 bits.
TOLERANCE = 3e-3


def run(module, *arrays, **options):
    """A module's kernels on these arguments."""
    statics, given = module.prepare(*arrays, **options)
    return module.launch(statics, *given)


def error(out: jax.Array, want: jax.Array) -> float:
    """Frobenius error."""
    got, exact = (np.asarray(x, np.float64) for x in (out, want))
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def error_before_rounding(out: Float8Rows, want: jax.Array) -> float:
    """What an error leaves beside that of rounding float32, where values are rounded at random."""
    own = error(dequantize(quantize_static(want, out.scale)), saturated(want, out.scale))
    whole = error(dequantize(out), saturated(want, out.scale))
    return max(whole**2 - own**2, 0) ** 0.5


def saturated(x: jax.Array, scale: jax.Array) -> jax.Array:
    """What 8 bits of this scale can hold of x."""
    return jnp.clip(x.astype(jnp.float32), -448 * scale, 448 * scale)


def check_quantized(out: Float8Rows, want: jax.Array) -> None:
    """Rounded once: half a unit of e4m3's last place, or of its smallest number."""
    assert out.values.dtype == DTYPE and out.scale.dtype == jnp.float32
    exact = np.asarray(want, np.float64)
    scale = np.asarray(out.scale, np.float64)
    scale = scale[..., None] if scale.ndim else scale
    exact = np.clip(exact, -448 * scale, 448 * scale)
    off = np.abs(np.asarray(dequantize(out), np.float64) - exact)
    # 1e-5 is what float32 is off by before.
    assert (off <= 2.0**-4 * np.abs(exact) + 2.0**-10 * scale + 1e-5).all()


def float8_block(**shape) -> tuple[jax.Array, jax.Array, MLPWeights]:
    """`test_routed_mlp.block` with its kernels in 8 bits."""
    x, index, weights = block(**shape)
    kernels = {name: quantize_weight(getattr(weights, name)) for name in ("kernel1", "kernel2")}
    scale = jnp.float32(2.0**-6)  # for GELU's output up to 7
    return x, index, weights._replace(**kernels, hidden_scale=scale)


def dequantized(weights: MLPWeights) -> MLPWeights:
    """What the weights stand for, in float32."""
    full = {name: dequantize(getattr(weights, name)) for name in ("kernel1", "kernel2")}
    return weights._replace(**full, hidden_scale=None)


def update(out: jax.Array, x: jax.Array) -> jax.Array:
    """What a block added to its stream, which would hide an error."""
    return out.astype(jnp.float32) - x.astype(jnp.float32)


def exact_update(x: jax.Array, weights: MLPWeights) -> jax.Array:
    """The update in float32, of the weights' values and of activations that are not quantised."""
    return mlp_reference.mlp_update(x.astype(jnp.float32), dequantized(weights), 1e-6)


def check_mlp(out, x, index, weights):
    """Near the XLA path, beside which values may be rounded the other way; other rows untouched."""
    index = jnp.tile(jnp.arange(x.shape[1]), (len(x), 1)) if index is None else index
    routed = np.zeros(x.shape[:2], bool)
    np.put_along_axis(routed, np.asarray(index), True, axis=1)
    update = mlp_reference.mlp_update(x.astype(jnp.float32), weights, 1e-6)
    got = np.asarray(out, np.float32) - np.asarray(x, np.float32)
    assert error(got[routed], np.asarray(update)[routed]) < 0.02
    np.testing.assert_array_equal(got[~routed], 0)
