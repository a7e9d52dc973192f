"""StructSAM (GradToMe): tokens of flat regions merge into the flattest token of a neighbourhood.

The energy of a token is the magnitude of its features' Sobel gradient. Of every 2 x 2 cell the
token of the lowest energy is a destination, the others are sources; the sources most similar to any
destination (cosine) merge into it. A quarter of the tokens stays at least. Every token keeps its
own value and receives the update of what it was merged into (the paper's explicit recovery).

Source: StructSAM, arXiv 2603.07307; `merging` says where it is applied.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsesam_jax.methods.merging import Grid, Merged, TokenMerging, matched, taken, unit
from sparsesam_jax.methods.sequences import product
from sparsesam_jax.sparsity.importance import sobel_magnitude

CELL = 2


@dataclasses.dataclass(frozen=True)
class StructSam(TokenMerging):
    """Gradient-aware merging."""

    keeps_identity: ClassVar[bool] = True

    def count(self, tokens: int, grid: Grid) -> int:
        """Tokens left, one a cell at least."""
        return tokens - self._removed(tokens, grid)

    def match(self, features: Float[Array, "*batch N C"], grid: Grid) -> Merged:
        """Match every cell's other tokens to the flattest tokens."""
        batch, tokens = features.shape[:-2], features.shape[-2]
        energy = sobel_magnitude(features.reshape(*batch, *grid, -1)).reshape(*batch, tokens)
        cells = _cells(grid)
        members = jnp.where(cells >= 0, energy[..., cells], jnp.inf)
        place = np.empty((2, tokens), int)  # cell of a token, and which of its four it is
        place[:, cells[cells >= 0]] = np.argwhere(cells >= 0).T
        is_destination = members.argmin(-1)[..., place[0]] == place[1]
        ranked = jnp.argsort(~is_destination, axis=-1, stable=True)
        destinations, sources = ranked[..., : len(cells)], ranked[..., len(cells) :]
        metric = unit(features)
        similarity = product(
            "...ac,...bc->...ab", taken(metric, sources), taken(metric, destinations)
        )
        return matched(sources, destinations, similarity, self._removed(tokens, grid))

    def match_work(self, tokens: int, grid: Grid, channels: int) -> int:
        """The similarities, and two 3 x 3 filters."""
        cells = len(_cells(grid))
        return ((tokens - cells) * cells + 18 * tokens) * channels

    def _removed(self, tokens: int, grid: Grid) -> int:
        most = tokens - len(_cells(grid))
        return min(math.floor(tokens - tokens * self.density + 1e-9), most)


def _cells(grid: Grid) -> np.ndarray:
    """The tokens of every 2 x 2 cell, [cells, 4]; -1 beyond the grid's edge."""
    down, across = (math.ceil(side / CELL) for side in grid)
    places = np.full((down * CELL, across * CELL), -1)
    places[: grid[0], : grid[1]] = np.arange(grid[0] * grid[1]).reshape(grid)
    cells = places.reshape(down, CELL, across, CELL).swapaxes(1, 2)
    return cells.reshape(down * across, CELL * CELL)
