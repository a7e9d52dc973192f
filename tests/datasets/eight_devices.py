"""A batch split over eight virtual devices: `test_embed` runs this in a process of its own."""

from __future__ import annotations

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import implementation
from sparsesam_jax import PRESETS, Sam, SamPredictor, Sparsity
from sparsesam_jax.datasets.encoder import BatchEncoder
from sparsesam_jax.datasets.loading import LoadedPhoto
from sparsesam_jax.model import compiled


def loaded(count: int) -> list[LoadedPhoto]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 60, 128, 3), np.uint8)
    return [LoadedPhoto(row, str(row), (60, 128), pixels[row], "", "") for row in range(count)]


def check_features(weights: str) -> None:
    sam = Sam.from_pretrained(weights, sparsity=Sparsity(0.5))
    for padding in ("square", "crop"):
        predictor = SamPredictor(sam, padding=padding)
        one = BatchEncoder(predictor, 8, devices=jax.devices()[:1])
        two, eight = (
            BatchEncoder(predictor, 1, devices=jax.devices()[:2]),
            BatchEncoder(predictor, 1),
        )
        encoded = [e.wait(e.launch(loaded(n))) for e, n in ((one, 7), (eight, 7), (two, 2))]
        assert len(encoded[1].parts[0].features.sharding.device_set) == 8
        features = [e.arrays().features for e in encoded]
        assert features[0].shape == (7, 8 if padding == "square" else 4, 8, 32)
        np.testing.assert_allclose(features[0], features[1], atol=1e-5)
        # A photo's features do not depend on how many devices there are.
        np.testing.assert_array_equal(features[1][:2], features[2])


def check_kernels() -> None:
    """The split program has the kernels of the whole one, and nothing between the devices."""
    preset = PRESETS["vit_t"]
    encoder = dataclasses.replace(preset.image_encoder, depth=2, global_attn_indexes=(1,))
    config = dataclasses.replace(preset, image_encoder=encoder)
    options = {"implementation": "mosaic_gpu", "sparsity": Sparsity(0.4), "rngs": nnx.Rngs(0)}
    whole = compiled.CompiledSam(Sam(config, dtype=jnp.bfloat16, **options))
    mesh = whole.on_devices(jax.devices())._mesh
    program, frame, crop = whole._require_encoder(), (64, 64), (768, 1024)
    tables = jax.eval_shape(
        lambda leaves: program.graph.merge(leaves).image_encoder.tables((48, 64), frame),
        program.leaves,
    )
    images, sizes = np.zeros((8, 1024, 1024, 3), np.uint8), np.zeros((8, 2), np.int32)
    arguments = (program.graph, frame, crop, program.leaves, tables, images, sizes)
    implementation.device_problem = lambda: None
    programs = (
        compiled._encode_padded.trace(*arguments),
        compiled._encode_split.trace(mesh, *arguments),
    )
    texts = [one.lower(lowering_platforms=("cuda",)).as_text() for one in programs]
    kernels = [text.count("@mosaic_gpu_v2") for text in texts]
    assert kernels[0] == kernels[1] > 0
    assert texts[1].count("manual_computation") == 1
    assert not re.search("all_gather|all_reduce|all_to_all|collective", texts[1])


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    check_features(sys.argv[1])
    if implementation.JAX_SUPPORTS_MOSAIC_GPU:
        check_kernels()
