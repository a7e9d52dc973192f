"""A sweep's masked program gives what the sparse encoder gives."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from flax import nnx
from models import random_weights

from benchmarks.suites.quality import simulated
from sparsesam_jax import Sam, Sparsity
from sparsesam_jax.methods.group_update import GroupUpdate

MIXED = Sparsity(
    0.4, attention_density=(0.5, 0.4, 0.7), mlp_density=(1.0, 1.0, 0.55), block_size=16
)
DENSE = {"attention_density": 1.0, "mlp_density": 1.0}


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
    model = sam.with_sparsity(sparsity) if grouped is None else grouped.apply(sam)
    encode = nnx.jit(lambda encoder, x: encoder(x))
    expected = np.asarray(encode(model.image_encoder, pixels()))
    masked = simulated.masked(sam, sparsity, grouped)
    found = np.asarray(encode(masked.image_encoder, pixels()))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(found - expected).mean() < 1e-4
    # Dense, by the same program.
    everything = simulated.masked(sam, dataclasses.replace(sparsity, **DENSE))
    everything.image_encoder.method = masked.image_encoder.method
    assert nnx.graphdef(everything) == nnx.graphdef(masked)
    whole = np.asarray(encode(everything.image_encoder, pixels()))
    dense = np.asarray(encode(sam.image_encoder, pixels()))
    assert np.abs(whole - dense).mean() < 1e-4
    assert np.abs(found - dense).mean() > 1e-2
