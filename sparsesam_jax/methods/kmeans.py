"""K-means replacement: in the MLP, tokens are replaced by the mean of their cluster.

Windowed blocks cluster the tokens of the whole grid after LayerNorm into `max(1, round(r N))`
clusters (Lloyd's algorithm from evenly spaced tokens), the MLP runs on the means, and every token
receives its cluster's update. Attention stays dense. An analysis and no way to save work: finding
the clusters costs more than the MLP, which the counted work shows.

Source: the control of SparseSAM, arXiv 2605.17633, Fig. 4, of which no code is published.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsesam_jax.methods.merging import Grid, Merged, TokenMerging
from sparsesam_jax.methods.sequences import product

ITERATIONS = 5


@dataclasses.dataclass(frozen=True)
class KMeans(TokenMerging):
    """K-means replacement."""

    merges_attention: ClassVar[bool] = False
    keeps_identity: ClassVar[bool] = True

    def count(self, tokens: int, grid: Grid) -> int:
        """Clusters."""
        return max(1, round(self.density * tokens))

    def match(self, features: Float[Array, "*batch N C"], grid: Grid) -> Merged:
        """Cluster the tokens; an empty cluster keeps its centre."""
        tokens = features.shape[-2]
        first = np.linspace(0, tokens - 1, self.count(tokens, grid)).round().astype(int)
        features = features.astype(jnp.float32)
        centres = features[..., first, :]
        destination = jnp.broadcast_to(first, (*features.shape[:-2], len(first)))
        merged = Merged(_nearest(features, centres), destination)
        for _ in range(ITERATIONS - 1):
            empty = merged.sizes[..., None] == 0
            centres = jnp.where(empty, centres, merged.merge(features))
            merged = Merged(_nearest(features, centres), destination)
        return merged

    def match_work(self, tokens: int, grid: Grid, channels: int) -> int:
        """The distances of every iteration."""
        return ITERATIONS * tokens * self.count(tokens, grid) * channels


def _nearest(features: Array, centres: Array) -> Array:
    """The nearest centre of every token."""
    products = product("...nc,...kc->...nk", features, centres)
    return ((centres**2).sum(-1)[..., None, :] - 2 * products).argmin(-1)
