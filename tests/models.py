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


def trained_like_weights(path: Path, config: SamConfig, seed: int = 0) -> Path:
    """A weights file of random numbers with what decides how well trained blocks can be rounded.

    What is said of `vit_t` was measured on a photo. With its shape, these weights' features move by
    0.9 percent in float8, its own by 0.8.

    - Tokens lie in few directions, and weights read these: variances fall like `k^-1.2` in a basis
      of the whole model, and products are 2 to 6 times as large as of noise (`vit_t`: 2 to 8).
      Products of noise are no model: their relative error is larger by as much.
    - A block's attention and MLP change the residual stream by about 0.1 of its size each (`vit_t`:
      0.11 to 0.27 and 0.07 to 0.15 behind its first blocks).
    - One channel of the stream in 128 is 11 times as large as the others, 4 times behind LayerNorm
      (`vit_t`: 8 and 4.5; larger ViTs have more extreme ones, Sun et al., arXiv 2402.17762), and
      output channels' sizes are log-normal with sigma 0.3 (`vit_t`: largest 1.3 to 2 medians).
      The neck does not read these channels, whose constants would hide the features' error.
    """
    rng = np.random.default_rng(seed)
    random_weights(path, config, seed)
    encoder = config.image_encoder
    d, side, hidden = encoder.embed_dim, encoder.grid_size, encoder.mlp_dim
    _, arrays = native.read(path)
    arrays = {name: np.array(array) for name, array in arrays.items()}
    outliers = rng.choice(d, d // 128, replace=False)
    k = np.arange(1, d + 1)
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0] * np.sqrt(d)
    in_stream = basis * k**-0.6 / np.linalg.norm(k**-0.6)  # columns; variances k^-1.2, of sum d
    read = basis * k**-0.3 / np.linalg.norm(k**-0.3)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    def sized(x: np.ndarray, size: float) -> float:
        return size / np.sqrt((x * x).mean())

    gains = np.exp(0.2 * noise(d))
    gains[outliers] = 0.4
    position = noise(side * side, d) @ in_stream.T
    position[:, outliers] += 15 * rng.choice([-1, 1], len(outliers))
    stream = np.sqrt((position**2).mean())
    tokens = position[:256] - position[:256].mean(1, keepdims=True)
    tokens = tokens / tokens.std(1, keepdims=True) * gains
    arrays["image_encoder.neck.0.kernel"][:, :, outliers] = 0
    arrays["image_encoder.pos_embed"] = position.reshape(1, side, side, d)
    for index in range(encoder.depth):
        block = f"image_encoder.blocks.{index}."
        qkv = read @ noise(d, 3 * d) * np.exp(0.3 * noise(3 * d))
        qkv *= sized(tokens @ qkv, 1.0)
        lin1 = read @ noise(d, hidden) * np.exp(0.3 * noise(hidden))
        lin1 *= sized(tokens @ lin1, 1.0)
        values, active = tokens @ qkv[:, 2 * d :], np.maximum(tokens @ lin1, 0)
        proj = qkv[:, 2 * d :].T @ read @ noise(d, d) @ in_stream.T
        aligned = lin1.T @ read
        aligned = aligned * sized(aligned, 1.0) + noise(hidden, d)
        lin2 = aligned @ noise(d, d) @ in_stream.T
        arrays |= {
            f"{block}norm1.scale": gains,
            f"{block}norm2.scale": gains,
            f"{block}attn.qkv.kernel": qkv,
            f"{block}attn.proj.kernel": proj * sized(values @ proj, 0.4 * stream),
            f"{block}mlp.lin1.kernel": lin1,
            f"{block}mlp.lin2.kernel": lin2 * sized(active @ lin2, 0.12 * stream),
        }
    native.write(path, config, {name: array.astype(np.float32) for name, array in arrays.items()})
    return path
