"""A model, photos and settings that compile in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsesam_jax import ImageEncoderConfig, Sam, SamConfig
from sparsesam_jax.evaluation.datasets import Photo
from sparsesam_jax.tuning.augment import Augmentation
from sparsesam_jax.tuning.objective import Objective
from sparsesam_jax.tuning.prompting import Prompting
from sparsesam_jax.tuning.run import Settings, Stage
from sparsesam_jax.tuning.step import Optimiser

# Groups of blocks that repeat, so that they are a loop.
TINY = SamConfig(
    image_encoder=ImageEncoderConfig(
        embed_dim=16,
        depth=2,
        num_heads=1,
        global_attn_indexes=(0, 1),
        image_size=64,
        window_size=3,
        out_chans=16,
    ),
    decoder_mlp_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
    iou_head_hidden_dim=16,
)
SIDE = 48


def tiny_sam(path: Path, **options: Any) -> Sam:
    """The model with the tests' random weights."""
    from models import random_weights

    return Sam.from_pretrained(random_weights(path / "tiny.safetensors", TINY), **options)


def disc(seed: int, height: int = 40, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A photo of a bright disc on a dark ground, and the disc."""
    rng = np.random.default_rng(seed)
    radius = rng.uniform(8, 14)
    row, col = rng.uniform(radius, height - radius), rng.uniform(radius, width - radius)
    rows, cols = np.indices((height, width))
    mask = np.hypot(rows - row, cols - col) < radius
    image = rng.integers(0, 60, (height, width, 3)) + 150 * mask[..., None]
    return image.astype(np.uint8), mask


def discs(count: int, first: int = 0) -> list[Photo]:
    """Photos of discs with their masks."""
    photos = []
    for seed in range(first, first + count):
        image, mask = disc(seed)
        grey = (255 * mask).astype(np.uint8)
        photos.append(Photo(name=str(seed), image=image, mask=mask, grey_mask=grey))
    return photos


def write_discs(folder: Path, count: int) -> tuple[Path, Path]:
    """Folders of photos and of masks."""
    images, masks = folder / "images", folder / "masks"
    for path in (images, masks):
        path.mkdir(parents=True)
    for photo in discs(count):
        Image.fromarray(photo.image).save(images / f"{photo.name}.png")
        Image.fromarray(photo.grey_mask).save(masks / f"{photo.name}.png")
    return images, masks


def settings(**changes: Any) -> Settings:
    """Few steps of two photos."""
    options: dict[str, Any] = dict(
        stages=(Stage(image_size=64, batch=2),),
        steps=6,
        targets=1,
        log_every=1,
        save_every=2,
        objective=Objective(prompting=Prompting(rounds=2)),
        optimiser=Optimiser(learning_rate=1e-3, warmup=1),
        augmentation=Augmentation(),
    )
    return Settings(**(options | changes))


def losses(folder: Path) -> dict[int, float]:
    """The losses of a run by step."""
    rows = map(json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
