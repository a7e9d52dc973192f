"""The kernels on 8-bit operands, interpreted and cross-lowered on a CPU."""

from __future__ import annotations

import functools
import os

# The interpreter runs every warpgroup on a thread of XLA's pool, whose size is read at start-up.
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stripe_cases
import window_cases
from float8_cases import TOLERANCE, check_mlp, check_quantized, error, float8_block, run

from pallas_kernels import (
    layer_norm,
    matmul_kernel,
    projection,
    routed_mlp,
    stripe_attention,
    window_attention,
)
from pallas_kernels.float8 import (
    DTYPE,
    Float8Rows,
    dequantize,
    quantize_rows,
    quantize_static,
    quantize_weight,
)
from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.matmul_kernel import Config
from sparsesam_jax.config import PRESETS

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11"
)
SCALE = jnp.float32(2.0**-6)  # of GELU's output
SHARED = Config(take_turns=False, tile_n=64, tile_k=128, num_stages=2, num_slots=1, num_programs=2)
TURNS = Config(tile_m=64, tile_n=128, tile_k=64, num_stages=2, num_slots=1, num_programs=2)


def interpret():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()


def operands(rows: int, d: int, n: int, *, static: bool) -> tuple:
    """Rows with zeros, an outlier and what saturates among them, a weight, a bias, a residual."""
    shapes = (rows, d), (d, n), (n,), (rows, n)
    x, kernel, bias, residual = (
        jax.random.normal(key, shape)
        for key, shape in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
    )
    x = x.at[3].set(0).at[5, 7].set(1e3)
    values = quantize_static(x, SCALE) if static else quantize_rows(x)
    return values, quantize_weight(kernel * d**-0.5), bias, residual.astype("bfloat16")


@needs_mosaic
@pytest.mark.parametrize("config", [SHARED, TURNS], ids=["shared", "turns"])
@pytest.mark.parametrize(("rows", "static", "added"), [(256, False, False), (40, True, True)])
def test_interpreted_projection(rows, static, added, config):
    x, weight, bias, residual = operands(rows, 128, 128, static=static)
    own = {"residual": residual} if added else {"dtype": "bfloat16"}
    out = run(projection, x, weight, bias, config=config, interpret=interpret(), **own)
    want = dequantize(x) @ dequantize(weight) + bias
    assert out.dtype == jnp.bfloat16
    assert error(out, want + residual if added else want) < TOLERANCE


@needs_mosaic
@pytest.mark.parametrize("num_rows", [32, 21])
def test_interpreted_layer_norm(num_rows):
    x = 3 * jax.random.normal(jax.random.key(0), (num_rows, 192)) + 5
    x = x.at[3].set(1).at[5, 7].set(1e3).at[6, 0].set(jnp.nan).astype("bfloat16")
    scale, bias = jnp.ones(192).at[0].set(9.0), jnp.zeros(192)
    out = run(layer_norm, x, scale, bias, dtype=DTYPE, interpret=interpret())
    assert out.scale.shape == (num_rows,)
    want = layer_norm.layer_norm(x, scale, bias, dtype="float32", implementation="xla")
    nan = np.isnan(np.asarray(want))
    assert nan[6].all() and np.isnan(np.asarray(dequantize(out)))[6].any()
    keep = np.arange(num_rows) != 6
    check_quantized(Float8Rows(out.values[keep], out.scale[keep]), want[keep])
    assert not np.asarray(out.values[3], np.float32).any()


@needs_mosaic
def test_interpreted_gelu_saturates_and_keeps_nan():
    x, weight, bias, _ = operands(256, 128, 128, static=False)
    bias = bias.at[0].set(100.0).at[1].set(jnp.nan)
    arrays = (x, weight, bias)
    options = dict(epilogue="gelu", config=TURNS, dtype=DTYPE, out_scale=SCALE)
    out = run(matmul_kernel, *arrays, interpret=interpret(), **options)
    hidden = jax.nn.gelu(dequantize(x) @ dequantize(weight) + bias, approximate=False)
    out = np.asarray(out, np.float32)
    assert (out[:, 0] == 448).all() and np.isnan(out[:, 1]).all()
    check_quantized(Float8Rows(jnp.asarray(out[:, 2:]).astype(DTYPE), SCALE), hidden[:, 2:])


@needs_mosaic
def test_interpreted_mlp():
    x, index, weights = float8_block(d=64, h=128)
    check_mlp(run(routed_mlp, x, index, weights, interpret=interpret()), x, index, weights)


