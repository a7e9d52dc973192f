"""Models with random weights that several tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsesam_jax import ImageEncoderConfig, SamConfig
from sparsesam_jax.checkpoints import native

SMALL = SamConfig(
    image_encoder=ImageEncoderConfig(
        embed_dim=32,
        depth=3,
        num_heads=2,
        global_attn_indexes=(1,),
        image_size=128,
        window_size=5,
        out_chans=32,
    ),
    decoder_mlp_dim=64,
    iou_head_hidden_dim=32,
)


def random_weights(path: Path, config: SamConfig = SMALL, seed: int = 0) -> Path:
    """A weights file with every parameter drawn at random, position tables included."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, spec in native.parameter_shapes(config).items():
        centre = 1.0 if name.endswith("scale") else 0.0
        scale = 0.1
        if name.endswith("kernel"):
            scale = np.prod(spec.shape[:-1]) ** -0.5
        elif name.endswith("gaussian_matrix"):
            scale = 1.0
        draw = rng.standard_normal(spec.shape, np.float32)
        arrays[name] = np.float32(centre) + np.float32(scale) * draw
    native.write(path, config, arrays)
    return path
