"""What `SamPredictor` does to photos and masks, on the device and for any photo's size.

A program for every size of photo would be compiled for every new one. So photos and masks travel as
flat arrays of a few lengths, their sides are numbers that the programs read, and what depends on a
side comes as tables. At SAM's 1024, all photos of up to 4096 pixels a side share five programs, and
their masks four.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from sparsesam_jax.model import transforms as host_transforms
from sparsesam_jax.model.transforms import (
    MASK_THRESHOLD,
    MaskMeasures,
    mask_resize_matrices,
    packed_column,
    resized_shape,
)

_BITS = 22  # of Pillow's fixed-point weights behind the point
_INDICES = 2**31  # what the programs count in
# Pixels of the masks that one program makes, the least that holds them; more take several calls.
# The steps are where usual photos lie: three masks of 1200 x 1800 pixels are 6.5 million.
_MASK_PIXELS = (2**20, 2**23, 2**24, 2**26)
_MASK_TAPS = 3  # two neighbours of the padded input, each between two of four times coarser logits
_MASK_SIDE = 4096  # what a photo's side is rounded up to, and to four times that, and so on
# Rows of masks that one program measures, and of how many masks: with a width of 2048 a hundred
# megabytes of rows that are only resized along one axis, and two milliseconds at most.
MEASURED_ROWS, MEASURED_WIDTHS = 2**16, 2**17


class Taps(NamedTuple):
    """One axis of a resize: output i is the weighted sum of the inputs from `first[i]` on."""

    first: Int[Array | np.ndarray, " outputs"]
    weights: Num[Array | np.ndarray, "outputs taps"]


@functools.lru_cache(maxsize=256)
def pillow_taps(inputs: int, outputs: int) -> Taps:
    """Pillow's antialiased bilinear resize of one axis, weights int32 in units of 2^-22.

    A triangle as wide as two outputs, or two inputs where those are wider, around the output's
    centre; cut off at the edges, weights sum to one.
    """
    scale = inputs / outputs
    support = max(scale, 1.0)
    centre = (np.arange(outputs) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(int), 0)
    last = np.minimum((centre + support + 0.5).astype(int), inputs)
    place = first[:, None] + np.arange(math.ceil(support) * 2 + 1)
    weights = np.maximum(1 - np.abs((place - centre[:, None] + 0.5) / support), 0)
    weights = np.where(place < last[:, None], weights, 0)
    weights /= weights.sum(1, keepdims=True)
    return Taps(first.astype(np.int32), np.floor(weights * 2**_BITS + 0.5).astype(np.int32))


def matrix_taps(matrix: Float[np.ndarray, "outputs inputs"]) -> Taps:
    """The same for any matrix whose rows have few entries, next to each other."""
    used = matrix != 0
    first = used.argmax(1)
    taps = int((matrix.shape[1] - used[:, ::-1].argmax(1) - first).max())
    first = np.minimum(first, matrix.shape[1] - taps)
    weights = np.take_along_axis(matrix, first[:, None] + np.arange(taps), 1)
    return Taps(first.astype(np.int32), weights)


def resize_and_pad(
    image: UInt8[np.ndarray, "height width 3"], image_size: int
) -> tuple[UInt8[Array, "image_size image_size 3"], tuple[int, int]]:
    """`transforms.resize_and_pad` on the device, with the same pixels to the bit.

    Pillow 13 begins with the other axis where it scales a photo down that is more than twice as
    high as wide: there a few pixels are one level off.
    """
    height, width = resized_shape(image.shape[0], image.shape[1], image_size)
    axes = [pillow_taps(*axis) for axis in zip(image.shape[:2], (height, width), strict=True)]
    # Photos are of one kind up to the input's side, up to twice, four times, ... that.
    side, taps = image_size, 3
    while side < max(image.shape[:2]) or taps < max(axis.weights.shape[1] for axis in axes):
        side, taps = 2 * side, 2 * taps - 1
    if 3 * side**2 >= _INDICES:
        padded, resized = host_transforms.resize_and_pad(image, image_size)
        return jax.device_put(padded), resized
    rows, cols = (_padded(axis, image_size, taps) for axis in axes)
    area = 3 * side**2
    # Those that are larger than the input are sent as 16:9 or as a square.
    length = area * 9 // 16 if side > image_size and image.size <= area * 9 // 16 else area
    flat = np.empty(length, np.uint8)
    flat[: image.size] = image.reshape(-1)
    sides = np.array([image.shape[1], height, width], np.int32)
    return _resize(flat, rows, cols, sides, num_rows=side), (height, width)


def resize_masks(
    low_res: Float[Array, "*batch K h w"],
    prompts: range,
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    *,
    return_logits: bool = False,
) -> Bool[np.ndarray, "count K height width"] | Float[np.ndarray, "count K height width"]:
    """`transforms.resize_masks` on the device; the result is on the host, pinned and read-only."""
    masks = low_res.shape[-3]
    total = len(prompts) * masks

    def call(length: int, place: np.ndarray) -> Array:
        options = {"length": length, "return_logits": return_logits}
        return _resize_flat(low_res, *taps, place, **options)

    taps = _mask_taps(low_res.shape[-2:], image_size, input_size, original_size)
    place = [prompts.start * masks, *original_size]
    flat = _in_parts(call, place, math.prod(original_size), total)
    return flat.reshape(len(prompts), masks, *original_size)


def pack_masks(
    low_res: Float[Array, "N h w"],
    count: int,
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    original_size: tuple[int, int],
) -> UInt8[np.ndarray, "count width bytes"]:
    """`transforms.pack_masks` on the device; the result is on the host, pinned and read-only."""
    height, width = original_size
    column = packed_column(height)

    def call(length: int, place: np.ndarray) -> Array:
        return _pack_flat(low_res, *taps, place, length=length)

    taps = _mask_taps(low_res.shape[-2:], image_size, input_size, original_size)
    flat = _in_parts(call, [0, *original_size], width * column, count, a_byte=8)
    return flat.reshape(count, width, column // 8)


def _in_parts(
    call: Callable[[int, np.ndarray], Array],
    place: list[int],
    plane: int,
    count: int,
    a_byte: int = 1,
) -> np.ndarray:
    """What a flat program makes of masks one after the other, in calls of one length, on the host.

    Args:
        call: The program, of a length and of where it begins: mask, pixel, and the photo's sides.
        place: The first mask, and the sides.
        plane: Pixels of a mask.
        count: Masks.
        a_byte: Pixels of an item of the result.
    """
    total = count * plane
    length = next((length for length in _MASK_PIXELS if length >= total), _MASK_PIXELS[-1])
    first, *sides = place
    parts = []
    for start in range(0, total, length):
        mask, pixel = divmod(start, plane)
        parts.append(pinned(call(length, np.array([first + mask, pixel, *sides], np.int32))))
    arrays = [np.asarray(part) for part in parts]
    flat = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return flat[: total // a_byte]


def measure_masks(
    low_res: Float[Array, "*batch h w"],
    which: Int[np.ndarray, " N"],
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    *,
    offset: float,
) -> Callable[[], MaskMeasures]:
    """`transforms.measure_masks` on the device, where no mask is kept at the photo's size.

    Returns:
        A function that waits for the measures, which are under way, and returns them.
    """
    height, width = original_size
    taps = _mask_taps(low_res.shape[-2:], image_size, input_size, original_size)
    # Widths of 512, 768, 1024, 1536, ... so that photos of all sizes share few programs.
    padded = 512
    while padded < width:
        padded = padded * 3 // 2 if padded & (padded - 1) == 0 else padded * 4 // 3
    rows = max(MEASURED_ROWS, 1 << (height - 1).bit_length())
    masks = max(1, MEASURED_WIDTHS // padded)
    # A few masks, the usual case, take a program of an eighth.
    if len(which) <= min(masks, rows // height) // 8:
        rows, masks = rows // 8, masks // 8
    at_once = min(masks, rows // height)
    parts = []
    for start in range(0, len(which), at_once):
        part = np.asarray(which[start : start + at_once], np.int32)
        indices = np.pad(part, (0, masks - len(part)))
        parts.append(
            _measure(
                low_res,
                *taps,
                indices,
                np.array([len(part), height, width], np.int32),
                np.float32(offset),
                num_rows=rows,
                num_cols=padded,
            )
        )
        parts[-1].copy_to_host_async()

    def wait() -> MaskMeasures:
        counts = [
            np.asarray(part)[:, : min(at_once, len(which) - at_once * index)]
            for index, part in enumerate(parts)
        ]
        found = np.concatenate(counts, 1) if counts else np.zeros((7, 0), np.int32)
        area, inner, outer = found[:3]
        return MaskMeasures(area, inner, outer, found[3:].T)

    return wait


def pinned(x: Array) -> Array:
    """The array in the host's pinned memory, which numpy views as it is.

    A pageable copy of 30 masks of 1200 x 1800 pixels takes 18 to 50 ms on an H200's host, this 2.
    """
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def _padded(axis: Taps, outputs: int, taps: int) -> Taps:
    """The same with more outputs, which are zero, and more taps, which weigh nothing."""
    first, weights = axis
    extra = outputs - len(first)
    more = taps - weights.shape[1]
    return Taps(np.pad(first, (0, extra)), np.pad(weights, ((0, extra), (0, more))))


@functools.lru_cache(maxsize=256)
def _mask_taps(*frame: tuple[int, int]) -> tuple[Taps, Taps]:
    axes = [matrix_taps(matrix) for matrix in mask_resize_matrices(*frame)]
    side = _MASK_SIDE
    while side < max(len(axis.first) for axis in axes):
        side *= 4
    taps = max(_MASK_TAPS, *(axis.weights.shape[1] for axis in axes))
    rows, cols = (_padded(axis, side, taps) for axis in axes)
    return rows, cols


@functools.partial(jax.jit, static_argnames="num_rows")
def _resize(
    flat: Array, rows: Taps, cols: Taps, sides: Array, *, num_rows: int
) -> UInt8[Array, "outputs outputs 3"]:
    """Columns first and rounded to whole levels between the axes, as Pillow does."""
    width, inner_height, inner_width = sides
    outputs, channel = len(rows.first), jnp.arange(3)

    def level(total: Array) -> Array:
        return jnp.clip((total + (1 << (_BITS - 1))) >> _BITS, 0, 255)

    total = jnp.zeros((), jnp.int32)
    for tap in range(cols.weights.shape[1]):
        place = jnp.arange(num_rows)[:, None] * width + cols.first + tap
        pixels = flat.at[place[..., None] * 3 + channel].get(mode="clip").astype(jnp.int32)
        total += cols.weights[:, tap, None] * pixels
    # Else XLA would do this anew for every row that reads it.
    middle = jax.lax.optimization_barrier(level(total).astype(jnp.uint8))
    total = jnp.zeros((), jnp.int32)
    for tap in range(rows.weights.shape[1]):
        pixels = middle.at[rows.first + tap].get(mode="clip").astype(jnp.int32)
        total += rows.weights[:, tap, None, None] * pixels
    place = jnp.arange(outputs)
    inside = (place < inner_height)[:, None] & (place < inner_width)
    return jnp.where(inside[..., None], level(total), 0).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("length", "return_logits"))
def _resize_flat(
    low_res: Array, rows: Taps, cols: Taps, start: Array, *, length: int, return_logits: bool
) -> Bool[Array, " length"] | Float[Array, " length"]:
    """The masks from a pixel of one on, one after the other; behind the last there is no mask."""
    first_mask, first_pixel, height, width = start
    place, plane = first_pixel + jnp.arange(length), height * width
    mask, inner = first_mask + jax.lax.div(place, plane), jax.lax.rem(place, plane)
    logits = _logits(
        low_res, rows, cols, mask, jax.lax.div(inner, width), jax.lax.rem(inner, width)
    )
    return logits if return_logits else logits > MASK_THRESHOLD


@functools.partial(jax.jit, static_argnames="length")
def _pack_flat(
    low_res: Array, rows: Taps, cols: Taps, start: Array, *, length: int
) -> UInt8[Array, " length/8"]:
    """The same column after column, each with zeros behind it, eight pixels a byte."""
    first_mask, first_pixel, height, width = start
    column = packed_column(height)
    place, plane = first_pixel + jnp.arange(length).reshape(-1, 8), column * width
    mask, inner = first_mask + jax.lax.div(place, plane), jax.lax.rem(place, plane)
    x, y = jax.lax.div(inner, column), jax.lax.rem(inner, column)
    logits = _logits(low_res, rows, cols, mask, y, x)
    bits = ((logits > MASK_THRESHOLD) & (y < height)).astype(jnp.uint8)
    return (bits << jnp.arange(8, dtype=jnp.uint8)).sum(1, dtype=jnp.uint8)


def _logits(low_res: Array, rows: Taps, cols: Taps, mask: Array, y: Array, x: Array) -> Array:
    """Logits of the photo's pixels."""
    *_, low_height, low_width = low_res.shape
    corner = (mask * low_height + rows.first[y]) * low_width + cols.first[x]
    flat = low_res.reshape(-1)
    total = jnp.zeros((), jnp.float32)
    for i in range(rows.weights.shape[1]):
        row = jnp.zeros((), jnp.float32)
        for j in range(cols.weights.shape[1]):
            row += cols.weights[:, j][x] * flat.at[corner + i * low_width + j].get(mode="clip")
        total += rows.weights[:, i][y] * row
    return total


