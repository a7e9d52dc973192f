"""What `SamPredictor` does to photos and masks, on the device and for any photo's size.

A program for every size of photo would be compiled for every new one. So photos and masks travel as
flat arrays of a few lengths, their sides are numbers that the programs read, and what depends on a
side comes as tables. At SAM's 1024, all photos of up to 4096 pixels a side share three programs,
and their masks five.

A photo travels in pieces, which are views of it, so that the host copies no pixels but the last
piece's and sends hardly more than there are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from sparsesam_jax.model import transforms as host_transforms
from sparsesam_jax.model.transforms import (
    MASK_THRESHOLD,
    Packing,
    ResizedMasks,
    mask_resize_matrices,
    mask_shape,
    resized_shape,
)
from sparsesam_jax.predict.copying import copy

_BITS = 22  # of Pillow's fixed-point weights behind the point
_INDICES = 2**31  # what the programs count in
_PIECES = 16  # that the largest photo of a program comes in
# Pixels of the masks that one program makes, the least that holds them; more take several calls.
# The steps are where usual photos lie: three masks of 1200 x 1800 pixels are 6.5 million.
_MASK_PIXELS = (2**20, 7 * 2**20, 2**24, 2**25, 2**26)
_MASK_TAPS = 3  # two neighbours of the padded input, each between two of four times coarser logits
_MASK_SIDE = 4096  # what a photo's side is rounded up to, and to four times that, and so on


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

    The image may be read until the result is there: nobody may write to it before.

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
    sides = np.array([image.shape[1], height, width], np.int32)
    pieces = _pieces(image.reshape(-1), -(-3 * side**2 // _PIECES))
    return _resize(pieces, _table(axes, image_size, taps), sides, num_rows=side), (height, width)


def resize_masks(
    low_res: Float[Array, "*batch K h w"],
    prompts: range,
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    *,
    return_logits: bool = False,
    packing: Packing | None = None,
    out: np.ndarray | None = None,
) -> ResizedMasks:
    """`transforms.resize_masks` on the device.

    The result is on the host; in pinned memory and read-only, unless it goes to `out`.
    """
    *_, masks, low_height, low_width = low_res.shape
    table = _mask_table((low_height, low_width), image_size, input_size, original_size)
    lines, line = mask_shape(original_size, packing)
    pixels = 8 if packing else 1  # of an element
    plane = lines * line
    total = len(prompts) * masks * plane
    lengths = [length // pixels for length in _MASK_PIXELS]
    length = next((length for length in lengths if length >= total), lengths[-1])
    parts = []
    for start in range(0, total, length):
        mask, element = divmod(start, plane)
        place = np.array([prompts.start * masks + mask, element, *original_size, line], np.int32)
        options = {"length": length, "return_logits": return_logits, "packing": packing}
        parts.append(_resize_flat(low_res, table, place, **options))
    parts = pinned(parts)
    shape = (len(prompts), masks, lines, line)
    if out is None and len(parts) == 1:
        return np.asarray(parts[0])[:total].reshape(shape)
    if out is None:
        out = np.empty(shape, parts[0].dtype)
    flat = out.reshape(-1)
    for start, part in zip(range(0, total, length), parts, strict=True):
        copy(flat[start : start + length], np.asarray(part)[: total - start])
    return out


def pinned(arrays: list[Array]) -> list[Array]:
    """The arrays in the host's pinned memory, which numpy views as it is.

    A pageable copy of 30 masks of 1200 x 1800 pixels takes 18 to 50 ms on an H200's host, this 2.
    """
    return jax.device_put(arrays, [x.sharding.with_memory_kind("pinned_host") for x in arrays])


def _pieces(flat: UInt8[np.ndarray, " pixels"], length: int) -> list[UInt8[Array, " length"]]:
    """All pixels on the device in `_PIECES` pieces; behind the last pixel they are any."""
    pieces = [flat[start : start + length] for start in range(0, len(flat), length)]
    last = np.empty(length, np.uint8)
    last[: len(pieces[-1])] = pieces[-1]
    sent = jax.device_put([*pieces[:-1], last])
    return sent + sent[:1] * (_PIECES - len(sent))


def _table(axes: Sequence[Taps], outputs: int, taps: int) -> Num[np.ndarray, "2 outputs 1+taps"]:
    """Rows and columns as one array, which travels at once: `first`, then `weights`.

    More outputs are zero, and more taps weigh nothing.
    """
    table = np.zeros((2, outputs, 1 + taps), axes[0].weights.dtype)
    for axis, (first, weights) in zip(table, axes, strict=True):
        axis[: len(first), 0] = first
        axis[: len(first), 1 : 1 + weights.shape[1]] = weights
    return table


@functools.lru_cache(maxsize=256)
def _mask_table(*frame: tuple[int, int]) -> Float[np.ndarray, "2 outputs 1+taps"]:
    axes = [matrix_taps(matrix) for matrix in mask_resize_matrices(*frame)]
    side = _MASK_SIDE
    while side < max(len(axis.first) for axis in axes):
        side *= 4
    return _table(axes, side, max(_MASK_TAPS, *(axis.weights.shape[1] for axis in axes)))


def _axes(table: Num[Array, "2 outputs 1+taps"]) -> list[Taps]:
    return [Taps(axis[:, 0].astype(jnp.int32), axis[:, 1:]) for axis in table]


@functools.partial(jax.jit, static_argnames="num_rows")
def _resize(
    pieces: list[Array], table: Array, sides: Array, *, num_rows: int
) -> UInt8[Array, "outputs outputs 3"]:
    """Columns first and rounded to whole levels between the axes, as Pillow does."""
    rows, cols = _axes(table)
    width, inner_height, inner_width = sides
    outputs, channel = len(rows.first), jnp.arange(3)
    # Else XLA would look for the piece of every pixel that it reads.
    flat = jax.lax.optimization_barrier(jnp.concatenate(pieces))

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


@functools.partial(jax.jit, static_argnames=("length", "return_logits", "packing"))
def _resize_flat(
    low_res: Array,
    table: Array,
    start: Array,
    *,
    length: int,
    return_logits: bool,
    packing: Packing | None,
) -> Bool[Array, " length"] | Float[Array, " length"] | UInt8[Array, " length"]:
    """The masks from an element of one on, one after the other; behind the last there is no mask.

    An element is a pixel, or a byte of eight if they are packed, of which a line has whole ones.
    """
    rows, cols = _axes(table)
    first_mask, first_element, height, width, line = start
    *_, low_height, low_width = low_res.shape
    lines, across = (width, height) if packing == "columns" else (height, width)
    place, plane = first_element + jnp.arange(length), lines * line
    mask, inner = first_mask + jax.lax.div(place, plane), jax.lax.rem(place, plane)
    y, x = jax.lax.div(inner, line), jax.lax.rem(inner, line)
    if packing:
        mask, y, x = mask[:, None], y[:, None], 8 * x[:, None] + jnp.arange(8)
    real = x < across
    if packing == "columns":
        y, x = x, y
    corner = (mask * low_height + rows.first[y]) * low_width + cols.first[x]
    flat = low_res.reshape(-1)
    total = jnp.zeros((), jnp.float32)
    for i in range(rows.weights.shape[1]):
        across = jnp.zeros((), jnp.float32)
        for j in range(cols.weights.shape[1]):
            across += cols.weights[:, j][x] * flat.at[corner + i * low_width + j].get(mode="clip")
        total += rows.weights[:, i][y] * across
    if return_logits:
        return total
    inside = total > MASK_THRESHOLD
    if packing is None:
        return inside
    bits = 1 << jnp.arange(8)
    bits = jnp.where(inside & real, bits if packing == "columns" else bits[::-1], 0)
    return bits.sum(1).astype(jnp.uint8)
