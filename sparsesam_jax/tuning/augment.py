"""Photos and masks of a batch on the device: cropped, flipped, coloured, pasted into each other.

A crop, a resize and a flip are one matrix an axis, `rows @ photo @ cols^T`: what a GPU does best.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from sparsesam_jax.model.transforms import PIXEL_MEAN, PIXEL_STD

_MIN_PASTE, _MAX_PASTE = 0.01, 0.5  # areas of an object that is pasted, as a share of the photo's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How much a photo is changed. The default changes what a photo of a thing may look like.

    Attributes:
        flip: Probability of a mirror image.
        crop: Probability that a part of the photo is taken instead of all of it.
        min_side: Least side of that part, as a share of the photo's.
        stretch: Largest change of the aspect ratio, as a factor.
        shrink: Least size of what is taken, as a share of the model's input.
        colour: Largest relative change of brightness, contrast and saturation.
        grey: Probability of a grey photo.
        paste: Probability that an object of another photo of the batch is pasted in.
    """

    flip: float = 0.5
    crop: float = 0.6
    min_side: float = 0.4
    stretch: float = 1.25
    shrink: float = 0.8
    colour: float = 0.3
    grey: float = 0.05
    paste: float = 0.25

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), float(field.name == "stretch")
            if not (least <= value and (least or value <= 1)):
                expected = "at least 1" if least else "in [0, 1]"
                raise ValueError(f"{field.name} must be {expected}, got {value!r}")


NONE = Augmentation(flip=0, crop=0, stretch=1, shrink=1, colour=0, grey=0, paste=0)


class Batch(NamedTuple):
    """Photos as they lie in memory, with some targets of each.

    Attributes:
        photos: RGB, each in the top left corner of its square.
        sizes: Height and width of each.
        labels: Label maps.
        members: For every target which labels are its own.
    """

    photos: UInt8[Array | np.ndarray, "B side side 3"]
    sizes: Int[Array | np.ndarray, "B 2"]
    labels: UInt8[Array | np.ndarray, "B side side"]
    members: Bool[Array | np.ndarray, "B P 256"]


class Example(NamedTuple):
    """What the model sees of a batch, and what it should find.

    Attributes:
        pixels: Normalised, padded input.
        masks: Targets at the resolution of the decoder's masks.
        inside: Which of those pixels are not padding.
    """

    pixels: Float[Array, "B S S 3"]
    masks: Bool[Array, "B P R R"]
    inside: Bool[Array, "B R R"]


class _View(NamedTuple):
    """The part of one axis that is taken, and how long it gets: photo pixels and input pixels."""

    start: Array  # [B]
    length: Array  # [B]
    out: Array  # [B]
    mirrored: Array  # [B]
    photo: Array  # [B], the photo's own length

    def matrix(self, size: int, side: int, scale: float) -> Float[Array, "B size side"]:
        """Bilinear, antialiased where it shrinks; zero beyond what is taken.

        Args:
            size: Rows: pixels of the output.
            side: Columns: pixels of the stored photo.
            scale: Pixels of the output a pixel of the model's input.
        """
        start, length, mirrored, photo = (
            x[:, None, None] for x in (self.start, self.length, self.mirrored, self.photo)
        )
        out = self.out[:, None, None] * scale
        place = (jnp.arange(size, dtype=jnp.float32)[None, :, None] + 0.5) / out
        source = start + length * jnp.where(mirrored, 1 - place, place) - 0.5
        source = jnp.clip(source, 0, photo - 1)
        pixel = jnp.arange(side, dtype=jnp.float32)
        weights = jax.nn.relu(1 - jnp.abs(source - pixel) / jnp.maximum(1, length / out))
        weights = jnp.where((pixel < photo) & (place < 1), weights, 0)
        return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)