@functools.partial(jax.jit, static_argnames=("num_rows", "num_cols"))
def _measure(
    low_res: Array,
    rows: Taps,
    cols: Taps,
    which: Array,
    counts: Array,
    offset: Array,
    *,
    num_rows: int,
    num_cols: int,
) -> Int[Array, "7 masks"]:
    """Areas and boxes of masks, whose rows of pixels are counted one after the other.

    The logits are resized along the columns for all rows of the low resolution; the pixels of the
    photo then exist only inside of the sums over its rows.
    """
    number, height, width = counts
    low_height, low_width = low_res.shape[-2:]
    chosen = low_res.reshape(-1, low_height, low_width)[which]
    first, weights = cols.first[:num_cols], cols.weights[:num_cols]
    middle = jnp.zeros((), jnp.float32)
    for tap in range(weights.shape[1]):
        middle += weights[:, tap] * chosen.at[:, :, first + tap].get(mode="clip")
    middle = jax.lax.optimization_barrier(middle.reshape(-1, num_cols))
    row = jnp.arange(num_rows)
    mask, y = row // height, row % height
    logits = jnp.zeros((), jnp.float32)
    for tap in range(rows.weights.shape[1]):
        place = mask * low_height + rows.first[y] + tap
        logits += rows.weights[y, tap, None] * middle.at[place].get(mode="clip")
    x = jnp.arange(num_cols)
    logits = jnp.where(x < width, logits, -jnp.inf)
    inside = logits > MASK_THRESHOLD
    sums = [inside, logits > MASK_THRESHOLD + offset, logits > MASK_THRESHOLD - offset]
    sums = [values.sum(1, dtype=jnp.int32) for values in sums]
    left = jnp.where(inside, x, num_cols).min(1)
    right = jnp.where(inside, x, -1).max(1)
    some = right >= 0
    ends = (left, jnp.where(some, y, _INDICES - 1), right, jnp.where(some, y, -1))
    segment = jnp.where(mask < number, mask, len(which))  # one beyond: dropped
    options = {"num_segments": len(which), "indices_are_sorted": True}
    areas = [jax.ops.segment_sum(values, segment, **options) for values in sums]
    low = [jax.ops.segment_min(values, segment, **options) for values in ends[:2]]
    high = [jax.ops.segment_max(values, segment, **options) for values in ends[2:]]
    boxes = jnp.stack([*low, *high])
    return jnp.concatenate([jnp.stack(areas), jnp.where(areas[0] > 0, boxes, 0)])
