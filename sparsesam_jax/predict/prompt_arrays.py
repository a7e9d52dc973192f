"""Prompts as `SamPredictor` takes them, checked and as the arrays that the decoder takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sparsesam_jax.model.prompt_encoder import (
    ABSENT,
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    NOT_A_POINT,
)

_MIN_POINTS = 4  # one point, one box, or both: the common prompts share one compilation


class ImageSizes(NamedTuple):
    """Size of an image as it came and as it lies in the padded input, (height, width)."""

    original: tuple[int, int]
    resized: tuple[int, int]


class PromptArrays(NamedTuple):
    """The prompts of one image in the padded input's frame, box corners as points."""

    points: Float[np.ndarray, "P T 2"]
    labels: Int[np.ndarray, "P T"]
    mask_input: Float[np.ndarray, "P h w"] | None


class ImagePrompt(NamedTuple):
    """The prompts of one image as `SamPredictor.predict` takes them."""

    point_coords: np.ndarray | None
    point_labels: np.ndarray | None
    box: np.ndarray | None
    mask_input: np.ndarray | None

    @property
    def is_batched(self) -> bool:
        """Whether the prompts came with a leading axis."""
        ranks = ((self.point_coords, 3), (self.box, 2), (self.mask_input, 4))
        return any(x is not None and np.ndim(x) == rank for x, rank in ranks)

    def arrays(self, sizes: ImageSizes, low_res_size: tuple[int, int]) -> PromptArrays:
        """The prompts as arrays.

        Args:
            sizes: The image's.
            low_res_size: Height and width that a mask input must have.

        Raises:
            ValueError: A prompt has the wrong shape or labels.
        """
        points, labels = self._points()
        if self.box is not None:
            corners = np.asarray(self.box, np.float64)
            if corners.shape[-1:] != (4,) or corners.ndim > 2:
                raise ValueError(f"box must be [4] or [P, 4], got shape {corners.shape}")
            corners = corners.reshape(-1, 2, 2)
            count = max(len(points), len(corners))
            if not {len(points), len(corners)} <= {1, count}:
                raise ValueError(
                    f"point_coords and box must be for as many prompts, "
                    f"got {len(points)} and {len(corners)}"
                )
            points, labels, corners = (
                np.broadcast_to(x, (count, *x.shape[1:])) for x in (points, labels, corners)
            )
            corner_labels = np.tile(
                np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32), (count, 1)
            )
            points = np.concatenate([points, corners], 1)
            labels = np.concatenate([labels, corner_labels], 1)
        elif labels.shape[1]:  # SAM gives points that come without a box one more
            points = np.pad(points, ((0, 0), (0, 1), (0, 0)))
            labels = np.pad(labels, ((0, 0), (0, 1)), constant_values=NOT_A_POINT)
        scale = np.divide(sizes.resized[::-1], sizes.original[::-1])
        return PromptArrays(
            (points * scale).astype(np.float32),
            labels,
            self._mask_input(len(points), low_res_size),
        )

    def _points(self) -> tuple[np.ndarray, np.ndarray]:
        if self.point_coords is None or np.size(self.point_coords) == 0:
            if np.size(self.point_labels if self.point_labels is not None else ()):
                raise ValueError("point_labels must come with point_coords, got labels alone")
            return np.zeros((1, 0, 2)), np.zeros((1, 0), np.int32)
        points = np.asarray(self.point_coords, np.float64)
        if points.ndim not in (2, 3) or points.shape[-1] != 2:
            raise ValueError(f"point_coords must be [T, 2] or [P, T, 2], got shape {points.shape}")
        if self.point_labels is None:
            raise ValueError("point_labels must be given with point_coords, got None")
        labels = np.asarray(self.point_labels)
        if labels.shape != points.shape[:-1]:
            raise ValueError(
                f"point_labels must have the shape {points.shape[:-1]}, got {labels.shape}"
            )
        if not np.isin(labels, (NOT_A_POINT, BACKGROUND, FOREGROUND)).all():
            got = sorted(set(labels.ravel().tolist()))
            raise ValueError(f"point_labels must be 1 or 0, got {got}")
        # Negative labels are added below: in the caller's bool or uint8 they would be other labels.
        labels = labels.astype(np.int32)
        return points.reshape(-1, *points.shape[-2:]), labels.reshape(-1, labels.shape[-1])

    def _mask_input(self, count: int, low_res_size: tuple[int, int]) -> np.ndarray | None:
        if self.mask_input is None:
            return None
        mask = np.asarray(self.mask_input, np.float32)
        expected = (1, *low_res_size)
        if mask.shape[-3:] != expected or mask.ndim not in (3, 4):
            raise ValueError(
                f"mask_input must be {list(expected)} or [P, {', '.join(map(str, expected))}], "
                f"got shape {mask.shape}"
            )
        mask = mask.reshape(-1, *low_res_size)
        if len(mask) not in (1, count):
            raise ValueError(f"mask_input must be for {count} prompts, got {len(mask)}")
        return np.broadcast_to(mask, (count, *low_res_size))


def pad_together(arrays: list[PromptArrays]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Points, labels and mask input of a batch at one shape: absent points and prompts fill up.

    Raises:
        ValueError: Some images have a mask input and others none.
    """
    prompts = _power_of_two(max(len(a.labels) for a in arrays))
    length = max(_MIN_POINTS, _power_of_two(max(a.labels.shape[1] for a in arrays)))
    points = np.zeros((len(arrays), prompts, length, 2), np.float32)
    labels = np.full((len(arrays), prompts, length), ABSENT, np.int32)
    for index, a in enumerate(arrays):
        count, size = a.labels.shape
        points[index, :count, :size] = a.points
        labels[index, :count, :size] = a.labels
    given = [a.mask_input for a in arrays if a.mask_input is not None]
    if not given:
        return points, labels, None
    if len(given) != len(arrays):
        raise ValueError(
            f"mask_input must be given for all images or none, got {len(given)} of {len(arrays)}"
        )
    masks = np.zeros((len(arrays), prompts, *given[0].shape[1:]), np.float32)
    for index, mask in enumerate(given):
        masks[index, : len(mask)] = mask
    return points, labels, masks


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