def stripe_arguments(case: stripe_cases.Case) -> tuple:
    """What `stripe_attention` takes, by place and by name."""
    qkv, rel_pos_h, rel_pos_w, sequence, block_order = stripe_cases.inputs(case, 0)
    options = dict(layout=case.layout, block_order=block_order)
    return (qkv, rel_pos_h, rel_pos_w, sequence), options


def window_arguments(case: window_cases.Case, *, has_bias: bool = True) -> tuple:
    """What `window_attention` takes, by place and by name."""
    *arrays, order = window_cases.inputs(case, 0)
    options = dict(window_size=case.window_size, layout=case.layout, order=order)
    return tuple(arrays if has_bias else arrays[:1]), options


def check_attention(function, out, arrays, options):
    """Near the XLA path, beside which values may be rounded the other way, and saturated."""
    want = function(*arrays, implementation="xla", **options)
    assert out.values.shape == want.values.shape and out.values.dtype == DTYPE
    assert 0.001 < float((jnp.abs(want.values.astype(jnp.float32)) == 448).mean()) < 0.5
    assert error(dequantize(out), dequantize(want)) < 0.02


@needs_mosaic
def test_interpreted_stripe_attention():
    case = stripe_cases.Case(batch=1, side=16, num_heads=1, density=0.5)
    arrays, options = stripe_arguments(case)
    options["out_scale"] = jnp.float32(2.0**-10)
    out = stripe_attention.attend_by_groups(*arrays, interpret=interpret(), **options)
    check_attention(stripe_attention.stripe_attention, out, arrays, options)


@needs_mosaic
def test_interpreted_window_attention():
    case = window_cases.Case(batch=1, side=7, num_heads=1, window_size=7)
    arrays, options = window_arguments(case)
    options["out_scale"] = jnp.float32(2.0**-10)
    values = run(window_attention, *arrays, interpret=interpret(), **options)
    out = Float8Rows(values, options["out_scale"])
    check_attention(window_attention.window_attention, out, arrays, options)


def lowers(function, *arrays) -> bool:
    """Whether a function of arrays or their shapes lowers for a GPU, to one of the kernels."""
    traced = jax.jit(function).trace(*arrays)
    return "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
@pytest.mark.parametrize("preset", ["vit_t", "vit_h"])
def test_layers_lower(preset):
    d = PRESETS[preset].image_encoder.embed_dim
    x = jax.ShapeDtypeStruct((2, 1024, d), jnp.bfloat16)
    vector, index = jnp.zeros(d), jax.ShapeDtypeStruct((2, 400), jnp.int32)
    rows = jax.eval_shape(quantize_rows, x)
    static = rows._replace(scale=SCALE)
    qkv, kernel = (
        jax.eval_shape(quantize_weight, jax.ShapeDtypeStruct((d, n), jnp.float32))
        for n in (3 * d, d)
    )
    _, _, weights = jax.eval_shape(functools.partial(float8_block, d=d, h=4 * d))
    assert lowers(lambda *a: run(layer_norm, *a, dtype=DTYPE), x, vector, vector)
    project = functools.partial(run, projection)
    assert lowers(functools.partial(project, dtype="bfloat16"), rows, qkv, jnp.zeros(3 * d))
    assert lowers(lambda *a: project(*a[:3], residual=a[3]), static, kernel, vector, x)
    assert lowers(functools.partial(run, routed_mlp), x, index, weights)
    # The first product in 16 bits, whose GELU gives 8.
    kernel1 = jax.eval_shape(functools.partial(dequantize, dtype="bfloat16"), weights.kernel1)
    mixed = weights._replace(kernel1=kernel1)
    assert lowers(functools.partial(run, routed_mlp), x, None, mixed)


@needs_mosaic
@pytest.mark.parametrize(("head_dim", "order"), [(64, "groups"), (80, "tiles")])
def test_stripe_attention_lowers(head_dim, order):
    sizes = dict(batch=2, num_heads=2, head_dim=head_dim, density=0.3)
    arrays, options = stripe_arguments(stripe_cases.Case(order=order, **sizes))
    attend = functools.partial(stripe_attention.attend_by_groups, *arrays, **options)
    assert lowers(lambda scale: attend(out_scale=scale), SCALE)


@needs_mosaic
@pytest.mark.parametrize(("head_dim", "has_bias"), [(64, False), (80, True)])
def test_window_attention_lowers(head_dim, has_bias):
    case = window_cases.Case(batch=2, num_heads=2, head_dim=head_dim, density=0.3)
    arrays, options = window_arguments(case, has_bias=has_bias)
    attend = functools.partial(run, window_attention, *arrays, **options)
    assert lowers(lambda scale: attend(out_scale=scale), SCALE)
