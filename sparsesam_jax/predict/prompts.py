"""Prompts as the command line takes them: checked against the image that they are for."""

from __future__ import annotations

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


class PromptLists(NamedTuple):
    """Prompts as they are given, in pixels of an image that is not known yet.

    Attributes:
        points: (x, y) inside the image.
        labels: 1 foreground, 0 background, one a point; none at all means all foreground.
        boxes: (x0, y0, x1, y1) inside the image, x0 < x1 and y0 < y1.
        names: What messages call these.
    """

    points: list[tuple[float, ...]]
    labels: list[int]
    boxes: list[tuple[float, ...]]
    names: tuple[str, str, str] = ("--point", "--label", "--box")

    @property
    def num_prompts(self) -> int:
        """One a box, or one of all points, or none."""
        return len(self.boxes) or min(1, len(self.points))

    def check(self) -> None:
        """Raise ValueError unless these are prompts for some image."""
        point, label, box = self.names
        if not self.points and not self.boxes:
            raise ValueError(f"a prompt must be given: {point} X Y or {box} X0 Y0 X1 Y1, got none")
        if self.labels and len(self.labels) != len(self.points):
            raise ValueError(
                f"{label} must be given once a point or not at all, "
                f"got {len(self.labels)} for {len(self.points)} points"
            )
        for value in self.labels:
            if value not in (0, 1):
                raise ValueError(f"{label} must be 1 (foreground) or 0 (background), got {value}")
        for x0, y0, x1, y1 in self.boxes:
            if not (x0 < x1 and y0 < y1):
                raise ValueError(
                    f"{box} must be X0 Y0 X1 Y1 with X0 < X1 and Y0 < Y1, "
                    f"got {x0:g} {y0:g} {x1:g} {y1:g}"
                )

    def prompts(self, *, width: int, height: int) -> list[Prompt]:
        """One prompt a box, each with all points; without a box one prompt of all points.

        Raises:
            ValueError: There is no prompt, or one is not as said.
        """
        self.check()
        point, _, box = self.names
        for x, y in self.points:
            if not (0 <= x < width and 0 <= y < height):
                raise ValueError(
                    f"{point} must lie in the {width} x {height} image, got {x:g} {y:g}"
                )
        for x0, y0, x1, y1 in self.boxes:
            if min(x0, y0) < 0 or x1 > width or y1 > height:
                got = f"got {x0:g} {y0:g} {x1:g} {y1:g}"
                raise ValueError(f"{box} must lie in the {width} x {height} image, {got}")
        points = np.array(self.points, np.float64).reshape(-1, 2)
        labels = np.array(self.labels or [1] * len(points), np.int32)
        return [
            Prompt(points, labels, None if corners is None else np.array(corners, np.float64))
            for corners in (self.boxes or [None])
        ]
