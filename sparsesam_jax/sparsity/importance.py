"""How much a group of tokens matters: the scores that rank groups and blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsesam_jax.config import Importance
from sparsesam_jax.sparsity.orders import GROUP

_SOBEL = np.outer((-1.0, 0.0, 1.0), (1.0, 2.0, 1.0)).astype(np.float32)


class Map(NamedTuple):
    """What a score looks at.

    Attributes:
        features: Feature map in raster order, [*batch, N, C].
        order: The curve that forms the groups, [N].
        grid: Rows and columns of the map.
        seed: Of scores that are drawn.
    """

    features: Array
    order: np.ndarray
    grid: tuple[int, int]
    seed: int

    @property
    def groups(self) -> tuple[int, ...]:
        """Shape of the scores, [*batch, G]."""
        return (*self.features.shape[:-2], len(self.order) // GROUP)


def _sobel(x: Map) -> Array:
    batch = x.features.shape[:-2]
    magnitude = sobel_magnitude(x.features.reshape(*batch, *x.grid, -1)).reshape(*batch, -1)
    return _members(magnitude[..., None], x.order)[..., 0].mean(-1)


def _dispersion(x: Map) -> Array:
    members = _members(x.features.astype(jnp.float32), x.order)
    spread = members.std(-2, ddof=1).mean(-1)
    centre = members.mean(-2)
    unit = centre / jnp.maximum(jnp.linalg.norm(centre, axis=-1, keepdims=True), 1e-12)
    # The mean cosine to all others is a product with their sum, less the group's own share.
    own = (unit * unit).sum(-1)
    others = max(unit.shape[-2] - 1, 1)
    similarity = ((unit * unit.sum(-2, keepdims=True)).sum(-1) - own) / others
    return _standardise(spread) + _standardise(-similarity)


def _uniform(x: Map) -> Array:
    return jnp.zeros(x.groups, jnp.float32)


def _random(x: Map) -> Array:
    draw = np.random.default_rng(x.seed).random(x.groups[-1], np.float32)
    return jnp.broadcast_to(draw, x.groups)


# A new score is a function here and its name in `Importance`.
SCORES: dict[Importance, Callable[[Map], Array]] = {
    "sobel": _sobel,
    "dispersion": _dispersion,
    "uniform": _uniform,
    "random": _random,
}


def group_importance(
    features: Float[Array, "*batch N C"],
    order: Int[np.ndarray, " N"],
    *,
    grid: tuple[int, int],
    importance: Importance,
    seed: int = 0,
) -> Float[Array, "*batch G"]:
    """Score of every full group of a curve, float32; a larger score is more important.

    - `sobel` (SparseSAM, Eq. 1): `sqrt((Sx * X)^2 + (Sy * X)^2)` per channel, mean over channels
      and over the group's members. The feature map's edge is replicated.
    - `dispersion` (the authors' released code): `z(std) + z(-similarity)`, where std is the
      unbiased standard deviation over a group's members, mean over channels; similarity is the
      mean cosine similarity of the group's mean vector to every other group's; and z
      standardises over the groups.
    - `uniform`: all scores equal. `random`: one fixed draw, the same for the whole batch.

    Args:
        features: Feature map in raster order; leading axes are ranked independently.
        order: The curve that forms the groups.
        grid: Rows and columns of the feature map, with `N = rows * columns`.
        importance: Which score.
        seed: Seed of `random`.
    """
    if importance not in SCORES:
        raise ValueError(f"importance must be one of {', '.join(SCORES)}; got {importance!r}")
    return SCORES[importance](Map(features, order, grid, seed))


def rank(scores: Float[Array, "*batch G"]) -> Int[Array, "*batch G"]:
    """Indices by descending score; equal scores keep their order."""
    return jnp.argsort(-scores, axis=-1, stable=True)


def block_importance(
    scores: Float[Array, "*batch G"],
    order: Int[np.ndarray, " N"],
    sequence: Int[np.ndarray, " N"],
    block_size: int,
) -> Float[Array, "*batch K"]:
    """Mean group score of the tokens of each full block of a sequence; K = N // block_size.

    Tokens of the short last group have no score of their own and do not count.
    """
    num_groups = len(order) // GROUP
    group_of = np.empty(len(order), np.int32)
    group_of[order] = np.arange(len(order)) // GROUP
    full = len(sequence) // block_size * block_size
    groups = group_of[sequence[:full]].reshape(-1, block_size)
    scored = groups < num_groups
    members = jnp.where(scored, scores[..., np.where(scored, groups, 0)], 0.0)
    return members.sum(-1) / np.maximum(scored.sum(-1), 1)


def _members(features: Array, order: np.ndarray) -> Array:
    """Features [*batch, N, C] of every full group's members, [*batch, G, 4, C]."""
    full = len(order) // GROUP * GROUP
    members = jnp.take(features, order[:full], axis=-2)
    return members.reshape(*features.shape[:-2], -1, GROUP, features.shape[-1])


def _standardise(x: Array) -> Array:
    deviation = x.std(-1, ddof=1 if x.shape[-1] > 1 else 0, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / (deviation + 1e-6)


def sobel_magnitude(
    features: Float[Array, "*batch rows columns C"],
) -> Float[Array, "*batch rows columns"]:
    """Magnitude of the features' Sobel gradient, mean over channels; the edge is replicated.

    Float32 inside and out.
    """
    *batch, rows, cols, channels = features.shape
    place = np.pad(np.arange(rows * cols).reshape(rows, cols), 1, mode="edge")
    flat = features.reshape(*batch, rows * cols, channels)
    padded = jnp.take(flat, place, axis=-2, mode="clip")  # as one gather: XLA pads slowly

    def filtered(taps: np.ndarray) -> Array:
        total = jnp.zeros(())
        for (row, col), tap in np.ndenumerate(taps):
            if tap:
                shifted = padded[..., row : row + rows, col : col + cols, :]
                total += tap * shifted.astype(jnp.float32)
        return total

    return jnp.sqrt(filtered(_SOBEL) ** 2 + filtered(_SOBEL.T) ** 2).mean(-1)
