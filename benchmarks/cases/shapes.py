"""The models and inputs that suites and tests share: named shapes, random weights and pixels."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from sparsesam_jax.config import PRESETS, ImageEncoderConfig, SamConfig

WEIGHTS_DISTRIBUTION = "normal: kernels 1/sqrt(fan-in), tables 0.1, biases 0.02, scales 1 + 0.02"
PIXELS_DISTRIBUTION = "standard normal"

DTYPES = ("bfloat16", "float16", "float32")  # that encoders and kernels are measured in

PHOTO_SIDES = (75 / 64, 225 / 128)  # height and width of a photo in sides of the model's input

# Small enough for a test, large enough for several key blocks in either kind of attention.
QUICK_MODEL = "quick"
MODELS: dict[str, SamConfig] = {
    **PRESETS,
    QUICK_MODEL: SamConfig(
        image_encoder=ImageEncoderConfig(
            embed_dim=64,
            depth=3,
            num_heads=2,
            global_attn_indexes=(1,),
            image_size=256,
            out_chans=32,
        ),
        decoder_mlp_dim=64,
    ),
}


def model_config(name: str) -> SamConfig:
    """The configuration of a named model.

    Raises:
        ValueError: There is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {name!r}")
    return MODELS[name]


def photo_size(config: SamConfig) -> tuple[int, int]:
    """Height and width of the photo that a model segments; 1200 x 1800 for SAM's 1024."""
    side = config.image_encoder.image_size
    return int(PHOTO_SIDES[0] * side), int(PHOTO_SIDES[1] * side)


def random_weights(config: SamConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a whole model by parameter name, float32, drawn as `WEIGHTS_DISTRIBUTION` says.

    No bias or position table is zero, so that leaving one out shows as an error.
    """
    from sparsesam_jax.checkpoints.native import parameter_shapes

    rng = np.random.default_rng(seed)
    arrays = {}
    for name, spec in parameter_shapes(config).items():
        draw = rng.standard_normal(spec.shape, np.float32)
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "kernel":
            fan_in = np.prod(spec.shape[:-1])
            arrays[name] = draw / np.float32(np.sqrt(fan_in))
        elif leaf == "bias":
            arrays[name] = 0.02 * draw
        elif leaf == "scale":
            arrays[name] = 1 + 0.02 * draw
        else:
            arrays[name] = 0.1 * draw
    return arrays


def random_pixels(
    config: SamConfig, batch: int, seed: int = 1, image_size: int | None = None
) -> Float[np.ndarray, "B height width 3"]:
    """Normalised images as the encoder takes them, float32, drawn as `PIXELS_DISTRIBUTION` says.

    The first images of a larger batch are those of a smaller one.
    """
    side = image_size or config.image_encoder.image_size
    return np.random.default_rng(seed).standard_normal((batch, side, side, 3), np.float32)


def random_image(height: int, width: int, seed: int = 2) -> UInt8[np.ndarray, "height width 3"]:
    """An RGB image of smooth colours with noise on them."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:height, :width].astype(np.float32)
    waves = [np.sin(rows / (31 + 9 * i)) * np.cos(cols / (43 + 7 * i)) for i in range(3)]
    levels = 128 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    return np.clip(levels, 0, 255).astype(np.uint8)


def diagonal_points(count: int, height: int, width: int) -> Float[np.ndarray, "count 1 2"]:
    """As many prompts of one point (x, y), along the image's diagonal."""
    steps = (np.arange(count) + 0.5) / count
    return np.stack([steps * width, steps * height], axis=-1)[:, None]
