"""Prompts from targets on the device, as SAM samples them: jittered boxes, points, corrections."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsesam_jax.model.prompt_encoder import (
    ABSENT,
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    NOT_A_POINT,
)

_BOX_SLOTS = 2
_DEPTHS = (1, 1, 2, 4, 8, 16)  # steps of erosion, by pixels of the masks
_MAX_JITTER = 20  # pixels of the input, as in SAM's training
_INSIDE = 0.999  # keeps a normal number finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompting:
    """How prompts are drawn.

    Attributes:
        rounds: Decoder calls for a target: the first prompt, then one corrective click a round.
        box: Probability that the first prompt has a box.
        box_point: Probability that a box comes with a point.
        jitter: Standard deviation of a box's corners, as a share of its sides.
        deep: Probability that a click falls deep inside of its region, where people click; else it
            falls anywhere in it.
        mask_input: Probability that a round sees the mask of the round before.
    """

    rounds: int = 3
    box: float = 0.6
    box_point: float = 0.25
    jitter: float = 0.1
    deep: float = 0.5
    mask_input: float = 0.75

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be positive, got {self.rounds}")
        for name in ("box", "box_point", "jitter", "deep", "mask_input"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")


class Prompts(NamedTuple):
    """Prompts of one length: a box's corners, a point a round, and SAM's padding point.

    Attributes:
        points: (x, y) in pixels of the model's input.
        labels: Those of the prompt encoder.
    """

    points: Float[Array, "B P T 2"]
    labels: Int[Array, "B P T"]

    def with_click(self, index: int | Array, point: Array, label: Array) -> Prompts:
        """The same with the click of a round."""
        slot = _BOX_SLOTS + index
        return Prompts(self.points.at[:, :, slot].set(point), self.labels.at[:, :, slot].set(label))


class _Chance(NamedTuple):
    """Uniform numbers in [0, 1) of a prompt, [B, P] each, by what they decide."""

    has_box: Array
    has_point: Array
    jitter: Array
    left: Array
    top: Array
    right: Array
    bottom: Array
    deep: Array
    x: Array
    y: Array


def first_prompts(
    key: Array, masks: Bool[Array, "B P R R"], stride: float, prompting: Prompting
) -> Prompts:
    """A box, a point, or both for every target.

    Args:
        key: Of this step.
        masks: The targets.
        stride: Pixels of the model's input a pixel of the masks.
        prompting: How prompts are drawn.
    """
    keys, shape = jax.random.split(key), masks.shape[:2]
    # All that is drawn at once: a generator is a large program.
    chance = _Chance(*jax.random.uniform(keys[0], (len(_Chance._fields), *shape)))
    sides = jnp.stack([chance.left, chance.top, chance.right, chance.bottom], -1)
    # From exact boxes to loose ones: users have both.
    amount = 2 * prompting.jitter * chance.jitter[..., None]
    box = jittered(boxes(masks) * stride, sides, amount, masks.shape[-1] * stride)
    within = jnp.stack([chance.x, chance.y], -1)
    point, _ = clicks(
        keys[1], masks, masks, stride, deep=chance.deep < prompting.deep, within=within
    )
    has_box = chance.has_box < prompting.box
    has_point = ~has_box | (chance.has_point < prompting.box_point)
    empty = (*shape, prompting.rounds - 1)
    corners = jnp.where(has_box[..., None], jnp.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]), ABSENT)
    labels = [
        corners,
        jnp.where(has_point, FOREGROUND, ABSENT)[..., None],
        jnp.full(empty, ABSENT),
        jnp.where(has_box, ABSENT, NOT_A_POINT)[..., None],
    ]
    points = [box.reshape(*shape, 2, 2), point[..., None, :], jnp.zeros((*shape, empty[-1] + 1, 2))]
    return Prompts(jnp.concatenate(points, -2), jnp.concatenate(labels, -1))


def boxes(masks: Bool[Array, "*batch R R"]) -> Float[Array, "*batch 4"]:
    """Bounding boxes x0, y0, x1, y1, the latter two one past the mask; 0 where it is empty."""
    ends = []
    for axis in (-2, -1):  # columns are what is left of the rows
        line = masks.any(axis)
        size = line.shape[-1]
        first, last = line.argmax(-1), size - line[..., ::-1].argmax(-1)
        ends.append((first, jnp.where(line.any(-1), last, 0)))
    (x0, x1), (y0, y1) = ends
    return jnp.stack([x0, y0, x1, y1], -1).astype(jnp.float32)


def jittered(
    box: Float[Array, "*batch 4"],
    share: Float[Array, "*batch 4"],
    amount: Float[Array, "*batch 1"],
    size: float,
) -> Float[Array, "*batch 4"]:
    """Boxes with normal noise on every side, 20 pixels at most.

    Args:
        box: The boxes.
        share: Uniform in [0, 1): the noise's place in its distribution.
        amount: Standard deviation, as a share of the box's sides.
        size: Where the input ends.
    """
    sides = jnp.tile(box[..., 2:] - box[..., :2], 2)
    normal = math.sqrt(2) * jax.lax.erf_inv(jnp.clip(2 * share - 1, -_INSIDE, _INSIDE))
    noise = jnp.clip(normal * amount * sides, -_MAX_JITTER, _MAX_JITTER)
    return jnp.clip(box + noise, 0, size)


def clicks(
    key: Array,
    region: Bool[Array, "B P R R"],
    masks: Bool[Array, "B P R R"],
    stride: float,
    *,
    deep: Bool[Array, "B P"],
    within: Float[Array, "B P 2"],
) -> tuple[Float[Array, "B P 2"], Int[Array, "B P"]]:
    """A click in every region: its place in the input and whether the target is there.

    Args:
        key: Of this draw.
        region: Where the click may fall; an empty one is as good as the target.
        masks: The targets.
        stride: Pixels of the model's input a pixel of the masks.
        deep: Which clicks fall far from the region's edge, the others anywhere in it.
        within: Uniform in [0, 1): the click's place in its pixel of the mask.
    """
    rows, cols = region.shape[-2:]
    region = jnp.where(region.any((-2, -1), keepdims=True), region, masks)
    score = jax.random.uniform(key, region.shape, minval=0.1)
    score += deep[..., None, None] * depth(region)
    place = jnp.where(region, score, 0).reshape(*region.shape[:2], -1).argmax(-1)
    y, x = place // cols, place % cols
    found = jnp.take_along_axis(masks.reshape(*masks.shape[:2], -1), place[..., None], -1)[..., 0]
    # The prompt encoder adds half a pixel.
    point = (jnp.stack([x, y], -1) + within) * stride - 0.5
    return jnp.clip(point, 0, rows * stride - 1), jnp.where(found, FOREGROUND, BACKGROUND)


def depth(region: Bool[Array, "B P R R"]) -> Float[Array, "B P R R"]:
    """How often a region can be eroded, by ever larger squares, before a pixel is gone.

    Beyond the image's edge is background.
    """
    outside = (~region).astype(jnp.bfloat16)
    total = jnp.zeros(region.shape, jnp.float32)
    for step in _DEPTHS:
        for axis in (2, 3):
            window = [1, 1, 1, 1]
            window[axis] = 2 * step + 1
            edges = [(0, 0)] * 4
            edges[axis] = (step, step)
            outside = jnp.pad(outside, edges, constant_values=1)
            outside = jax.lax.reduce_window(
                outside, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), "VALID"
            )
        total += outside == 0
    return total
