"""ToMe: every other token merges into the token of the rest that is most like it.

Tokens are split by turns in raster order; of the first half, the ones most similar to some token of
the second (cosine) merge into it. At most half of the tokens can go, so densities below 0.5 keep
half of them.

Source: ToMe, arXiv 2210.09461; `merging` says how it is applied to SAM.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsesam_jax.methods.merging import Grid, Merged, TokenMerging, matched, unit
from sparsesam_jax.methods.sequences import product


@dataclasses.dataclass(frozen=True)
class ToMe(TokenMerging):
    """Bipartite soft matching of alternating tokens."""

    def count(self, tokens: int, grid: Grid) -> int:
        """Tokens left, half of them at least."""
        return tokens - removed_tokens(tokens, self.density)

    def match(self, features: Float[Array, "*batch N C"], grid: Grid) -> Merged:
        """Match tokens 0, 2, 4 ... to tokens 1, 3, 5 ...."""
        tokens = features.shape[-2]
        metric = unit(features)
        similarity = product("...ac,...bc->...ab", metric[..., ::2, :], metric[..., 1::2, :])
        places = jnp.broadcast_to(jnp.arange(tokens), features.shape[:-1])
        sources, destinations = places[..., ::2], places[..., 1::2]
        removed = removed_tokens(tokens, self.density)
        return matched(sources, destinations, similarity, removed)

    def match_work(self, tokens: int, grid: Grid, channels: int) -> int:
        """The similarities."""
        return -(-tokens // 2) * (tokens // 2) * channels


def removed_tokens(tokens: int, density: float) -> int:
    """Tokens that merge into another one: at most half of them."""
    return min(math.floor(tokens - tokens * density + 1e-9), tokens // 2)
