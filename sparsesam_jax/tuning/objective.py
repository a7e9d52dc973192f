"""What a tuning step minimises: SAM's losses over several rounds of prompts."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsesam_jax.model.prompt_encoder import ABSENT
from sparsesam_jax.model.sam import SamModel
from sparsesam_jax.model.transforms import MASK_THRESHOLD
from sparsesam_jax.tuning.augment import Example
from sparsesam_jax.tuning.encoding import encode
from sparsesam_jax.tuning.losses import Losses, mask_losses
from sparsesam_jax.tuning.prompting import Prompting, Prompts, clicks, first_prompts

MIN_AREA = 16  # pixels of a mask that is worth a prompt


class _Round(NamedTuple):
    prompts: Prompts
    logits: Float[Array, "B P R R"]
    has_mask: Bool[Array, "B P"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """How prompts are drawn, errors are weighed and a teacher is followed.

    Attributes:
        prompting: How prompts are drawn.
        losses: Weights of the masks' losses.
        features: Weight of the distance to a teacher's features: the squared distance over the
            square of these, so that 1 is a model that has learnt nothing.
        teacher_masks: Whether the targets are what a teacher finds for the first prompts, instead
            of the data's masks.
    """

    prompting: Prompting = dataclasses.field(default_factory=Prompting)
    losses: Losses = dataclasses.field(default_factory=Losses)
    features: float = 0.0
    teacher_masks: bool = False

    def __post_init__(self) -> None:
        if not self.features >= 0:
            raise ValueError(f"features must not be negative, got {self.features!r}")

    @property
    def needs_teacher(self) -> bool:
        """Whether anything of a teacher is asked for."""
        return self.teacher_masks or self.features > 0

    def __call__(
        self,
        sam: SamModel,
        example: Example,
        key: Array,
        teacher: SamModel | None = None,
        features: Float[Array, "B Gh Gw C"] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of a batch, and what it is made of.

        The first prompt of a target is a box or a point; each further round adds a click where the
        mask of the round before is wrong, and mostly sees that mask. Both the single mask and the
        best of the proposals are trained in every round.

        Args:
            sam: The model.
            example: What it sees and should find.
            key: Of this step.
            teacher: A model that finds masks for the same input.
            features: A teacher's, where they were computed before.
        """
        embedding = encode(sam, example.pixels)
        _, *sides, _ = embedding.features.shape
        grid, size = (sides[0], sides[1]), example.pixels.shape[1]
        masks, inside = example.masks & example.inside[:, None], example.inside
        stride = size / masks.shape[-1]
        first = first_prompts(
            jax.random.fold_in(key, self.prompting.rounds), masks, stride, self.prompting
        )
        if teacher is not None:
            taught = encode(teacher, example.pixels)
            features = taught.features
            if self.teacher_masks:
                found, _ = teacher.decode(taught, *first, multimask_output=False)
                masks = jax.lax.stop_gradient(found[:, :, 0] > MASK_THRESHOLD) & inside[:, None]
        wanted = masks.sum((-2, -1)) >= MIN_AREA
        weight = wanted / jnp.maximum(wanted.sum(), 1)
        multimask = False if sam.config.hq else None

        def decode(state: _Round) -> tuple[Array, Array]:
            points, labels = state.prompts
            embed = partial(sam.prompt_encoder, image_size=(size, size), grid=grid)
            tokens, empty = embed(points, labels, None)
            _, given = embed(points, labels, state.logits)
            dense = jnp.where(state.has_mask[..., None, None, None], given, empty)
            return sam.mask_decoder(
                embedding.features,
                sam.prompt_encoder.dense_position(grid),
                tokens,
                labels != ABSENT,
                dense,
                multimask_output=multimask,
                early_features=embedding.early_features,
            )

        # Kept for the gradient is what a round begins with, not what is inside of it.
        @jax.checkpoint
        def judge(state: _Round) -> tuple[Array, dict[str, Array], Array]:
            logits, iou = decode(state)
            found = mask_losses(logits, iou, masks, inside, self.losses)
            of_mask = self.losses.focal * found["focal"] + self.losses.dice * found["dice"]
            loss = of_mask[..., 0]
            best = found["true_iou"][..., 0]
            if logits.shape[2] > 1:
                # By its place: the gradient of `min` looks for the value, and divides by 0 where
                # the compiler has rounded it differently when it computed it again.
                place = of_mask[..., 1:].argmin(-1, keepdims=True)
                loss += jnp.take_along_axis(of_mask[..., 1:], place, -1)[..., 0]
                best = found["true_iou"][..., 1:].max(-1)
            # Every mask's quality is predicted, the poor ones' too.
            loss += self.losses.iou * found["iou"].mean(-1)
            record = {
                "focal": found["focal"][..., 0],
                "dice": found["dice"][..., 0],
                "iou_error": jnp.sqrt(found["iou"][..., 0]),
                "iou": found["true_iou"][..., 0],
                "best_iou": best,
            }
            # Stopped, because the root's gradient at 0 is infinite, and times 0 no number.
            record = jax.lax.stop_gradient(record)
            record = {name: (value * weight).sum() for name, value in record.items()}
            return (loss * weight).sum(), record, jax.lax.stop_gradient(logits[:, :, 0])

        def step(state: _Round, index: Array) -> tuple[_Round, tuple[Array, dict[str, Array]]]:
            loss, record, logits = judge(state)
            keys = jax.random.split(jax.random.fold_in(key, index), 2)
            wrong = ((logits > 0) ^ masks) & inside[:, None]
            chance = jax.random.uniform(keys[0], (*wanted.shape, 4))
            point, label = clicks(
                keys[1],
                wrong,
                masks,
                stride,
                deep=chance[..., 0] < self.prompting.deep,
                within=chance[..., 1:3],
            )
            has_mask = chance[..., 3] < self.prompting.mask_input
            prompts = state.prompts.with_click(index + 1, point, label)
            return _Round(prompts, logits, has_mask), (loss, record)

        rounds = self.prompting.rounds
        start = _Round(
            first,
            jnp.zeros(masks.shape, jnp.float32),
            jnp.zeros(wanted.shape, bool),
        )
        _, (losses, records) = jax.lax.scan(step, start, jnp.arange(rounds))
        loss, record = losses.mean(), {"wanted": wanted.mean()}
        if self.features:
            assert features is not None, "a run checks that there is a teacher"
            distance = record["feature_distance"] = _distance(
                embedding.features, jax.lax.stop_gradient(features), inside
            )
            loss += self.features * distance
        record["loss"] = loss
        for name, values in records.items():
            record |= {f"{name}_{index}": values[index] for index in (0, rounds - 1)}
        return loss, record


def _distance(
    features: Float[Array, "B Gh Gw C"],
    wanted: Float[Array, "B Gh Gw C"],
    inside: Bool[Array, "B R R"],
) -> Float[Array, ""]:
    """Squared distance over the square of what is wanted, where the input is no padding."""
    stride = inside.shape[1] // features.shape[1]
    counts = inside[:, ::stride, ::stride, None]
    features, wanted = features.astype(jnp.float32), wanted.astype(jnp.float32)
    error = jnp.where(counts, features - wanted, 0)
    return (error**2).sum() / jnp.where(counts, wanted**2, 0).sum()
