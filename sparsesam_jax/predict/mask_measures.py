"""Areas and boxes of masks at the photo's size, of which none is kept at that size.

Every pixel of the low-resolution logits owns the photo's pixels whose centres lie in it, its cell.
Their logits are sums over the 3 x 3 low-resolution pixels around, first along the columns, then
along the rows. So on a device the photo's rows are counted as [cells, slots]: a slot is a place in
a cell, and every sum is one of slices, without a gather. Slots that no pixel of the photo fills
weigh NaN, which is above no threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsesam_jax.model.transforms import (
    MASK_THRESHOLD,
    mask_resize_matrices,
    resize_mask_logits,
)

Size = tuple[int, int]
Measure = Callable[..., Callable[[], "MaskMeasures"]]

# Slots of all masks that one program measures, and its most masks. At 1200 x 1800 pixels these are
# 85 masks, whose logits resized along one axis are 150 MiB.
MEASURED_SLOTS, MEASURED_MASKS = 2**28, 256
_CELLS = 64  # to whose multiples the cells of an axis are rounded up


class MaskMeasures(NamedTuple):
    """What is known of masks at the photo's size without keeping them.

    Attributes:
        area: Pixels above the threshold.
        inner: Pixels above a higher threshold.
        outer: Pixels above a lower threshold.
        boxes: First and last column and row, (x0, y0, x1, y1); zeros for an empty mask.
    """

    area: Int[np.ndarray, " N"]
    inner: Int[np.ndarray, " N"]
    outer: Int[np.ndarray, " N"]
    boxes: Int[np.ndarray, "N 4"]


class Cells(NamedTuple):
    """One axis of a resize, by cells.

    Attributes:
        weights: Of the low-resolution pixels before, at and behind a cell.
        pixels: The photo's pixel of a slot; slots ascend as pixels do.
    """

    weights: Float[np.ndarray, "cells slots 3"]
    pixels: Int[np.ndarray, " cells*slots"]


def measure_on_host(
    low_res: Float[Array | np.ndarray, "*batch h w"],
    which: Int[np.ndarray, " N"],
    image_size: Size,
    input_size: Size,
    original_size: Size,
    *,
    offset: float,
) -> Callable[[], MaskMeasures]:
    """Measure masks at the photo's size, one after the other.

    Args:
        low_res: Mask logits.
        which: Which masks, where the leading axes are counted as one.
        image_size: As for `transforms.mask_resize_matrices`.
        input_size: As for `transforms.mask_resize_matrices`.
        original_size: As for `transforms.mask_resize_matrices`.
        offset: How far the higher and the lower threshold lie from the threshold.

    Returns:
        A function that returns the measures, for on a device they come later.
    """
    planes = np.asarray(low_res).reshape(-1, *low_res.shape[-2:])
    counts = np.zeros((3, len(which)), np.int64)
    boxes = np.zeros((len(which), 4), np.int64)
    for place, index in enumerate(which):
        logits = resize_mask_logits(planes[index], image_size, input_size, original_size)
        mask = logits > MASK_THRESHOLD
        inner, outer = logits > MASK_THRESHOLD + offset, logits > MASK_THRESHOLD - offset
        counts[:, place] = [np.count_nonzero(x) for x in (mask, inner, outer)]
        boxes[place] = mask_box(mask)
    area, inner, outer = counts
    return lambda: MaskMeasures(area, inner, outer, boxes)


def measure_on_device(
    low_res: Float[Array, "*batch h w"],
    which: Int[np.ndarray, " N"],
    image_size: Size,
    input_size: Size,
    original_size: Size,
    *,
    offset: float,
) -> Callable[[], MaskMeasures]:
    """As `measure_on_host`, many masks at once where the logits are.

    Returns:
        A function that waits for the measures, which are under way, and returns them.
    """
    rows, cols = _cells(low_res.shape[-2:], image_size, input_size, original_size)
    slots = len(rows.pixels) * len(cols.pixels)
    many = max(1, min(MEASURED_MASKS, MEASURED_SLOTS // slots))
    few = max(1, many // 8)
    counts, parts = [], []
    while (start := sum(counts)) < len(which):
        at_once = many if len(which) - start > many // 2 else few
        part = np.asarray(which[start : start + at_once], np.int32)
        indices = np.pad(part, (0, at_once - len(part)))
        parts.append(_measure(low_res, rows, cols, indices, np.float32(offset)))
        parts[-1].copy_to_host_async()
        counts.append(len(part))

    def wait() -> MaskMeasures:
        own = [np.asarray(part)[:, :count] for part, count in zip(parts, counts, strict=True)]
        found = np.concatenate(own, 1) if own else np.zeros((7, 0), np.int32)
        area, inner, outer = found[:3]
        return MaskMeasures(area, inner, outer, found[3:].T)

    return wait


def mask_box(mask: Bool[np.ndarray, "height width"]) -> tuple[int, int, int, int]:
    """First and last column and row of a mask, as (x0, y0, x1, y1); zeros for an empty one."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return int(cols[0]), int(rows[0]), int(cols[-1]), int(rows[-1])


