"""A whole encoder in float8 lowers to Mosaic kernels, each of its products an 8-bit one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_kernels import implementation
from sparsesam_jax import ImageEncoderConfig, Sparsity
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.layers import DTypes

needs_mosaic = pytest.mark.skipif(
    not implementation.JAX_SUPPORTS_MOSAIC_GPU, reason="lowering needs jax >= 0.11"
)
CONFIG = ImageEncoderConfig(
    embed_dim=128, depth=2, num_heads=2, global_attn_indexes=(0,), image_size=256, out_chans=64
)


@needs_mosaic
@pytest.mark.parametrize("layers", [None, ("*.qkv", "*.lin2")], ids=str)
def test_lowers_with_any_layers_in_float8(layers, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(implementation, "device_problem", lambda: None)

    def make(products: str) -> str:
        float8 = {} if products == "dtype" else {"products": products, "float8_layers": layers}
        encoder = nnx.eval_shape(
            lambda: ImageEncoder(
                CONFIG,
                sparsity=Sparsity(0.4),
                dtypes=DTypes(jnp.bfloat16, jnp.bfloat16),
                implementation="mosaic_gpu",
                rngs=nnx.Rngs(0),
                **float8,
            )
        )
        graph, state = nnx.split(encoder)
        program = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
        traced = program.trace(state, jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.bfloat16))
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    plain, rounded = make("dtype"), make("float8")
    kernels = [text.count("mosaic_gpu_v2") for text in (plain, rounded)]
    # Products that are left to XLA: patch embedding, neck, and those of tables.
    products = [text.count("stablehlo.dot_general") for text in (plain, rounded)]
    assert kernels[1] >= kernels[0] and products[1] == products[0]
    assert "f8E4M3FN" in rounded and "f8E4M3FN" not in plain
