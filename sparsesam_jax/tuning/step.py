"""One step of tuning: gradients over micro-batches, AdamW, and an average of the parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sparsesam_jax.tuning.augment import Augmentation, Batch, augment
from sparsesam_jax.tuning.objective import Objective
from sparsesam_jax.tuning.parameters import Parts, decayed

_MASK_STRIDE = 4  # pixels of the input a pixel of the decoder's masks: a patch has 4 x 4 of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimiser:
    """AdamW with warm-up and a cosine, and an exponential average of the parameters.

    Attributes:
        learning_rate: The highest.
        final: What is left of it at the end, as a share.
        warmup: Steps in which it rises from zero.
        weight_decay: Of matrices.
        beta1: AdamW's.
        beta2: AdamW's.
        clip: Largest norm of a step's gradient.
        ema: How much of the average a step keeps, from 0 (no average) to below 1; less in the first
            steps.
    """

    learning_rate: float = 1e-4
    final: float = 0.01
    warmup: int = 50
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    ema: float = 0.998

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("weight_decay", "warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in ("final", "beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)!r}")

    def transformation(self) -> optax.GradientTransformation:
        """All of AdamW but the learning rate, which a step is given by its place in the run."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.scale_by_adam(self.beta1, self.beta2),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
        )

    def rate(self, step: Array, progress: Array) -> Float[Array, ""]:
        """The learning rate of a step that lies at a share of the run in [0, 1]."""
        cosine = self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return self.learning_rate * cosine * jnp.minimum(1, (step + 1) / max(1, self.warmup))


class Fixed(NamedTuple):
    """Arrays that no step changes, by name: the model's, and all of the teacher's."""

    model: dict[str, Array]
    teacher: dict[str, Array]


class State(NamedTuple):
    """What a step changes.

    Attributes:
        step: Steps that were made.
        tuned: The parameters.
        average: Their average.
        optimiser: AdamW's moments.
    """

    step: Int[Array, ""]
    tuned: dict[str, Array]
    average: dict[str, Array]
    optimiser: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """A step for one size of the input.

    Args:
        parts: The model; its arrays are not used.
        teacher: A model that is followed, likewise; None without one.
        objective: What is minimised.
        optimiser: How.
        augmentation: What is done to the photos.
        image_size: Side of the model's input.
        accumulate: Micro-batches whose gradients are averaged.
        seed: Of all draws on the device.
    """

    parts: Parts
    teacher: Parts | None
    objective: Objective
    optimiser: Optimiser
    augmentation: Augmentation
    image_size: int
    accumulate: int
    seed: int

    def __call__(
        self, state: State, fixed: Fixed, batch: Batch, progress: Array
    ) -> tuple[State, dict[str, Array]]:
        """The state after a step on a batch, and its record; pure, for `jax.jit`."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)

        def loss(tuned: dict[str, Array], index: Array, batch: Batch) -> Any:
            sam = self.parts.model(tuned, fixed.model)
            augment_key, prompt_key = jax.random.split(jax.random.fold_in(key, index))
            example = augment(
                augment_key,
                batch,
                self.image_size,
                self.image_size // _MASK_STRIDE,
                self.augmentation,
                dtype=sam.image_encoder.dtypes.compute,
            )
            teacher = self.teacher and self.teacher.model({}, fixed.teacher)
            features = None if batch.features is None else jnp.asarray(batch.features)
            return self.objective(sam, example, prompt_key, teacher, features)

        gradient = jax.value_and_grad(loss, has_aux=True)

        def add(total: Any, item: tuple[Array, Batch]) -> tuple[Any, dict[str, Array]]:
            (_, record), found = gradient(state.tuned, *item)
            return jax.tree.map(jnp.add, total, found), record

        if self.accumulate == 1:
            (_, record), found = gradient(state.tuned, jnp.int32(0), batch)
        else:
            # Every so manieth photo, so that each device has its part of every micro-batch.
            batches = jax.tree.map(
                lambda x: x.reshape(-1, self.accumulate, *x.shape[1:]).swapaxes(0, 1), batch
            )
            zero = jax.tree.map(jnp.zeros_like, state.tuned)
            found, record = jax.lax.scan(add, zero, (jnp.arange(self.accumulate), batches))
            found, record = (
                jax.tree.map(lambda x: x / self.accumulate, found),
                jax.tree.map(jnp.mean, record),
            )
        record["gradient"] = optax.global_norm(found)
        rate = record["learning_rate"] = self.optimiser.rate(state.step, progress)
        transformation = self.optimiser.transformation()
        updates, optimiser = transformation.update(found, state.optimiser, state.tuned)
        tuned = jax.tree.map(lambda p, u: p - rate * u, state.tuned, updates)
        # A young average forgets faster, so that the first parameters do not stay in it.
        kept = jnp.minimum(self.optimiser.ema, (1 + state.step) / (10 + state.step))
        kept = kept if self.optimiser.ema else 0.0
        average = jax.tree.map(lambda a, p: a + (1 - kept) * (p - a), state.average, tuned)
        return State(state.step + 1, tuned, average, optimiser), record


def initial_state(parts: Parts, optimiser: Optimiser) -> State:
    """The state before the first step."""
    tuned = parts.tuned
    average = jax.tree.map(jnp.copy, tuned)
    return State(jnp.int32(0), tuned, average, optimiser.transformation().init(tuned))
