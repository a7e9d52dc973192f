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
from pallas_kernels.relative_position import fitting_config, relative_position, supports
from sparsesam_jax.config import PRESETS

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; attention says so"
)


def make_inputs(
    shape: tuple[int, ...], num_keys: tuple[int, int], dtype: str, seed: int = 0
) -> list[jax.Array]:
    """qkv, rel_pos_h and rel_pos_w for `shape` = [B, Gh, Gw, 3, H, D] and `num_keys` = (Sh, Sw)."""
    keys = jax.random.split(jax.random.key(seed), 3)
    tables = [(*side, shape[-1]) for side in zip(shape[1:3], num_keys, strict=True)]
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, (shape, *tables), strict=True)]


def exact(qkv: jax.Array, *tables: jax.Array) -> list[np.ndarray]:
    """The bias in float32 from the same rounded inputs."""
    arrays = (x.astype(jnp.float32) for x in (qkv[:, :, :, 0], *tables))
    return [np.asarray(x) * math.sqrt(qkv.shape[-1]) for x in reference.relative_position(*arrays)]


@needs_mosaic
@pytest.mark.parametrize(
    ("shape", "num_keys", "dtype", "num_programs"),
    [
        ((4, 4, 8, 3, 8, 64), (16, 16), "bfloat16", 2),  # eight tiles a program: stages used again
        ((2, 8, 16, 3, 3, 64), (16, 16), "bfloat16", 2),  # tiles of 8 x 8 tokens of one head
        ((1, 8, 12, 3, 4, 80), (16, 16), "float16", 12),
        ((3, 4, 4, 3, 4, 64), (16, 16), "float16", 2),  # one program has two tiles, the other one
        ((3, 4, 4, 3, 8, 64), (64, 64), "bfloat16", 1),  # chunks of 64: six tiles in four stages
        ((1, 4, 8, 3, 12, 80), (64, 64), "float16", 2),  # of 32: three tiles in two stages
        ((2, 8, 4, 3, 4, 80), (48, 32), "bfloat16", 2),  # of 16: four at a time and one left
        ((2, 4, 4, 3, 4, 64), (32, 96), "float16", 1),
        ((1, 4, 4, 3, 4, 80), (128, 128), "bfloat16", 1),
        ((1, 8, 8, 3, 2, 80), (64, 48), "float16", 1),
    ],
)
def test_interpreted(shape, num_keys, dtype, num_programs):
    arrays = make_inputs(shape, num_keys, dtype)
    assert supports(shape, num_keys, arrays[0].dtype)
    out = relative_position(
        *arrays, num_programs=num_programs, interpret=plgpu.InterpretGPUParams()
    )
    for got, want in zip(out, exact(*arrays), strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        # Rounded once to dtype: half a unit of the last place, but for float32's own rounding of
        # sums of size 64, by a unit or two of theirs.
        unit = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0.501 * unit, atol=8e-5)


@needs_mosaic
@pytest.mark.parametrize("heads", [4, 3])
def test_interpreted_for_some_images(heads):
    shape, images = (4, 8, 8, 3, heads, 64), range(1, 3)
    arrays = make_inputs(shape, (16, 16), "float16")
    out = relative_position(*arrays, images, interpret=plgpu.InterpretGPUParams())
    for got, want in zip(out, exact(*arrays), strict=True):
        # Rounded once: half a unit of the last place, 2^-11.
        np.testing.assert_allclose(np.asarray(got, np.float32), want[1:3], rtol=5e-4, atol=1e-5)


@needs_mosaic
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("keys", ["window", "map"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_lowers_for_presets(preset, keys, batch):
    config = PRESETS[preset].image_encoder
    side, head_dim = config.grid_size, config.head_dim
    shape, num_keys = (batch, side, side, 3, config.num_heads, head_dim), (side, side)
    if keys == "window":
        num_keys = (16, 16)
    arrays = jax.eval_shape(lambda: make_inputs(shape, num_keys, "bfloat16"))
    traced = jax.jit(relative_position).trace(*arrays)
    assert "mosaic_gpu_v2" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("num_keys", "head_dim"), [((14, 14), 64), ((20, 16), 72)])
def test_xla_runs_what_the_kernel_does_not_take(num_keys, head_dim):
    arrays = make_inputs((1, 6, 5, 3, 3, head_dim), num_keys, "bfloat16")
    for got, want in zip(relative_position(*arrays), exact(*arrays), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=4e-3, atol=1e-4)


def test_xla_runs_some_images():
    arrays = make_inputs((3, 6, 5, 3, 3, 64), (14, 14), "bfloat16")
    got, want = relative_position(*arrays, range(1, 3)), relative_position(*arrays)
    for some, whole in zip(got, want, strict=True):
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (some, whole[1:])))


