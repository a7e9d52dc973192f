"""PiToMe: tokens that are alone in feature space are protected, the others merge as in ToMe.

A token's energy is the mean over all tokens of `elu(cosine - margin)`. The 2 R tokens of the
highest energy (large clusters) are split by turns of their rank; each of the first half merges into
the token of the second that is most like it. R is the number of tokens to remove, at most half.

Source: PiToMe, arXiv 2405.16148, margin and ELU as its vision code has them (github
hchautran/PiToMe); `merging` says how it is applied to SAM.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsesam_jax.methods.merging import Grid, Merged, TokenMerging, matched, taken, unit
from sparsesam_jax.methods.sequences import product
from sparsesam_jax.methods.tome import removed_tokens

MARGIN = 0.5


@dataclasses.dataclass(frozen=True)
class PiToMe(TokenMerging):
    """Energy-based merging."""

    def count(self, tokens: int, grid: Grid) -> int:
        """Tokens left, half of them at least."""
        return tokens - removed_tokens(tokens, self.density)

    def match(self, features: Float[Array, "*batch N C"], grid: Grid) -> Merged:
        """Match the tokens of high energy among each other."""
        removed = removed_tokens(features.shape[-2], self.density)
        if removed == 0:
            every = jnp.broadcast_to(jnp.arange(features.shape[-2]), features.shape[:-1])
            return Merged(every, every)
        metric = unit(features)
        ranked = jnp.argsort(-_energy(metric), axis=-1, stable=True)
        mergeable, protected = ranked[..., : 2 * removed], ranked[..., 2 * removed :]
        sources, destinations = mergeable[..., ::2], mergeable[..., 1::2]
        similarity = product(
            "...ac,...bc->...ab", taken(metric, sources), taken(metric, destinations)
        )
        return matched(sources, destinations, similarity, removed, protected)

    def match_work(self, tokens: int, grid: Grid, channels: int) -> int:
        """The similarities, of which those between sources and destinations are a part."""
        return tokens**2 * channels


def _energy(metric: Float[Array, "*batch N C"]) -> Float[Array, "*batch N"]:
    """Mean over all tokens of `elu(cosine - margin)`, a chunk of tokens at a time."""
    count, batch = metric.shape[-2], metric.shape[:-2]
    size = min(count, 256)
    padded = jnp.pad(metric, ((0, 0),) * len(batch) + ((0, -count % size), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(*batch, -1, size, metric.shape[-1]), -3, 0)

    def chunk(part: Array) -> Array:
        similarity = product("...ac,...bc->...ab", part, metric)
        return jax.nn.elu(similarity - MARGIN).mean(-1)

    energy = jnp.moveaxis(jax.lax.map(chunk, chunks), 0, -2)
    return energy.reshape(*batch, -1)[..., :count]
