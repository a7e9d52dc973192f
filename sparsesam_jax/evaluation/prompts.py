"""Prompts taken from ground truth: boxes and points, the same for every run."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Num
from scipy import ndimage

from sparsesam_jax.choices import PromptKind, check_choice
from sparsesam_jax.predict.prompts import Prompt


def mask_box(
    mask: Bool[np.ndarray, "height width"], *, inclusive: bool = False
) -> Float[np.ndarray, " 4"]:
    """The mask's bounding box x0, y0, x1, y1; x1 and y1 lie one past it unless `inclusive`."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    past = 0 if inclusive else 1
    return np.array([cols[0], rows[0], cols[-1] + past, rows[-1] + past], np.float64)


def mask_points(mask: Bool[np.ndarray, "height width"], count: int) -> Float[np.ndarray, "count 2"]:
    """Points (x, y) deep inside the mask and apart from each other.

    The first is farthest from the background (beyond the image's edge is background too); each
    further one maximises the smaller of that distance and the distance to the points before it.
    Ties go to the first in raster order.
    """
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))
    distance: Num[np.ndarray, "height width"] = np.asarray(depth)[1:-1, 1:-1]
    rows, cols = np.indices(mask.shape)
    points = []
    for _ in range(count):
        row, col = np.unravel_index(distance.argmax(), mask.shape)
        points.append((col, row))
        distance = np.minimum(distance, np.hypot(rows - row, cols - col))
    return np.array(points, np.float64).reshape(count, 2)


def mask_prompt(
    mask: Bool[np.ndarray, "height width"], kind: PromptKind, *, inclusive: bool = False
) -> Prompt:
    """The prompt of a kind for a mask with foreground.

    Args:
        mask: Ground truth in the frame of the prompt.
        kind: `box`, `point`, `points3` or `box+point`.
        inclusive: As for `mask_box`.
    """
    check_choice("prompts", kind, PromptKind)
    count = {"box": 0, "point": 1, "points3": 3, "box+point": 1}[kind]
    box = mask_box(mask, inclusive=inclusive) if kind.startswith("box") else None
    return Prompt(mask_points(mask, count), np.ones(count, np.int32), box)
