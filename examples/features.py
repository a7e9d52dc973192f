"""Features for another network: SAM's encoder stays as it is, a small head learns on top of it.

    python examples/features.py PHOTOS MASKS

PHOTOS and MASKS are folders of files with equal stems; a mask is brighter than 128 on foreground.
The encoder sees every photo once. The head learns which tokens are foreground, without any prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.evaluation.datasets import folder_pairs, read_photo
from sparsesam_jax.model.transforms import resize_and_pad


class Head(nnx.Module):
    """Two layers on every token: its features to the logit of being foreground."""

    def __init__(self, channels: int, hidden: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(channels, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Logits, [..., C] to [...]."""
        return self.out(nnx.relu(self.hidden(features)))[..., 0]


def token_masks(mask: np.ndarray, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """The truth on the token grid, and which tokens are photo rather than padding."""
    rgb = np.repeat(mask[..., None], 3, axis=-1).astype(np.uint8) * 255
    padded, (height, width) = resize_and_pad(rgb, grid)
    inside = np.zeros((grid, grid), bool)
    inside[:height, :width] = True
    return padded[..., 0] > 127, inside


@nnx.jit
def train_step(
    head: Head, optimizer: nnx.Optimizer, features: jax.Array, truth: jax.Array, inside: jax.Array
) -> jax.Array:
    """One step of Adam on the cross entropy of all tokens inside the photos."""

    def loss(head: Head) -> jax.Array:
        each = optax.sigmoid_binary_cross_entropy(head(features), truth)
        return jnp.where(inside, each, 0).sum() / inside.sum()

    value, gradients = nnx.value_and_grad(loss)(head)
    optimizer.update(head, gradients)
    return value


def main(arguments: Sequence[str] | None = None) -> tuple[list[float], float]:
    """Train a head and return its losses and the IoU of its masks, on the photos it saw."""
    parser = argparse.ArgumentParser(description="Train a head on SAM's features.")
    parser.add_argument("photos", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--weights", default="vit_t")
    parser.add_argument("--density", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)

    sam = Sam.from_pretrained(options.weights, sparsity=Sparsity(options.density))
    predictor = SamPredictor(sam)
    features, truth, inside = [], [], []
    for pair in folder_pairs(options.photos, options.masks):
        photo = read_photo(pair)
        predictor.set_image(photo.image)
        features.append(predictor.get_image_embedding()[0])  # [Gh, Gw, C]
        masks = token_masks(photo.mask, features[-1].shape[0])
        truth.append(masks[0])
        inside.append(masks[1])
    data = jnp.stack(features), jnp.array(truth), jnp.array(inside)

    head = Head(data[0].shape[-1], 32, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(head, optax.adam(1e-2), wrt=nnx.Param)
    losses = [float(train_step(head, optimizer, *data)) for _ in range(options.steps)]
    found = (head(data[0]) > 0) & data[2]
    iou = float((found & data[1]).sum() / (found | data[1]).sum())
    print(f"{len(features)} photos, loss {losses[0]:.3f} to {losses[-1]:.3f}, IoU {iou:.3f}")
    return losses, iou


if __name__ == "__main__":
    main()
