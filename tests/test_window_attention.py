"""The window attention kernel: interpreted and lowered on a CPU, run on a GPU (marker `gpu`)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import reference
from pallas_kernels import window_attention as kernel
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from sparsesam_jax.config import PRESETS

# Rounding of the weights and of the result to the dtype, 2^-9 and 2^-12 at most, averaged.
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}


def make_inputs(
    shape: tuple[int, ...],
    window_size: int,
    dtype: str,
    *,
    rel_dtype: str | None = None,
    bias: float = 1.0,
    seed: int = 0,
) -> list[jax.Array]:
    """q, k, v, rel_h, rel_w for `shape` = [B, Gh, Gw, H, D]."""
    keys = jax.random.split(jax.random.key(seed), 5)
    arrays = [jax.random.normal(key, shape, dtype) for key in keys[:3]]
    rel_shape = (*shape[:4], window_size)
    return arrays + [
        (bias * jax.random.normal(key, rel_shape)).astype(rel_dtype or dtype) for key in keys[3:]
    ]


def relative_error(out: jax.Array, arrays: list[jax.Array], window_size: int, **bar) -> float:
    """Frobenius error against the float32 reference of the same rounded inputs."""
    arrays = [x.astype(jnp.float32) for x in arrays]
    arrays[3:] = [x[..., :window_size] for x in arrays[3:]]
    run = jax.jit(lambda *x: reference.window_attention(*x, window_size=window_size, **bar))
    want = np.asarray(run(*arrays))
    return float(np.linalg.norm(np.asarray(out, np.float32) - want) / np.linalg.norm(want))


def random_order(lead: tuple[int, ...], num_keys: int, seed: int = 1) -> np.ndarray:
    draws = np.random.default_rng(seed).random((*lead, num_keys))
    return draws.argsort(-1).astype(np.int32)


def fresh_seed() -> int:
    return int(np.random.default_rng().integers(2**31))


def gpu_error(arrays: list[jax.Array], window_size: int, **bar) -> float:
    """Error of the kernel, jitted, on this machine's GPU; a NaN is one too."""
    run = jax.jit(
        lambda *x: kernel.window_attention(
            *x, window_size=window_size, implementation="mosaic_gpu", **bar
        )
    )
    error = relative_error(run(*arrays), arrays, window_size, **bar)
    assert np.isfinite(error)
    print(arrays[0].shape, arrays[0].dtype, arrays[3].dtype, f"error {error:.2e}")
    return error


def interpreted(*arrays: jax.Array, config: kernel.Config | None = None, **options) -> jax.Array:
    config = config or kernel.Config(num_ctas=2)
    return kernel.mosaic_window_attention(
        *arrays, interpret=plgpu.InterpretGPUParams(), config=config, **options
    )


def needs_mosaic_gpu(arrays: list[jax.Array], window_size: int, **bar) -> bool:
    """Whether this jax has the kernel; where it has not, that asking for it says so."""
    if not JAX_SUPPORTS_MOSAIC_GPU:
        with pytest.raises(ValueError, match=r"needs jax >= 0\.11"):
            kernel.window_attention(
                *arrays, window_size=window_size, implementation="mosaic_gpu", **bar
            )
    return JAX_SUPPORTS_MOSAIC_GPU


@pytest.mark.parametrize(
    ("shape", "window_size", "dtype", "rel_dtype"),
    [
        ((1, 15, 14, 2, 64), 14, "bfloat16", "bfloat16"),  # a window of one row of tokens
        ((2, 9, 17, 1, 64), 8, "float16", "float16"),
        ((1, 14, 14, 1, 80), 14, "bfloat16", "bfloat16"),  # sqrt(80) in two halves
        ((1, 8, 7, 1, 80), 7, "float16", "float32"),
        ((1, 12, 12, 1, 64), 12, "bfloat16", "float32"),  # an odd number of query tiles
    ],
)
def test_interpreted_dense(shape, window_size, dtype, rel_dtype):
    arrays = make_inputs(shape, window_size, dtype, rel_dtype=rel_dtype)
    if needs_mosaic_gpu(arrays, window_size):
        out = interpreted(*arrays, window_size=window_size)
        assert out.dtype == dtype
        assert relative_error(out, arrays, window_size) < TOLERANCE[dtype]