@needs_mosaic
def test_differentiating_names_the_xla_path():
    arrays = make_inputs((1, 4, 4, 3, 4, 64), (16, 16), "bfloat16")
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(lambda qkv: relative_position(qkv, *arrays[1:])[0].sum())(arrays[0])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(), True),
        (dict(grid=(8, 60), heads=12, head_dim=80, dtype="float16"), True),
        (dict(grid=(62, 64)), False),
        (dict(grid=(64, 63)), False),
        (dict(heads=3), True),
        (dict(grid=(64, 60), heads=6), False),
        (dict(head_dim=72), False),
        (dict(head_dim=144), False),
        (dict(dtype="float32"), False),
        (dict(num_keys=(64, 64)), True),
        (dict(num_keys=(64, 64), head_dim=128), True),
        (dict(num_keys=(64, 64), heads=3, head_dim=80), True),
        (dict(num_keys=(64, 64), heads=3, head_dim=128), False),
        (dict(num_keys=(48, 128), head_dim=80), True),
        (dict(num_keys=(128, 128), head_dim=80), True),
        (dict(num_keys=(128, 128), head_dim=128), False),
        (dict(num_keys=(64, 60)), False),
        (dict(num_keys=(14, 16)), False),
    ],
    ids=str,
)
def test_supports(change, expected):
    case = dict(grid=(64, 64), heads=16, head_dim=64, num_keys=(16, 16), dtype="bfloat16") | change
    shape = (8, *case["grid"], 3, case["heads"], case["head_dim"])
    assert supports(shape, case["num_keys"], jnp.dtype(case["dtype"])) is expected


@pytest.mark.parametrize("num_keys", [(16, 16), (64, 64)])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_two_programs_share_a_multiprocessor(head_dim, num_keys):
    config = fitting_config(16, head_dim, num_keys)
    assert config is not None
    tables, outputs = 4 * sum(num_keys) * head_dim, 2 * 64 * config.num_chunks * config.width
    program = 2 * (tables + 64 * config.num_stages * head_dim + outputs)
    # 228 KiB, less what the system keeps of every program, and some for barriers.
    assert 2 * (program + 1024 + 256) <= 228 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "num_keys"),
    [
        ((8, 64, 64, 3, 16, 64), (16, 16)),
        ((1, 64, 64, 3, 16, 80), (16, 16)),
        ((2, 16, 24, 3, 4, 64), (16, 16)),
        ((1, 128, 96, 3, 12, 80), (16, 16)),
        ((8, 64, 64, 3, 16, 64), (64, 64)),
        ((8, 64, 64, 3, 12, 64), (64, 64)),
        ((2, 64, 64, 3, 16, 80), (64, 64)),
        ((8, 64, 64, 3, 3, 64), (16, 16)),
        ((8, 64, 64, 3, 3, 64), (64, 64)),
        ((1, 40, 24, 3, 8, 64), (48, 32)),
        ((1, 64, 32, 3, 4, 128), (64, 32)),
        ((1, 128, 128, 3, 4, 80), (128, 128)),
    ],
    ids=str,
)
def test_on_gpu(shape, num_keys, dtype):
    arrays = make_inputs(shape, num_keys, dtype, seed=sum(shape))
    images = range(shape[0] // 2, shape[0])
    first = relative_position(*arrays, images)
    with jax.default_matmul_precision("highest"):
        wanted = [x[images.start :] for x in exact(*arrays)]
    for got, want in zip(first, wanted, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
        assert error < 3e-3  # bfloat16 rounds by up to 2^-9, averaged
    for _ in range(20):
        again = relative_position(*arrays, images)
        assert all(bool((x == y).all()) for x, y in zip(first, again, strict=True))
