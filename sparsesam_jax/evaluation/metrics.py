"""Quality measures of masks and features, and how sure a paired mean is."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

_BOUNDARY_RATIO = 0.02  # of the image's diagonal


def iou(a: Bool[np.ndarray, "height width"], b: Bool[np.ndarray, "height width"]) -> float:
    """Intersection over union of two masks; 1 if both are empty."""
    union = np.count_nonzero(a | b)
    return 1.0 if union == 0 else np.count_nonzero(a & b) / union


def boundary_iou(a: Bool[np.ndarray, "height width"], b: Bool[np.ndarray, "height width"]) -> float:
    """IoU of two masks' boundary bands (Boundary IoU, Cheng et al., CVPR 2021)."""
    return iou(boundary(a), boundary(b))


def boundary(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """A mask minus its erosion, by 2 % of the image's diagonal and at least one pixel.

    Erosions are 3 x 3; beyond the image's edge everything is background.
    """
    steps = max(1, round(_BOUNDARY_RATIO * math.hypot(*mask.shape)))
    return mask & ~_erode(mask, steps)


def _erode(mask: np.ndarray, steps: int) -> np.ndarray:
    """`steps` 3 x 3 erosions at once: a pixel stays if all within `steps` of it are set."""
    width = 2 * steps + 1
    for axis in (0, 1):
        edges = [(steps + 1, steps) if side == axis else (0, 0) for side in (0, 1)]
        sums = np.cumsum(np.pad(mask, edges), axis=axis, dtype=np.int32)
        places = np.arange(mask.shape[axis])
        inside = np.take(sums, places + width, axis) - np.take(sums, places, axis)
        mask = inside == width
    return mask


@jax.jit
def relative_error(
    features: Float[Array, "B H W C"], dense: Float[Array, "B H W C"]
) -> Float[Array, " B"]:
    """`||F - F_dense|| / ||F_dense||` of each image, float32."""
    features, dense = features.astype(jnp.float32), dense.astype(jnp.float32)
    axes = (1, 2, 3)
    difference = jnp.sqrt(((features - dense) ** 2).sum(axes))
    return difference / jnp.sqrt((dense**2).sum(axes))


def bootstrap_interval(
    differences: Float[np.ndarray, " images"],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired differences, one an image.

    Images are drawn with replacement (Efron, 1979); the seed makes the interval reproducible.
    """
    rng = np.random.default_rng(seed)
    count = len(differences)
    means = differences[rng.integers(0, count, (resamples, count))].mean(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