@pytest.mark.parametrize("take_turns", [True, False])
@pytest.mark.parametrize("config", kernel.CONFIGS)
def test_interpreted_items_in_sequence(config, take_turns):
    config = dataclasses.replace(config, num_ctas=1, take_turns=take_turns)
    arrays = make_inputs((1, 10, 30, 1, 64), 10, "bfloat16")  # three items for the only block
    if needs_mosaic_gpu(arrays, 10):
        out = interpreted(*arrays, window_size=10, config=config)
        assert relative_error(out, arrays, 10) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize(("per", "density"), [("static", 0.3), ("window", 0.5), ("head", 0.3)])
def test_interpreted_bar(per, density):
    window_size, shape = 12, (1, 13, 12, 2, 64)
    layout = BlockLayout.bar(window_size**2, density)
    assert not layout.is_dense
    lead = {"static": (), "window": (1, 2), "head": (1, 2, 2)}[per]
    order = random_order(lead, window_size**2)
    order = order if per == "static" else jnp.asarray(order)
    arrays = make_inputs(shape, window_size, "bfloat16")
    bar = dict(layout=layout, order=order)
    if needs_mosaic_gpu(arrays, window_size, **bar):
        out = interpreted(*arrays, window_size=window_size, **bar)
        assert relative_error(out, arrays, window_size, **bar) < TOLERANCE["bfloat16"]


def test_interpreted_large_bias_keeps_the_digits_of_float32():
    arrays = make_inputs((1, 8, 8, 1, 80), 8, "bfloat16", rel_dtype="float32", bias=15.0)
    if needs_mosaic_gpu(arrays, 8):
        out = jax.jit(lambda *x: interpreted(*x, window_size=8))(*arrays)
        # Rounded to bfloat16 once, biases of 50 would be wrong by up to 0.1: an error of 5e-2.
        assert relative_error(out, arrays, 8) < TOLERANCE["bfloat16"]


def test_rel_may_be_padded_to_16_columns():
    arrays = make_inputs((1, 7, 7, 1, 64), 7, "float16")
    padded = arrays[:3] + [jnp.pad(x, ((0, 0),) * 4 + ((0, 9),)) for x in arrays[3:]]
    xla = kernel.window_attention(*padded, window_size=7, implementation="xla")
    assert relative_error(xla, arrays, 7) < TOLERANCE["float16"]
    if needs_mosaic_gpu(padded, 7):
        out = interpreted(*padded, window_size=7)
        np.testing.assert_array_equal(out, interpreted(*arrays, window_size=7))


@pytest.mark.parametrize("density", [None, 0.3, 0.5])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_lowers_for_presets(preset, batch, density):
    config = PRESETS[preset].image_encoder
    side, w, heads = config.grid_size, config.window_size, config.num_heads
    shape = (batch, side, side, heads, config.head_dim)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    arrays += [jax.ShapeDtypeStruct((*shape[:4], w), jnp.bfloat16)] * 2
    layout = None if density is None else BlockLayout.bar(w * w, density)
    windows = (-(-side // w)) ** 2
    order = jax.ShapeDtypeStruct((batch, windows, heads, w * w), jnp.int32)
    if needs_mosaic_gpu(arrays, w, layout=layout, order=order):
        for argument in (random_order((), w * w), order)[: 1 if density is None else 2]:
            static = isinstance(argument, np.ndarray)

            def run(*x, static=static):
                bar = dict(layout=layout, order=random_order((), w * w) if static else x[5])
                return kernel.mosaic_window_attention(*x[:5], window_size=w, **bar)

            traced = jax.jit(run).trace(*arrays, *(() if static else (argument,)))
            assert "mosaic_gpu_v2" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("rel_dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
@pytest.mark.parametrize("window_size", kernel.WINDOW_SIZES)
def test_every_window_size_lowers(window_size, head_dim, rel_dtype):
    shape = (1, 20, 20, 3, head_dim)
    arrays = make_inputs(shape, window_size, "float16", rel_dtype=rel_dtype)
    if needs_mosaic_gpu(arrays, window_size):
        run = jax.jit(lambda *x: kernel.mosaic_window_attention(*x, window_size=window_size))
        text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu_v2" in text


def test_differentiating_the_kernel_names_the_xla_path():
    arrays = make_inputs((1, 7, 7, 1, 64), 7, "bfloat16")
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(lambda q: kernel.mosaic_window_attention(q, *arrays[1:], window_size=7).sum())(
            arrays[0]
        )
    gradient = jax.grad(
        lambda q: kernel.window_attention(q, *arrays[1:], window_size=7, implementation="xla").sum()
    )(arrays[0])
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window_size=17), "window_size must lie in 7 to 16, got 17"),
        (dict(head_dim=48), r"head_dim must be one of \(64, 80\), got 48"),
        (dict(dtype="float32"), "all bfloat16 or all float16, got .*float32"),
        (dict(rel_dtype="float16"), "rel_h must have the dtype of q or float32, got float16"),
    ],
)
def test_mosaic_gpu_says_what_it_does_not_support(change, message):
    case = dict(window_size=7, head_dim=64, dtype="bfloat16", rel_dtype=None) | change
    shape, w = (1, 7, 7, 1, case["head_dim"]), case["window_size"]
    arrays = make_inputs(shape, w, case["dtype"], rel_dtype=case["rel_dtype"])
    with pytest.raises(ValueError, match=message):
        kernel.window_attention(*arrays, window_size=w, implementation="mosaic_gpu")
    kernel.window_attention(*arrays, window_size=w)  # what auto cannot give the kernel, XLA runs


