"""LayerNorm: the kernel interpreted and cross-lowered, and its XLA twin."""

from __future__ import annotations

import os

# The interpreter runs every warpgroup on a thread of XLA's pool, whose size is read at start-up.
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.layer_norm import launch, layer_norm, prepare
from sparsesam_jax.config import PRESETS

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; the error is tested below"
)


def inputs(rows: tuple[int, ...], d: int, dtype: str) -> list[jax.Array]:
    """x, far from centred, scale and bias."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((*rows, d), (d,), (d,))
    x, scale, bias = (jax.random.normal(*z) for z in zip(keys, shapes, strict=True))
    return [array.astype(dtype) for array in (3 * x + 5, scale, bias)]


def check(out, x, scale, bias, dtype=None):
    """Rounded once: half a unit of the last place, and what float32 is off by."""
    assert out.dtype == (dtype or x.dtype)
    want = [np.asarray(array, np.float64) for array in (x, scale, bias)]
    centred = want[0] - want[0].mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    got, half_unit = np.asarray(out, np.float64), float(jnp.finfo(out.dtype).eps) / 2
    np.testing.assert_allclose(got, normed * want[1] + want[2], rtol=1.01 * half_unit, atol=1e-5)


def run(*arrays, **options) -> jax.Array:
    """The kernel on these arguments."""
    statics, operands = prepare(*arrays, **options)
    return launch(statics, *operands)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla(dtype):
    arrays = inputs((2, 3, 5), 24, dtype)
    check(layer_norm(*arrays, implementation="xla"), *arrays)
    check(layer_norm(*arrays, dtype="float16", implementation="xla"), *arrays, "float16")


@needs_mosaic
@pytest.mark.parametrize(
    ("rows", "d", "dtype", "out_dtype"),
    [
        ((2, 4, 8), 192, "bfloat16", None),
        ((1, 3, 7), 64, "float16", None),
        ((16,), 1280, "float16", "bfloat16"),
    ],
)
def test_interpreted_kernel(rows, d, dtype, out_dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    arrays, interpret = inputs(rows, d, dtype), plgpu.InterpretGPUParams()
    check(run(*arrays, dtype=out_dtype, interpret=interpret), *arrays, out_dtype)


@needs_mosaic
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("preset", PRESETS)
def test_lowers_for_every_preset(preset, batch):
    encoder = PRESETS[preset].image_encoder
    side, d = encoder.grid_size, encoder.embed_dim
    x = jax.ShapeDtypeStruct((batch, side, side, d), jnp.bfloat16)
    for dtype in (jnp.bfloat16, jnp.float32):
        vector = jax.ShapeDtypeStruct((d,), dtype)
        traced = jax.jit(run).trace(x, vector, vector)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
def test_differentiation_names_the_xla_path():
    x, scale, bias = inputs((16,), 64, "bfloat16")
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(lambda x: run(x, scale, bias).sum())(x)


def test_errors():
    x, scale, bias = inputs((4,), 96, "float32")
    with pytest.raises(ValueError, match="scale must have shape"):
        layer_norm(x, scale[:32], bias)
    expected = "x must be bfloat16 or float16, got float32; dtype must be .*; d must be"
    with pytest.raises(ValueError, match=expected):
        layer_norm(x, scale, bias, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [("bfloat16", None), ("float16", None), ("float16", "bfloat16")]
)
@pytest.mark.parametrize("rows", [(8, 64, 64), (3, 7)])
@pytest.mark.parametrize("d", [192, 768, 1024, 1280])
def test_error_and_repeats_on_gpu(d, rows, dtype, out_dtype):
    arrays = inputs(rows, d, dtype)
    normalise = jax.jit(lambda *a: layer_norm(*a, dtype=out_dtype, implementation="mosaic_gpu"))
    first = normalise(*arrays)
    check(first, *arrays, out_dtype)
    for _ in range(20):
        assert bool((normalise(*arrays) == first).all())
