"""The MLP block's XLA path beside its equation; a file of its own, as GPU tests lack hypothesis."""

from __future__ import annotations

import functools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_routed_mlp import block

from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.routed_mlp import mlp, routed_mlp


def numpy_block(x: np.ndarray, weights: MLPWeights) -> np.ndarray:
    """The block's equation in float64."""
    from scipy.special import erf  # pyright: ignore[reportMissingImports]

    scale, bias, kernel1, bias1, kernel2, bias2 = (np.asarray(w, np.float64) for w in weights[:6])
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias
    hidden = y @ kernel1 + bias1
    return x + hidden * (1 + erf(hidden / np.sqrt(2))) / 2 @ kernel2 + bias2


@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(1, 9),
    batch=st.integers(1, 3),
    data=st.data(),
)
def test_xla_is_the_equation(seed, num_tokens, batch, data):
    routed = data.draw(st.integers(1, num_tokens))
    x, index, weights = block(
        batch=batch, num_tokens=num_tokens, routed=routed, d=8, h=12, dtype="float32", seed=seed
    )
    sparse, dense = (jax.jit(functools.partial(f, implementation="xla")) for f in (routed_mlp, mlp))
    out = np.asarray(sparse(x, index, weights))
    full = numpy_block(np.asarray(x, np.float64), weights)
    want = np.array(x, np.float64)
    for image, tokens in enumerate(np.asarray(index)):
        want[image, tokens] = full[image, tokens]
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dense(x, weights), full, rtol=1e-5, atol=1e-5)