def augment(
    key: Array,
    batch: Batch,
    image_size: int,
    resolution: int,
    augmentation: Augmentation,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Example:
    """What the model sees of a batch.

    Args:
        key: Of this step.
        batch: Photos and targets.
        image_size: Side S of the model's input.
        resolution: Side R of its masks.
        augmentation: How much is changed.
        dtype: Of the products; pixels keep 8 bits in bfloat16.
    """
    count, side = batch.photos.shape[:2]
    view_key, colour_key, paste_key = jax.random.split(key, 3)
    rows, cols = _views(view_key, batch.sizes, image_size, augmentation)
    across, down = (view.matrix(image_size, side, 1.0).astype(dtype) for view in (cols, rows))
    pixels = jnp.einsum("bxj,bijc->bixc", across, batch.photos.astype(dtype))
    pixels = jnp.einsum("byi,bixc->byxc", down, pixels, preferred_element_type=jnp.float32)
    pixels = _colour(colour_key, pixels, augmentation)

    own = jax.vmap(lambda members, labels: members[:, labels])(batch.members, batch.labels)
    scale = resolution / image_size
    low = (view.matrix(resolution, side, scale).astype(dtype) for view in (rows, cols))
    masks = _masks(own, *low)
    inside = _inside(rows, cols, resolution, scale)
    inside_image = _inside(rows, cols, image_size, 1.0)

    if augmentation.paste:
        # The last target of a photo gives way to the first of the photo after it.
        large = jnp.roll(_masks(own[:, :1], down, across)[:, 0], -1, axis=0)
        small = jnp.roll(masks[:, 0], -1, axis=0) & inside
        share = small.sum((1, 2)) / inside.sum((1, 2))
        wanted = jax.random.bernoulli(paste_key, augmentation.paste, (count,))
        wanted = (wanted & (share > _MIN_PASTE) & (share < _MAX_PASTE))[:, None, None]
        pixels = jnp.where((large & wanted)[..., None], jnp.roll(pixels, -1, axis=0), pixels)
        masks &= ~(small & wanted)[:, None]
        masks = masks.at[:, -1].set(jnp.where(wanted, small, masks[:, -1]))
    pixels = (pixels - PIXEL_MEAN) / PIXEL_STD
    pixels = jnp.where(inside_image[..., None], pixels, 0)
    return Example(pixels.astype(dtype), masks, inside)


def _views(
    key: Array, sizes: Array | np.ndarray, image_size: int, augmentation: Augmentation
) -> tuple[_View, _View]:
    """What is taken of rows and columns."""
    keys, count = jax.random.split(key, 6), len(sizes)
    sizes = jnp.asarray(sizes, jnp.float32)

    def uniform(index: int, low: float, high: float) -> Array:
        return jax.random.uniform(keys[index], (count,), minval=low, maxval=high)

    cropped = jax.random.bernoulli(keys[0], augmentation.crop, (count,))
    share = jnp.where(cropped, uniform(1, augmentation.min_side, 1.0), 1.0)
    stretch = jnp.log(augmentation.stretch)
    stretch = jnp.where(cropped, jnp.exp(uniform(2, -1.0, 1.0) * stretch), 1.0)
    room = jax.random.uniform(keys[3], (count, 2))
    lengths = sizes * share[:, None]
    shapes = lengths * jnp.stack([jnp.sqrt(stretch), 1 / jnp.sqrt(stretch)], -1)
    longest = image_size * jnp.where(cropped, uniform(4, augmentation.shrink, 1.0), 1.0)
    # Whole pixels, as SAM rounds.
    outs = jnp.floor(shapes * (longest / shapes.max(-1))[:, None] + 0.5)
    outs = jnp.maximum(outs, 1)
    flipped = jax.random.bernoulli(keys[5], augmentation.flip, (count,))
    starts = room * (sizes - lengths)
    mirrored = (jnp.zeros_like(flipped), flipped)
    first, second = (
        _View(starts[:, i], lengths[:, i], outs[:, i], mirrored[i], sizes[:, i]) for i in (0, 1)
    )
    return first, second


def _colour(key: Array, pixels: Array, augmentation: Augmentation) -> Array:
    """Other brightness, contrast and saturation, or grey."""
    if not (augmentation.colour or augmentation.grey):
        return pixels
    keys, count = jax.random.split(key, 2), len(pixels)
    change = augmentation.colour * jax.random.uniform(keys[0], (5, count), minval=-1, maxval=1)
    light, contrast, saturation, red, blue = 1 + change[..., None, None, None]
    # A cast of the light is smaller than the other changes are.
    cast = jnp.concatenate([1 + (red - 1) / 3, jnp.ones_like(red), 1 + (blue - 1) / 3], -1)
    grey = jax.random.bernoulli(keys[1], augmentation.grey, (count,))[:, None, None, None]
    saturation = jnp.where(grey, 0, saturation)
    luminance = pixels @ jnp.array([0.299, 0.587, 0.114], jnp.float32)[:, None]
    pixels = luminance + (pixels - luminance) * saturation
    pixels = (pixels * cast - 128) * contrast + 128
    return jnp.clip(pixels * light, 0, 255)


def _masks(own: Array, down: Array, across: Array) -> Bool[Array, "B P R C"]:
    """Masks of the stored photos, resized and cut as the photos are."""
    masks = jnp.einsum("bri,bpij->bprj", down, own.astype(down.dtype))
    return jnp.einsum("bcj,bprj->bprc", across, masks) > 0.5


def _inside(rows: _View, cols: _View, size: int, scale: float) -> Bool[Array, "B size size"]:
    centres = jnp.arange(size) + 0.5
    in_rows, in_cols = (centres < view.out[:, None] * scale for view in (rows, cols))
    return in_rows[:, :, None] & in_cols[:, None, :]
