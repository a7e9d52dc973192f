"""The position bias' kernel: interpreted and cross-lowered on a CPU, run on a GPU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import reference
from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.relative_position import relative_position, supports
from sparsesam_jax.config import PRESETS

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; attention says so"
)


def make_inputs(shape: tuple[int, ...], dtype: str, seed: int = 0) -> list[jax.Array]:
    """qkv, rel_pos_h and rel_pos_w for `shape` = [B, Gh, Gw, 3, H, D]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    tables = [(side, 16, shape[-1]) for side in shape[1:3]]
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, (shape, *tables), strict=True)]


def exact(qkv: jax.Array, *tables: jax.Array) -> list[np.ndarray]:
    """The bias in float32 from the same rounded inputs."""
    arrays = (x.astype(jnp.float32) for x in (qkv[:, :, :, 0], *tables))
    return [np.asarray(x) * math.sqrt(qkv.shape[-1]) for x in reference.relative_position(*arrays)]


@needs_mosaic
@pytest.mark.parametrize(
    ("shape", "dtype", "num_programs"),
    [
        ((2, 8, 16, 3, 3, 64), "bfloat16", 2),  # six tiles a program: its stages are used again
        ((1, 16, 24, 3, 2, 80), "float16", 12),
        ((3, 8, 8, 3, 1, 64), "float16", 2),  # one program has two tiles, the other one
    ],
)
def test_interpreted(shape, dtype, num_programs):
    arrays = make_inputs(shape, dtype)
    out = relative_position(
        *arrays, num_programs=num_programs, interpret=plgpu.InterpretGPUParams()
    )
    for got, want in zip(out, exact(*arrays), strict=True):
        assert got.dtype == dtype
        # Rounded once to dtype: half a unit of the last place, but for float32's own rounding.
        unit = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            np.asarray(got, np.float32), want, rtol=0.501 * unit, atol=1e-2 * unit
        )


@needs_mosaic
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_lowers_for_presets(preset, batch):
    config = PRESETS[preset].image_encoder
    side, head_dim = config.grid_size, config.head_dim
    assert supports((side, side), head_dim, jnp.bfloat16)
    table = jax.ShapeDtypeStruct((side, 16, head_dim), jnp.bfloat16)
    qkv = jax.ShapeDtypeStruct((batch, side, side, 3, config.num_heads, head_dim), jnp.bfloat16)
    traced = jax.jit(relative_position).trace(qkv, table, table)
    assert "mosaic_gpu_v2" in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
def test_differentiating_names_the_xla_path():
    arrays = make_inputs((1, 8, 8, 3, 1, 64), "bfloat16")
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(lambda qkv: relative_position(qkv, *arrays[1:])[0].sum())(arrays[0])


@pytest.mark.parametrize(
    ("grid", "head_dim", "dtype", "expected"),
    [
        ((64, 64), 64, "bfloat16", True),
        ((8, 24), 80, "float16", True),
        ((64, 60), 64, "bfloat16", False),
        ((15, 16), 64, "bfloat16", False),
        ((64, 64), 72, "bfloat16", False),
        ((64, 64), 144, "bfloat16", False),
        ((64, 64), 64, "float32", False),
    ],
)
def test_supports(grid, head_dim, dtype, expected):
    assert supports(grid, head_dim, jnp.dtype(dtype)) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("batch", "grid", "heads", "head_dim"),
    [(8, (64, 64), 16, 64), (1, (64, 64), 16, 80), (2, (16, 24), 3, 64), (1, (128, 96), 12, 80)],
)
def test_on_gpu(batch, grid, heads, head_dim, dtype):
    seed = int(np.random.default_rng().integers(2**31))
    arrays = make_inputs((batch, *grid, 3, heads, head_dim), dtype, seed)
    first = relative_position(*arrays)
    for got, want in zip(first, exact(*arrays), strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        assert error < 3e-3  # bfloat16 rounds by up to 2^-9, averaged
    for _ in range(20):
        again = relative_position(*arrays)
        assert all(bool((x == y).all()) for x, y in zip(first, again, strict=True))