@functools.lru_cache(maxsize=256)
def _cells(low_res: Size, *frame: Size) -> tuple[Cells, Cells]:
    """Both axes, rows and columns, in few shapes, so that photos of all sizes share programs."""
    axes = []
    for matrix, low, image, used, pixels in zip(
        mask_resize_matrices(low_res, *frame), low_res, *frame, strict=True
    ):
        place = np.arange(pixels)
        cell = ((place + 0.5) * (used / pixels) * (low / image)).astype(int)
        near = np.pad(matrix, ((0, 0), (1, 1)))[place[:, None], cell[:, None] + np.arange(3)]
        cells = min(low, -(-(cell[-1] + 1) // _CELLS) * _CELLS)
        first = np.searchsorted(cell, np.arange(cells))
        slots = 1
        while slots < np.bincount(cell).max():  # 1, 2, 3, 4, 6, 8, 12, ...
            slots = slots * 4 // 3 if slots % 3 == 0 else slots * 3 // 2 if slots > 1 else 2
        weights = np.full((cells, slots, 3), np.nan, np.float32)
        weights[cell, place - first[cell]] = near
        numbers = first[:, None] + np.arange(slots)
        axes.append(Cells(weights, numbers.astype(np.int32).reshape(-1)))
    rows, cols = axes
    return rows, cols


@jax.jit
def _measure(
    low_res: Array, rows: Cells, cols: Cells, which: Array, offset: Array
) -> Int[Array, "7 masks"]:
    """Areas and boxes. The logits at the photo's size exist only inside of one sum over them."""
    num_rows, slots, _ = rows.weights.shape
    num_cols = len(cols.weights)
    chosen = low_res.reshape(-1, *low_res.shape[-2:])[which]
    chosen = jnp.pad(chosen, ((0, 0), (1, 1), (1, 1)))[:, : num_rows + 2, : num_cols + 2]
    middle = jnp.zeros((), jnp.float32)
    for tap in range(3):
        middle += cols.weights[:, :, tap] * chosen[:, :, tap : tap + num_cols, None]
    # Else XLA would do this anew for every row of the photo.
    middle = jax.lax.optimization_barrier(middle.reshape(*middle.shape[:2], -1))
    logits = jnp.zeros((), jnp.float32)
    for tap in range(3):
        logits += rows.weights[:, :, tap, None] * middle[:, tap : tap + num_rows, None]

    def ends(axis: int, empty: int) -> Array:
        return jnp.where(inside, jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis), empty)

    def merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        pairs = zip((*(jnp.add,) * 3, *(jnp.minimum,) * 2, *(jnp.maximum,) * 2), a, b, strict=True)
        return tuple(operation(x, y) for operation, x, y in pairs)

    inside, far = logits > MASK_THRESHOLD, len(rows.pixels) + len(cols.pixels)
    areas = [inside, logits > MASK_THRESHOLD + offset, logits > MASK_THRESHOLD - offset]
    # All sums in one reduction, that is in one kernel, which makes every logit once.
    terms = [area.astype(jnp.int32) for area in areas]
    terms += [ends(3, far), ends(2, far), ends(3, -1), ends(2, -1)]
    empty = np.array([0, 0, 0, far, far, -1, -1], np.int32)
    *counts, left, top, right, bottom = jax.lax.reduce(tuple(terms), tuple(empty), merge, (2, 3))
    row = slots * jnp.arange(num_rows)
    top = jnp.where(bottom >= 0, row + top, far)
    bottom = jnp.where(bottom >= 0, row + bottom, -1)
    boxes = [
        jnp.asarray(axis.pixels).at[end].get(mode="clip")
        for axis, end in (
            (cols, left.min(1)),
            (rows, top.min(1)),
            (cols, right.max(1)),
            (rows, bottom.max(1)),
        )
    ]
    found = jnp.stack([count.sum(1) for count in counts])
    return jnp.concatenate([found, jnp.where(found[0] > 0, jnp.stack(boxes), 0)])
