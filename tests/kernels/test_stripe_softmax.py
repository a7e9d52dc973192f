"""The running softmax of the stripe attention kernel, in plain jax.numpy."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels.stripe_softmax import PARTIAL, Softmax


def test_updates_by_steps_give_the_softmax_of_all_keys():
    rng = np.random.default_rng(0)
    logits = (10 * rng.standard_normal((6, 40))).astype(np.float32)
    logits[0, :16] = -np.inf  # as a diagonal block that the bar holds, but for the first step
    logits[0, 0] = 3.0
    values = rng.standard_normal((40, 5)).astype(np.float32)
    softmax = Softmax(jnp.full(6, -jnp.inf), jnp.zeros((6, PARTIAL)))
    out, scale = jnp.zeros((6, 5)), math.log2(math.e) / 4
    for keys in (slice(16), slice(16, 24), slice(24, 40)):
        softmax, weights, rescale = softmax.update(jnp.asarray(logits[:, keys]), scale)
        assert float(weights.max()) <= 1.0
        out = out * rescale[:, None] + weights @ values[keys]
    exact = np.exp(logits.astype(np.float64) / 4)
    want = exact / exact.sum(1, keepdims=True) @ values
    # float32 rounding of 40 terms of size 1.
    np.testing.assert_allclose(out * softmax.inverse_total()[:, None], want, atol=1e-5)
