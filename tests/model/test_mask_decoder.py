"""The mask decoder's products, in another order than the projections say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_weights

from sparsesam_jax import Sam
from sparsesam_jax.model.sam import ImageEmbedding


class Replaced(nnx.Linear):
    """A user's layer: it has to be called, for it may compute anything."""


@pytest.mark.parametrize("name", ["k_proj", "out_proj"])
def test_replaced_layers_are_called(tmp_path, name: str):
    """Those of the same arrays give the same masks, others do not."""
    sam = Sam.from_pretrained(random_weights(tmp_path / "small.safetensors"))
    rng = np.random.default_rng(0)
    grid = sam.config.image_encoder.image_size // sam.config.image_encoder.patch_size
    features = rng.normal(size=(1, grid, grid, sam.config.image_encoder.out_chans))
    points = jnp.float32(rng.uniform(0, 128, (1, 3, 2, 2)))
    labels = jnp.array([[[1, -1], [1, 0], [1, -2]]])
    embedding = ImageEmbedding(jnp.asarray(features, jnp.float32), None)
    decode = nnx.jit(lambda sam: sam.decode(embedding, points, labels)[0])
    expected = np.asarray(decode(sam))
    new = None
    for layer in sam.mask_decoder.transformer.layers:
        for attention in (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token):
            own = getattr(attention, name)
            new = Replaced(own.in_features, own.out_features, rngs=nnx.Rngs(0))
            nnx.update(new, nnx.state(own))
            setattr(attention, name, new)
    np.testing.assert_allclose(decode(sam), expected, atol=2e-5 * np.abs(expected).max())
    assert new is not None
    new.kernel[...] = jax.random.normal(jax.random.key(0), new.kernel.shape)
    assert np.abs(decode(sam) - expected).max() > 1e-2 * np.abs(expected).max()