def test_arguments_are_checked():
    arrays = make_inputs((1, 14, 14, 1, 64), 7, "bfloat16")
    layout = BlockLayout.bar(14 * 14, 0.3)
    with pytest.raises(ValueError, match=r"rel_h must have shape .* \+ \(9,\)"):
        kernel.window_attention(*arrays, window_size=9)
    with pytest.raises(ValueError, match=r"layout must be BlockLayout.bar\(49, density\)"):
        kernel.window_attention(*arrays, window_size=7, layout=layout, order=np.arange(196))
    arrays = make_inputs((1, 14, 14, 1, 64), 14, "bfloat16")
    with pytest.raises(ValueError, match=r"order must have one of the shapes .* got None"):
        kernel.window_attention(*arrays, window_size=14, layout=layout)


@pytest.mark.gpu
@pytest.mark.parametrize("rel_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
@pytest.mark.parametrize("batch", [1, 8])
def test_on_gpu(batch, head_dim, dtype, rel_dtype):
    for bias in (1.0, 12.0):  # the largest of millions are beyond 50
        rel_dtype = dtype if rel_dtype == "same" else rel_dtype
        shape = (batch, 64, 64, 8, head_dim)
        arrays = make_inputs(shape, 14, dtype, rel_dtype=rel_dtype, bias=bias, seed=fresh_seed())
        assert bias == 1.0 or max(float(abs(x).max()) for x in arrays[3:]) > 50
        assert gpu_error(arrays, 14) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("side", [16, 24, 50, 96, 128])
def test_grids_on_gpu(side):
    for head_dim in kernel.HEAD_DIMS:
        arrays = make_inputs((1, side, side, 3, head_dim), 14, "bfloat16", seed=fresh_seed())
        assert gpu_error(arrays, 14) < TOLERANCE["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("window_size", kernel.WINDOW_SIZES)
def test_window_sizes_on_gpu(window_size):
    for head_dim in kernel.HEAD_DIMS:
        arrays = make_inputs((2, 37, 33, 3, head_dim), window_size, "float16", seed=fresh_seed())
        assert gpu_error(arrays, window_size) < TOLERANCE["float16"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("per", "density", "head_dim"),
    [("static", 0.2, 64), ("static", 0.3, 80), ("window", 0.5, 64), ("head", 0.3, 64)],
)
def test_bar_on_gpu(per, density, head_dim):
    layout = BlockLayout.bar(14 * 14, density)
    order = random_order({"static": (), "window": (2, 25), "head": (2, 25, 4)}[per], 14 * 14)
    bar = dict(layout=layout, order=order if per == "static" else jnp.asarray(order))
    arrays = make_inputs((2, 64, 64, 4, head_dim), 14, "bfloat16", seed=fresh_seed())
    assert gpu_error(arrays, 14, **bar) < TOLERANCE["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
def test_bit_identical_on_gpu(head_dim):
    arrays = make_inputs((8, 64, 64, 16, head_dim), 14, "bfloat16", seed=fresh_seed())
    run = jax.jit(
        lambda *x: kernel.window_attention(*x, window_size=14, implementation="mosaic_gpu")
    )
    first = run(*arrays)
    assert bool(jnp.isfinite(first).all())
    for _ in range(20):
        assert bool((run(*arrays) == first).all())
