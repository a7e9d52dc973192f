"""Prompts as `SamPredictor` takes them, checked and as the arrays that the decoder takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sparsesam_jax.model.prompt_encoder import (
    ABSENT,
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    NOT_A_POINT,
    PADDING,
)

MIN_POINTS = 4  # one point, one box, or both: the common prompts share one compilation

_CORNERS = np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32)


class ImageSizes(NamedTuple):
    """Size of an image as it came and as it lies in the padded input, (height, width)."""

    original: tuple[int, int]
    resized: tuple[int, int]


class PromptArrays(NamedTuple):
    """The prompts of one image in the padded input's frame, box corners as points."""

    points: Float[np.ndarray, "P T 2"]
    labels: Int[np.ndarray, "P T"]
    mask_input: Float[np.ndarray, "P h w"] | None

    @property
    def num_prompts(self) -> int:
        """P."""
        return len(self.labels)

    def part(self, start: int, stop: int) -> PromptArrays:
        """The prompts from `start` to `stop`, as far as there are any."""
        mask = None if self.mask_input is None else self.mask_input[start:stop]
        return PromptArrays(self.points[start:stop], self.labels[start:stop], mask)


class ImagePrompt:
    """The prompts of one image as `SamPredictor.predict` takes them, checked.

    Args:
        point_coords: As for `SamPredictor.predict`; likewise the next three.
        point_labels: See `SamPredictor.predict`.
        box: See `SamPredictor.predict`.
        mask_input: See `SamPredictor.predict`.

    Attributes:
        is_batched: Whether results have a leading axis of P prompts.

    Raises:
        ValueError: A prompt has the wrong shape or labels.
    """

    def __init__(self, point_coords: Any, point_labels: Any, box: Any, mask_input: Any):
        points = _points(point_coords, point_labels)
        corners = _corners(box)
        mask = None if mask_input is None else _array("mask_input", mask_input).astype(np.float32)
        if mask is not None:
            _check_finite("mask_input", mask)
        # A single box may come as [1, 4], as its users write it; a single prompt's points may not.
        self.is_batched = (
            (points is not None and points[2])
            or (corners is not None and len(corners) != 1)
            or (mask is not None and mask.ndim == 4)
        )
        self._points = None if points is None else points[:2]
        self._box = corners
        self._mask = mask

    def arrays(self, sizes: ImageSizes, low_res_size: tuple[int, int]) -> PromptArrays:
        """The prompts as arrays.

        Args:
            sizes: The image's.
            low_res_size: Height and width that a mask input must have.

        Raises:
            ValueError: Prompts of different kinds are not for as many prompts, or the mask input
                has another size.
        """
        points, labels = self._points or (np.zeros((1, 0, 2)), np.zeros((1, 0), np.int32))
        mask = self._mask_input(low_res_size)
        if self._box is not None:
            corners, corner_labels = self._box, np.tile(_CORNERS, (len(self._box), 1))
        elif self._points is not None:  # SAM gives points that come without a box one more
            corners, corner_labels = np.zeros((1, 1, 2)), np.array([[NOT_A_POINT]], np.int32)
        else:
            corners, corner_labels = np.zeros((1, 0, 2)), np.zeros((1, 0), np.int32)
        given = {"point_coords": points, "box": corners} | ({} if mask is None else {"mask": mask})
        counts = {name: len(value) for name, value in given.items()}
        if len(set(counts.values()) - {1}) > 1:
            if mask is not None and len({len(points), len(corners)} - {1}) < 2:
                count = max(len(points), len(corners))
                raise ValueError(f"mask_input must be for {count} prompts, got {len(mask)}")
            raise ValueError(
                f"point_coords and box must be for as many prompts, "
                f"got {len(points)} and {len(corners)}"
            )
        count = next((count for count in counts.values() if count != 1), 1)

        def spread(x: np.ndarray) -> np.ndarray:
            return np.broadcast_to(x, (count, *x.shape[1:]))

        scale = np.divide(sizes.resized[::-1], sizes.original[::-1])
        points = np.concatenate([spread(points), spread(corners)], 1) * scale
        labels = np.concatenate([spread(labels), spread(corner_labels)], 1)
        return PromptArrays(
            points.astype(np.float32), labels, None if mask is None else spread(mask)
        )

    def _mask_input(self, low_res_size: tuple[int, int]) -> np.ndarray | None:
        if self._mask is None:
            return None
        expected = (1, *low_res_size)
        if self._mask.shape[-3:] != expected or self._mask.ndim not in (3, 4):
            raise ValueError(
                f"mask_input must be {list(expected)} or [P, {', '.join(map(str, expected))}], "
                f"got shape {self._mask.shape}"
            )
        return self._mask.reshape(-1, *low_res_size)


