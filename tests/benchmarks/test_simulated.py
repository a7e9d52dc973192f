"""A sweep's masked program gives what the sparse encoder gives."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SMALL, random_weights

from benchmarks.suites.quality import simulated
from sparsesam_jax import Sam, Sparsity, methods
from sparsesam_jax.methods.group_update import GroupUpdate

CONFIG = SMALL.image_encoder
MIXED = Sparsity(
    0.4, attention_density=(0.5, 0.4, 0.7), mlp_density=(1.0, 1.0, 0.55), block_size=16
)


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Sam:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    return Sam.from_pretrained(str(random_weights(path)))


@functools.lru_cache
def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 128, 128, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("fields", "update"),
    [
        ({"ranking": "block", "importance": "dispersion"}, None),
        ({"per_head": True, "curve": "hilbert"}, {"skipped": "mean", "global_blocks": True}),
    ],
)
def test_masked_is_sparse(sam: Sam, fields: dict, update: dict[str, Any] | None) -> None:
    sparsity = dataclasses.replace(MIXED, **fields)
    grouped = None if update is None else GroupUpdate(1.0, sparsity=sparsity, **update)
    model = sam.with_sparsity(sparsity) if grouped is None else methods.with_method(sam, grouped)
    encode = nnx.jit(lambda encoder, x: encoder(x))
    expected = np.asarray(encode(model.image_encoder, pixels()))
    program = simulated.program(sparsity, grouped)
    compiled = nnx.jit(simulated.encode, static_argnums=1)
    knobs = simulated.knobs(CONFIG, sparsity, grouped)
    found = np.asarray(compiled(sam.image_encoder, program, pixels(), knobs))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(found - expected).mean() < 1e-4
    # Dense, by the same program.
    depth = CONFIG.depth
    everything = simulated.Knobs(
        jnp.full(depth, 99), jnp.full(depth, 64), jnp.zeros(depth, jnp.int32)
    )
    whole = np.asarray(compiled(sam.image_encoder, program, pixels(), everything))
    dense = np.asarray(encode(sam.image_encoder, pixels()))
    assert np.abs(whole - dense).mean() < 1e-4
    assert np.abs(found - dense).mean() > 1e-2
