"""SAM's losses: focal, dice and the quality head's, of masks at the decoder's resolution."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """Weights of the losses. Those of SAM's paper are 20, 1 and 1.

    Attributes:
        focal: Of the focal loss.
        dice: Of the dice loss.
        iou: Of the squared error of the predicted IoU.
        alpha: The focal loss's weight of the foreground's pixels; the background's is 1 - alpha.
        gamma: Its exponent.
    """

    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        for name in ("focal", "dice", "iou", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie in (0, 1), got {self.alpha!r}")


def mask_losses(
    logits: Float[Array, "B P K R R"],
    iou_predictions: Float[Array, "B P K"],
    masks: Bool[Array, "B P R R"],
    inside: Bool[Array, "B R R"],
    losses: Losses,
) -> dict[str, Float[Array, "B P K"]]:
    """Every loss of every mask, without its weight, and the true IoU.

    Args:
        logits: Of the predicted masks, float32.
        iou_predictions: The quality head's.
        masks: The targets.
        inside: Which pixels count: those that are not padding.
        losses: Alpha and gamma of the focal loss.

    Returns:
        `focal`, `dice`, `iou` (squared errors) and `true_iou`, which has no gradient.
    """
    target, counts = masks[:, :, None], inside[:, None, None]
    axes = (-2, -1)
    signed = jnp.where(target, logits, -logits)  # of the right answer
    weight = jnp.where(target, losses.alpha, 1 - losses.alpha) * counts
    focal = -weight * jax.nn.sigmoid(-signed) ** losses.gamma * jax.nn.log_sigmoid(signed)
    focal = focal.sum(axes) / counts.sum(axes)
    probability = jax.nn.sigmoid(logits) * counts
    target = target & counts
    both = jnp.where(target, probability, 0).sum(axes)
    area = target.sum(axes)
    dice = 1 - (2 * both + 1) / (probability.sum(axes) + area + 1)
    found = (logits > 0) & counts
    union = (found | target).sum(axes)
    true_iou = (found & target).sum(axes) / jnp.maximum(union, 1)
    true_iou = jax.lax.stop_gradient(true_iou)
    return {
        "focal": focal,
        "dice": dice,
        "iou": (iou_predictions - true_iou) ** 2,
        "true_iou": true_iou,
    }
