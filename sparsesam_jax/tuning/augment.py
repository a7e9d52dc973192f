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

_MIDDLE = 128.0  # grey, which contrast leaves as it is
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


STILL = Augmentation(flip=0, crop=0, paste=0)  # the photo stays where it is


class Batch(NamedTuple):
    """Photos as they lie in memory, with some targets of each.

    Attributes:
        photos: RGB, each in the top left corner of its square.
        sizes: Height and width of each.
        labels: Label maps.
        members: For every target which labels are its own.
        features: A teacher's features of the photos as they are; None without such.
    """

    photos: UInt8[Array | np.ndarray, "B side side 3"]
    sizes: Int[Array | np.ndarray, "B 2"]
    labels: UInt8[Array | np.ndarray, "B side side"]
    members: Bool[Array | np.ndarray, "B P 256"]
    features: Float[Array | np.ndarray, "B Gh Gw C"] | None = None


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


class _Chance(NamedTuple):
    """Uniform numbers in [0, 1) of a photo, [B] each, by what they decide."""

    crop: Array
    side: Array
    stretch: Array
    top: Array
    left: Array
    shrink: Array
    flip: Array
    light: Array
    contrast: Array
    saturation: Array
    red: Array
    blue: Array
    grey: Array
    paste: Array


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
    # All that is drawn at once: a generator is a large program.
    chance = _Chance(*jax.random.uniform(key, (len(_Chance._fields), count)))
    rows, cols = _views(chance, batch.sizes, image_size, augmentation)
    across, down = (view.matrix(image_size, side, 1.0).astype(dtype) for view in (cols, rows))
    pixels = jnp.einsum("bxj,bijc->bixc", across, batch.photos.astype(dtype))
    pixels = jnp.einsum("byi,bixc->byxc", down, pixels, preferred_element_type=jnp.float32)
    pixels = _colour(chance, pixels, augmentation)

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
        fits = (share > _MIN_PASTE) & (share < _MAX_PASTE)
        wanted = ((chance.paste < augmentation.paste) & fits)[:, None, None]
        pixels = jnp.where((large & wanted)[..., None], jnp.roll(pixels, -1, axis=0), pixels)
        masks &= ~(small & wanted)[:, None]
        masks = masks.at[:, -1].set(jnp.where(wanted, small, masks[:, -1]))
    pixels = (pixels - PIXEL_MEAN) / PIXEL_STD
    pixels = jnp.where(inside_image[..., None], pixels, 0)
    return Example(pixels.astype(dtype), masks, inside)


def _views(
    chance: _Chance, sizes: Array | np.ndarray, image_size: int, augmentation: Augmentation
) -> tuple[_View, _View]:
    """What is taken of rows and columns."""
    sizes = jnp.asarray(sizes, jnp.float32)
    cropped = chance.crop < augmentation.crop

    def between(low: float, share: Array) -> Array:
        return jnp.where(cropped, low + (1 - low) * share, 1.0)

    lengths = sizes * between(augmentation.min_side, chance.side)[:, None]
    stretch = jnp.where(cropped, augmentation.stretch ** (chance.stretch - 0.5), 1.0)
    shapes = lengths * jnp.stack([stretch, 1 / stretch], -1)
    longest = image_size * between(augmentation.shrink, chance.shrink)
    # Whole pixels, as SAM rounds.
    outs = jnp.floor(shapes * (longest / shapes.max(-1))[:, None] + 0.5)
    outs = jnp.maximum(outs, 1)
    starts = jnp.stack([chance.top, chance.left], -1) * (sizes - lengths)
    mirrored = (jnp.zeros_like(cropped), chance.flip < augmentation.flip)
    first, second = (
        _View(starts[:, i], lengths[:, i], outs[:, i], mirrored[i], sizes[:, i]) for i in (0, 1)
    )
    return first, second


def _colour(chance: _Chance, pixels: Array, augmentation: Augmentation) -> Array:
    """Other brightness, contrast and saturation, or grey."""
    if not (augmentation.colour or augmentation.grey):
        return pixels

    def factor(share: Array, change: float = augmentation.colour) -> Array:
        return 1 + change * (2 * share - 1)[:, None, None, None]

    # A cast of the light is smaller than the other changes are.
    red, blue = (factor(x, augmentation.colour / 3) for x in (chance.red, chance.blue))
    pixels = pixels * jnp.concatenate([red, jnp.ones_like(red), blue], -1)
    weights = jnp.array([0.299, 0.587, 0.114], jnp.float32)
    luminance = (pixels * weights).sum(-1, keepdims=True)
    grey = (chance.grey < augmentation.grey)[:, None, None, None]
    saturation = jnp.where(grey, 0, factor(chance.saturation))
    pixels = luminance + (pixels - luminance) * saturation
    pixels = (pixels - _MIDDLE) * factor(chance.contrast) + _MIDDLE
    return jnp.clip(pixels * factor(chance.light), 0, 255)


def _masks(own: Array, down: Array, across: Array) -> Bool[Array, "B P R C"]:
    """Masks of the stored photos, resized and cut as the photos are."""
    masks = jnp.einsum("bri,bpij->bprj", down, own.astype(down.dtype))
    return jnp.einsum("bcj,bprj->bprc", across, masks) > 0.5


def _inside(rows: _View, cols: _View, size: int, scale: float) -> Bool[Array, "B size size"]:
    centres = jnp.arange(size) + 0.5
    in_rows, in_cols = (centres < view.out[:, None] * scale for view in (rows, cols))
    return in_rows[:, :, None] & in_cols[:, None, :]
