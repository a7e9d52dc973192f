"""SAM's pre- and postprocessing: resize, normalise, pad; and masks back to the image's size."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int, Num, UInt8
from PIL import Image

PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)
MASK_THRESHOLD = 0.0

# Eight pixels a byte. `rows`: of a row, the first in its highest bit, as `np.packbits` does it.
# `columns`: of a column, the first in its lowest bit; a column ends with at least one zero bit, so
# that every run of ones ends in it, and has a multiple of eight bytes.
Packing = Literal["rows", "columns"]

# Masks at the photo's size: booleans, logits, or packed.
ResizedMasks = (
    Bool[np.ndarray, "count K height width"]
    | Float[np.ndarray, "count K height width"]
    | UInt8[np.ndarray, "count K lines bytes"]
)


def resized_shape(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Height and width after scaling the longest side to `long_side`, rounded as SAM does."""
    scale = long_side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def crop_shape(resized: tuple[int, int], image_size: int, patch_size: int) -> tuple[int, int]:
    """Height and width that the padded input keeps of its square under `padding="crop"`.

    Whole blocks of 8 tokens, as the attention kernels take them: photos of all shapes share few
    programs.
    """
    unit = 8 * patch_size
    height, width = (min(-(-side // unit) * unit, image_size) for side in resized)
    return height, width


def resize_and_pad(
    image: UInt8[np.ndarray, "height width 3"], image_size: int
) -> tuple[UInt8[np.ndarray, "image_size image_size 3"], tuple[int, int]]:
    """Resize the longest side to `image_size` and pad bottom and right, on the host with Pillow.

    Returns:
        The padded image and the size of the part that is not padding.
    """
    height, width = resized_shape(image.shape[0], image.shape[1], image_size)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    padded = np.zeros((image_size, image_size, 3), np.uint8)
    padded[:height, :width] = np.asarray(resized)
    return padded, (height, width)


def normalise(
    padded: Num[Array, "B height width 3"], sizes: Int[Array, "B 2"]
) -> Float[Array, "B height width 3"]:
    """Normalise 0..255 RGB images; what lies beyond each image's own size becomes zero."""
    pixels = (padded.astype(jnp.float32) - PIXEL_MEAN) / PIXEL_STD
    return jnp.where(_inside(padded.shape[1:3], sizes)[..., None], pixels, 0.0)


def preprocess(
    images: Num[Array, "B height width 3"], image_size: int
) -> Float[Array, "B image_size image_size 3"]:
    """Resize, normalise and pad 0..255 RGB images of one size, inside jit.

    The resize is antialiased bilinear and rounded to whole levels, within one level of Pillow's.
    """
    height, width = resized_shape(images.shape[1], images.shape[2], image_size)
    resized = jax.image.resize(
        images.astype(jnp.float32),
        (images.shape[0], height, width, 3),
        "linear",
        antialias=True,
        precision=jax.lax.Precision.HIGHEST,
    )
    resized = jnp.clip(jnp.round(resized), 0, 255)
    pixels = (resized - PIXEL_MEAN) / PIXEL_STD
    edges = ((0, 0), (0, image_size - height), (0, image_size - width), (0, 0))
    return jnp.pad(pixels, edges)


def mask_resize_matrices(
    low_res: tuple[int, int],
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    original_size: tuple[int, int],
) -> tuple[Float[np.ndarray, "height h"], Float[np.ndarray, "width w"]]:
    """The two matrices that take mask logits to an image: `rows @ logits @ cols.T`.

    SAM resizes the logits bilinearly to the padded input, crops the padding and resizes
    bilinearly to the image. Both steps are linear and separable, so they are one matrix an axis.

    Args:
        low_res: Size of the logits.
        image_size: Size of the padded input.
        input_size: Size of the part of the input that is not padding.
        original_size: Size of the image.
    """
    rows, cols = (
        _axis_matrix(*sizes)
        for sizes in zip(low_res, image_size, input_size, original_size, strict=True)
    )
    return rows, cols


def resize_mask_logits(
    logits: Float[np.ndarray, "*batch h w"],
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    original_size: tuple[int, int],
) -> Float[np.ndarray, "*batch height width"]:
    """The same as those matrices, on the host and without their zeros: an order faster.

    Args:
        logits: Low-resolution mask logits.
        image_size: As for `mask_resize_matrices`.
        input_size: As for `mask_resize_matrices`.
        original_size: As for `mask_resize_matrices`.
    """
    axes = zip(logits.shape[-2:], image_size, input_size, original_size, strict=True)
    rows, cols = (_sparse_axis_matrix(*sizes) for sizes in axes)
    masks = logits.reshape(-1, *logits.shape[-2:])
    out = np.empty((len(masks), *original_size), np.float32)
    for mask, resized in zip(masks, out, strict=True):
        # Columns first: the result of the last product is then laid out as an image is.
        resized[:] = rows @ np.ascontiguousarray((cols @ np.ascontiguousarray(mask.T)).T)
    return out.reshape(*logits.shape[:-2], *original_size)


def resize_masks(
    low_res: Float[Array | np.ndarray, "*batch K h w"],
    prompts: range,
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    *,
    return_logits: bool = False,
    packing: Packing | None = None,
    out: np.ndarray | None = None,
) -> ResizedMasks:
    """Masks of some prompts at the photo's size, on the host.

    Args:
        low_res: Mask logits.
        prompts: Which prompts, where the leading axes are counted as one.
        image_size: As for `mask_resize_matrices`.
        input_size: As for `mask_resize_matrices`.
        original_size: As for `mask_resize_matrices`.
        return_logits: Whether to return float32 logits instead of booleans.
        packing: How to return eight pixels a byte; None is a pixel an element.
        out: Where to write them, [count, K, *mask_shape(original_size, packing)]; None is a new
            array.
    """
    planes = np.asarray(low_res).reshape(-1, *low_res.shape[-3:])
    dtype = np.float32 if return_logits else np.uint8 if packing else np.bool_
    shape = mask_shape(original_size, packing)
    if out is None:
        out = np.empty((len(prompts), planes.shape[1], *shape), dtype)
    # Prompt by prompt, so that only one prompt's logits exist at the photo's size.
    for masks, prompt in zip(out, prompts, strict=True):
        logits = resize_mask_logits(planes[prompt], image_size, input_size, original_size)
        inside = logits if return_logits else logits > MASK_THRESHOLD
        if packing == "columns":
            lines = np.zeros((len(inside), shape[0], 8 * shape[1]), bool)
            lines[..., : original_size[0]] = inside.swapaxes(1, 2)
            inside = np.packbits(lines, axis=-1, bitorder="little")
        elif packing == "rows":
            inside = np.packbits(inside, axis=-1)
        masks[:] = inside
    return out


def mask_shape(size: tuple[int, int], packing: Packing | None) -> tuple[int, int]:
    """Lines of a mask of this height and width, and elements of a line: pixels, or bytes."""
    height, width = size
    if packing == "columns":
        return width, 8 * (height // 64 + 1)
    return height, -(-width // 8) if packing else width


@functools.lru_cache(maxsize=256)
def _sparse_axis_matrix(*sizes: int) -> scipy.sparse.csr_array:
    return scipy.sparse.csr_array(_axis_matrix(*sizes))


@functools.lru_cache(maxsize=256)
def _axis_matrix(low_res: int, padded: int, cropped: int, original: int) -> np.ndarray:
    matrix = _bilinear_matrix(cropped, original) @ _bilinear_matrix(low_res, padded)[:cropped]
    return matrix.astype(np.float32)


def _bilinear_matrix(inputs: int, outputs: int) -> np.ndarray:
    """Bilinear interpolation of one axis, half-pixel centres, edge replicated: [out, in]."""
    source = np.maximum((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0)
    left = np.minimum(source.astype(int), inputs - 1)
    right = np.minimum(left + 1, inputs - 1)
    fraction = source - left
    matrix = np.zeros((outputs, inputs))
    matrix[np.arange(outputs), left] += 1 - fraction
    matrix[np.arange(outputs), right] += fraction
    return matrix


def _inside(shape: tuple[int, ...], sizes: Array) -> Bool[Array, "B height width"]:
    """Whether a pixel belongs to the image and not to its padding."""
    rows = jnp.arange(shape[0])[None, :, None] < sizes[:, 0, None, None]
    cols = jnp.arange(shape[1])[None, None, :] < sizes[:, 1, None, None]
    return rows & cols
