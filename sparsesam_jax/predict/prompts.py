"""Prompts as the command line takes them: checked against the image that they are for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Float, Int


class PromptArguments(TypedDict):
    """The prompt's part of `SamPredictor.predict`'s arguments."""

    point_coords: np.ndarray | None
    point_labels: np.ndarray | None
    box: np.ndarray | None


class Prompt(NamedTuple):
    """What one mask is asked for, in pixels of the image.

    Attributes:
        points: (x, y), [T, 2].
        labels: 1 foreground, 0 background, [T].
        box: (x0, y0, x1, y1), [4], or None.
    """

    points: Float[np.ndarray, "T 2"]
    labels: Int[np.ndarray, " T"]
    box: Float[np.ndarray, " 4"] | None

    @property
    def arguments(self) -> PromptArguments:
        """The prompt as keyword arguments of `SamPredictor.predict`."""
        points, labels = (self.points, self.labels) if len(self.points) else (None, None)
        return {"point_coords": points, "point_labels": labels, "box": self.box}


def make_prompts(
    points: Sequence[Sequence[float]],
    labels: Sequence[int],
    boxes: Sequence[Sequence[float]],
    *,
    width: int,
    height: int,
) -> list[Prompt]:
    """One prompt a box, each with all points; without a box one prompt of all points.

    Args:
        points: (x, y) in pixels, inside the image.
        labels: 1 foreground, 0 background, one a point; none at all means all foreground.
        boxes: (x0, y0, x1, y1) in pixels, inside the image, x0 < x1 and y0 < y1.
        width: The image's width.
        height: The image's height.

    Raises:
        ValueError: There is no prompt, or one is not as said.
    """
    check_prompts(points, labels, boxes)
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"--point must lie in the {width} x {height} image, got {x:g} {y:g}")
    for x0, y0, x1, y1 in boxes:
        if min(x0, y0) < 0 or x1 > width or y1 > height:
            got = f"got {x0:g} {y0:g} {x1:g} {y1:g}"
            raise ValueError(f"--box must lie in the {width} x {height} image, {got}")
    points_array = np.array(points, np.float64).reshape(-1, 2)
    labels_array = np.array(labels or [1] * len(points), np.int32)
    return [
        Prompt(points_array, labels_array, None if box is None else np.array(box, np.float64))
        for box in (boxes or [None])
    ]


def check_prompts(
    points: Sequence[Sequence[float]], labels: Sequence[int], boxes: Sequence[Sequence[float]]
) -> None:
    """Raise ValueError unless these are prompts for some image; arguments as `make_prompts`."""
    if not points and not boxes:
        raise ValueError("a prompt must be given: --point X Y or --box X0 Y0 X1 Y1, got none")
    if labels and len(labels) != len(points):
        raise ValueError(
            f"--label must be given once a --point or not at all, "
            f"got {len(labels)} for {len(points)} points"
        )
    for label in labels:
        if label not in (0, 1):
            raise ValueError(f"--label must be 1 (foreground) or 0 (background), got {label}")
    for x0, y0, x1, y1 in boxes:
        if not (x0 < x1 and y0 < y1):
            raise ValueError(
                "--box must be X0 Y0 X1 Y1 with X0 < X1 and Y0 < Y1, "
                f"got {x0:g} {y0:g} {x1:g} {y1:g}"
            )
