"""Quality measures of masks and features, and how sure a paired mean is."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def iou(a: Bool[np.ndarray, "height width"], b: Bool[np.ndarray, "height width"]) -> float:
    """Intersection over union of two masks; 1 if both are empty."""
    union = np.count_nonzero(a | b)
    return 1.0 if union == 0 else np.count_nonzero(a & b) / union


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
    means = [differences[rng.integers(0, count, count)].mean() for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