def pad_together(
    arrays: Sequence[PromptArrays], prompts: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Points, labels and mask input of several images at one shape: absent ones fill up.

    Args:
        arrays: One an image; mask inputs for all or none of them that have prompts.
        prompts: P of the result.
        length: T of the result.
    """
    points = np.zeros((len(arrays), prompts, length, 2), np.float32)
    labels = np.full((len(arrays), prompts, length), ABSENT, np.int32)
    for index, a in enumerate(arrays):
        count, size = a.labels.shape
        points[index, :count, :size] = a.points
        labels[index, :count, :size] = a.labels
    given = [a.mask_input for a in arrays if a.mask_input is not None]
    if not given:
        return points, labels, None
    masks = np.zeros((len(arrays), prompts, *given[0].shape[1:]), np.float32)
    for index, a in enumerate(arrays):
        if a.mask_input is not None:
            masks[index, : a.num_prompts] = a.mask_input
    return points, labels, masks


def power_of_two(count: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(0, count - 1).bit_length()


def _points(coords: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Points [P, T, 2], labels [P, T] and whether they came with a leading axis; None for none."""
    labels = None if labels is None else _array("point_labels", labels)
    if coords is None:
        if labels is not None and labels.size:
            raise ValueError("point_labels must come with point_coords, got labels alone")
        return None
    points = _array("point_coords", coords).astype(np.float64)
    if points.shape == (0,):
        points = points.reshape(0, 2)
    shape = points.shape
    if points.ndim == 4 and shape[0] == 1:  # as transformers has it, for one image
        points = points[0]
    if points.ndim not in (2, 3) or points.shape[-1] != 2:
        raise ValueError(
            f"point_coords must be [T, 2], [P, T, 2] or [1, P, T, 2], got shape {shape}"
        )
    _check_finite("point_coords", points)
    if labels is None:
        if points.size:
            raise ValueError("point_labels must be given with point_coords, got None")
        labels = np.zeros(shape[:-1])
    if labels.shape != shape[:-1] and (labels.size or points.size):
        raise ValueError(f"point_labels must have the shape {shape[:-1]}, got {labels.shape}")
    if not np.isin(labels, (PADDING, NOT_A_POINT, BACKGROUND, FOREGROUND)).all():
        got = sorted(set(labels.ravel().tolist()))
        raise ValueError(f"point_labels must be 1 or 0, got {got}")
    # Negative labels are added later: in the caller's bool or uint8 they would be other labels.
    labels = labels.astype(np.int32).reshape(points.shape[:-1])
    if points.ndim == 2:
        return points[None], labels[None], False
    return points, labels, True


def _corners(box: Any) -> np.ndarray | None:
    """The corners of boxes, [P, 2, 2]; None for none."""
    if box is None:
        return None
    corners = _array("box", box).astype(np.float64)
    shape = corners.shape
    if corners.ndim == 3 and shape[0] == 1:  # as transformers has it, for one image
        corners = corners[0]
    if corners.shape == (0,):
        corners = corners.reshape(0, 4)
    if corners.shape != (2, 2) and (corners.ndim not in (1, 2) or corners.shape[-1] != 4):
        raise ValueError(f"box must be [4], [2, 2], [P, 4] or [1, P, 4], got shape {shape}")
    _check_finite("box", corners)
    return corners.reshape(-1, 2, 2)


def _array(name: str, value: Any) -> np.ndarray:
    """What was given as an array of numbers: lists, and tensors of other libraries too."""
    if hasattr(value, "detach"):  # PyTorch's, perhaps on a GPU or with a gradient
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular array, got rows of other lengths") from (
            error
        )
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")
    return array


def _check_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]:g}")
