"""The running softmax of the stripe attention kernel: a row's maximum and total so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

PARTIAL = 8  # columns that a total is kept in


class Softmax(NamedTuple):
    """Maximum and total of the weights `2 ** (scale logits - maximum)` over the keys so far.

    Attributes:
        maximum: Of the scaled logits, [rows].
        total: Of the weights, [rows, PARTIAL]: every thread sums its own columns, so that a row's
            threads meet once at the end and not once a step.
    """

    maximum: Any
    total: Any

    def update(self, logits: Any, scale: float) -> tuple[Softmax, Any, Any]:
        """The state after further keys.

        Args:
            logits: Of these, [rows, keys], keys a multiple of `PARTIAL`.
            scale: The softmax scale times log2(e).

        Returns:
            The state, the keys' weights [rows, keys], and what to multiply by what was summed with
            earlier weights, [rows].
        """
        maximum = jnp.maximum(self.maximum, logits.max(axis=1) * scale)
        weights = jnp.exp2(logits * scale - lax.broadcast_in_dim(maximum, logits.shape, [0]))
        rescale = jnp.exp2(self.maximum - maximum)
        total = self.total * lax.broadcast_in_dim(rescale, self.total.shape, [0])
        for start in range(0, logits.shape[1], PARTIAL):
            total = total + weights[:, start : start + PARTIAL]
        return Softmax(maximum, total), weights, rescale

    def inverse_total(self) -> Any:
        """What to multiply by the sums of values to get attention's output, [rows]."""
        return 1.0 / self.total.sum(axis=1)
