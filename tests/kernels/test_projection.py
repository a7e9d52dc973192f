"""The linear layer: the kernel interpreted and cross-lowered, and its XLA twin."""

from __future__ import annotations

import os

# The interpreter runs every warpgroup on a thread of XLA's pool, whose size is read at start-up.
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.matmul_kernel import Config
from pallas_kernels.projection import launch, prepare, projection
from sparsesam_jax.config import PRESETS

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; the error is tested below"
)
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}
SMALL = Config(tile_n=64, num_stages=2, num_programs=2)


def inputs(
    rows: tuple[int, ...], d: int, n: int, dtype: str = "bfloat16", stream: str | None = None
) -> list[jax.Array]:
    """x, kernel and bias, and a residual that may have another dtype."""
    shapes = ((*rows, d), (d, n), (n,), (*rows, n))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x, kernel, bias, residual = (jax.random.normal(*z) for z in zip(keys, shapes, strict=True))
    arrays = [array.astype(dtype) for array in (x, kernel * d**-0.5, bias)]
    return [*arrays, residual.astype(stream or dtype)]


def expected(x, kernel, bias, residual=None):
    x, kernel, bias = (np.asarray(array, np.float64) for array in (x, kernel, bias))
    out = x @ kernel + bias
    return out if residual is None else out + np.asarray(residual, np.float64)


def error(out, want) -> float:
    return float(np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want))


def run(*arrays, **options) -> jax.Array:
    """The kernel on these arguments."""
    statics, operands = prepare(*arrays, **options)
    return launch(statics, *operands)


@pytest.mark.parametrize("with_residual", [False, True])
def test_xla(with_residual):
    *arrays, residual = inputs((2, 3, 5), 24, 40, "float32")
    residual = residual if with_residual else None
    out = projection(*arrays, residual=residual, implementation="xla")
    np.testing.assert_allclose(out, expected(*arrays, residual), atol=1e-5)


def test_xla_keeps_the_residuals_dtype():
    *arrays, residual = inputs((2, 3, 5), 24, 40, "bfloat16", "float16")
    out = projection(*arrays, residual=residual, implementation="xla")
    assert out.dtype == jnp.float16
    assert error(out, expected(*arrays, residual)) < TOLERANCE["bfloat16"]


@needs_mosaic
@pytest.mark.parametrize(
    ("rows", "dtype", "stream"),
    [
        ((1, 16, 16), "bfloat16", None),
        ((2, 8, 16), "float16", "float16"),
        ((1, 9, 8), "bfloat16", "bfloat16"),
        ((1, 16, 8), "bfloat16", "float16"),
    ],
)
def test_interpreted_kernel(rows, dtype, stream):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *arrays, residual = inputs(rows, 64, 64, dtype, stream)
    residual = residual if stream else None
    options = {"config": SMALL, "interpret": plgpu.InterpretGPUParams()}
    out = run(*arrays, residual=residual, **options)
    assert out.dtype == (stream or dtype)
    assert error(out, expected(*arrays, residual)) < TOLERANCE[stream or dtype]


@needs_mosaic
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("preset", PRESETS)
def test_lowers_for_every_preset(preset, batch):
    encoder = PRESETS[preset].image_encoder
    d, side = encoder.embed_dim, encoder.grid_size
    x = jax.ShapeDtypeStruct((batch, side, side, d), jnp.bfloat16)
    stream = jax.ShapeDtypeStruct(x.shape, jnp.float16)
    for n, residual in ((3 * d, None), (d, x), (d, stream)):
        kernel = jax.ShapeDtypeStruct((d, n), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct((n,), jnp.float32)
        traced = jax.jit(lambda *a: run(*a[:3], residual=a[3])).trace(x, kernel, bias, residual)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
def test_differentiation_names_the_xla_path():
    x, kernel, bias, _ = inputs((256,), 64, 64)
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(lambda x: run(x, kernel, bias).sum())(x)


def test_errors():
    x, kernel, bias, residual = inputs((4,), 64, 64)
    with pytest.raises(ValueError, match="kernel must have shape"):
        projection(x, kernel[:32], bias)
    with pytest.raises(ValueError, match="residual must have shape"):
        projection(x, kernel, bias, residual=residual[:2])
    options = {"implementation": "mosaic_gpu"}
    with pytest.raises(ValueError, match="x and kernel must be both bfloat16 or both float16"):
        projection(x.astype(jnp.float32), kernel, bias, **options)
    with pytest.raises(ValueError, match="residual must be bfloat16 or float16, got float32"):
        projection(x, kernel, bias, residual=residual.astype(jnp.float32), **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "stream"),
    [
        ("bfloat16", None),
        ("float16", None),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float16"),
    ],
)
@pytest.mark.parametrize("d", [192, 768, 1024, 1280])
@pytest.mark.parametrize("batch", [1, 8])
def test_error_and_repeats_on_gpu(batch, d, dtype, stream):
    *arrays, residual = inputs((batch, 64, 64), d, d if stream else 3 * d, dtype, stream)
    residual = residual if stream else None
    options = {"implementation": "mosaic_gpu"}
    project = jax.jit(lambda *a, residual: projection(*a, residual=residual, **options))
    first = project(*arrays, residual=residual)
    want = projection(
        *(x.astype(jnp.float32) for x in arrays),
        residual=None if residual is None else residual.astype(jnp.float32),
        implementation="xla",
    )
    assert error(first, np.asarray(want, np.float64)) <= TOLERANCE[stream or dtype]
    for _ in range(20):
        assert bool((project(*arrays, residual=residual) == first).all())
