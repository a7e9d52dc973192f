"""The position bias' kernel for tiles: interpreted and lowered on a CPU, run on a GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.tile_position import supports_tiles, tile_position, xla_tile_position
from pallas_kernels.tiles import Tiling
from sparsesam_jax.config import PRESETS

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; attention says so"
)


def make_inputs(shape: tuple[int, ...], dtype: str, seed: int = 0) -> list[jax.Array]:
    """qkv for `shape` = [B, Gh, Gw, 3, H, D] and tables, key columns in whole chunks of 16."""
    _, height, width, _, _, head_dim = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (shape, (height, height, head_dim), (width, -(-width // 16) * 16, head_dim))
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]


def make_tiling(shape: tuple[int, ...], stride: int) -> Tiling:
    return Tiling(shape[1] // stride, shape[2] // stride, stride)


def check(
    out: tuple[jax.Array, ...], arrays: list[jax.Array], tiling: Tiling, images: range
) -> None:
    """Close to float32 of the same rounded inputs."""
    exact = (x.astype(jnp.float32) for x in arrays)
    want = xla_tile_position(*exact, tiling=tiling, images=images)
    # rel_h: float32 sums of exact products, in another order. rel_w: rounded by up to 2^-9.
    dtypes, tolerances = (jnp.float32, arrays[0].dtype), (1e-5, 3e-3)
    for got, x, dtype, tolerance in zip(out, want, dtypes, tolerances, strict=True):
        assert got.shape == x.shape and got.dtype == dtype
        error = np.linalg.norm(np.asarray(got, np.float32) - x) / np.linalg.norm(x)
        assert error < tolerance


@needs_mosaic
@pytest.mark.parametrize(
    ("shape", "stride", "dtype", "images"),
    [
        ((2, 64, 16, 3, 1, 64), 2, "bfloat16", range(2)),
        # Three heads for one warpgroup, two for the other.
        ((1, 64, 8, 3, 5, 80), 1, "float16", range(1)),
        ((4, 64, 16, 3, 1, 64), 2, "float16", range(1, 3)),
    ],
)
def test_interpreted(shape, stride, dtype, images):
    arrays, tiling = make_inputs(shape, dtype), make_tiling(shape, stride)
    options = dict(num_programs=1, interpret=plgpu.InterpretGPUParams())
    out = tile_position(*arrays, tiling=tiling, images=images, **options)
    check(out, arrays, tiling, images)


@needs_mosaic
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_lowers_for_presets(preset, batch, stride):
    config = PRESETS[preset].image_encoder
    side, head_dim = config.grid_size, config.head_dim
    assert supports_tiles((side, side), head_dim)
    shape = (batch, side, side, 3, config.num_heads, head_dim)
    tiling = make_tiling(shape, stride)
    arrays = jax.eval_shape(lambda: make_inputs(shape, "bfloat16"))
    lowered = jax.jit(functools.partial(tile_position, tiling=tiling)).trace(*arrays)
    assert "mosaic_gpu_v2" in lowered.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
def test_differentiating_names_the_xla_path():
    shape = (1, 64, 8, 3, 1, 64)
    arrays, tiling = make_inputs(shape, "bfloat16"), make_tiling(shape, 1)
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(lambda qkv: tile_position(qkv, *arrays[1:], tiling=tiling)[0].sum())(arrays[0])


@pytest.mark.parametrize(
    ("grid", "head_dim", "expected"),
    [
        ((64, 64), 64, True),
        ((64, 60), 80, True),
        ((64, 72), 80, False),
        ((128, 64), 16, False),
        ((32, 32), 64, False),
    ],
)
def test_supports_tiles(grid, head_dim, expected):
    assert supports_tiles(grid, head_dim) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "shape", [(8, 64, 64, 3, 16, 64), (1, 64, 64, 3, 16, 80), (3, 64, 32, 3, 3, 64)]
)
def test_on_gpu(shape, stride, dtype):
    arrays, tiling = make_inputs(shape, dtype, seed=sum(shape)), make_tiling(shape, stride)
    images = range(shape[0] // 2, shape[0])  # of 3 images the last two
    first = tile_position(*arrays, tiling=tiling, images=images)
    with jax.default_matmul_precision("highest"):
        check(first, arrays, tiling, images)
    for _ in range(20):
        again = tile_position(*arrays, tiling=tiling, images=images)
        assert all(bool((x == y).all()) for x, y in zip(first, again, strict=True))
