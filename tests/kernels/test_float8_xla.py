"""8-bit floats: quantisation, and what runs on them as plain XLA."""

from __future__ import annotations

import os

# The interpreter runs every warpgroup on a thread of XLA's pool, whose size is read at start-up.
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stripe_cases
import window_cases
from float8_cases import check_quantized, error, exact_update, float8_block, update

from pallas_kernels import float8
from pallas_kernels.float8 import (
    DTYPE,
    Float8Rows,
    Float8Weight,
    dequantize,
    quantize_rows,
    quantize_static,
    quantize_weight,
)
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.projection import projection
from pallas_kernels.routed_mlp import mlp, routed_mlp
from pallas_kernels.stripe_attention import stripe_attention
from pallas_kernels.window_attention import window_attention

XLA = {"implementation": "xla"}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_rows_have_a_scale_each():
    x = normal(2, 7, 40) * jnp.asarray([1e-6, 1.0, 1e6, 1.0, 1.0, 1.0, 1.0])[:, None]
    x = x.at[:, 3].set(0).at[0, 4, 5].set(1e4)  # zeros, and an outlier
    rows = quantize_rows(x.astype(jnp.bfloat16))
    check_quantized(rows, x.astype(jnp.bfloat16))
    assert rows.scale.shape == (2, 7)
    largest = np.abs(np.asarray(rows.values, np.float32)).max(axis=-1)
    np.testing.assert_array_equal(largest, np.where(np.arange(7) == 3, 0, 448) * np.ones((2, 1)))
    # The other rows keep their precision beside the outlier's.
    assert error(dequantize(rows)[1], x.astype(jnp.bfloat16)[1]) < 0.03


def test_what_is_beyond_saturates_and_nan_stays():
    x = jnp.asarray([[449.0, -1e30, jnp.inf], [jnp.nan, 1.0, -2.0]])
    rows = quantize_static(x, jnp.float32(0.5))
    want = [[448, -448, 448], [np.nan, 2, -4]]
    np.testing.assert_array_equal(np.asarray(rows.values, np.float32), want)
    nan_row = np.asarray(dequantize(quantize_rows(x)), np.float32)[1]
    assert np.isnan(nan_row[0])


def test_weight():
    kernel = normal(24, 40) * jnp.where(jnp.arange(40) == 3, 100.0, 1.0)
    weight = quantize_weight(kernel)
    assert weight.values.shape == (40, 24) and weight.scale.shape == (40,)
    check_quantized(Float8Rows(*weight), kernel.T)
    np.testing.assert_array_equal(dequantize(weight), dequantize(Float8Rows(*weight)).T)
    assert dequantize(weight, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("capability", [None, "8.0", "8.9", "9.0"])
def test_product_is_exact(monkeypatch, capability):
    """On any device; a GPU before Ada multiplies the same values in bfloat16."""

    class Device:
        compute_capability = capability

    monkeypatch.setattr(float8.jax, "devices", lambda: [Device()])
    rows, weight = quantize_rows(normal(3, 5, 96)), quantize_weight(normal(96, 32, seed=1))
    for x in (rows, quantize_static(normal(3, 5, 96), 2.0**-6)):
        text = jax.jit(lambda *a: float8.product(*a)).lower(x, weight).as_text()
        assert ("dot_general" in text) and ("bf16" in text) == (capability == "8.0")
        want = np.asarray(dequantize(x), np.float64) @ np.asarray(dequantize(weight), np.float64)
        np.testing.assert_allclose(float8.product(x, weight), want, rtol=1e-5, atol=1e-5)


def test_layer_norm():
    x, scale, bias = 3 * normal(2, 3, 64) + 5, 1 + normal(64, seed=1), normal(64, seed=2)
    out = layer_norm(x, scale, bias, dtype=DTYPE, **XLA)
    assert isinstance(out, Float8Rows) and out.scale.shape == (2, 3)
    check_quantized(out, layer_norm(x, scale, bias, **XLA))


@pytest.mark.parametrize("stream", [None, "float16"])
@pytest.mark.parametrize("static", [False, True])
def test_projection(static, stream):
    x, bias = normal(2, 3, 5, 64), normal(40, seed=2)
    rows = quantize_static(x, jnp.float32(2.0**-6)) if static else quantize_rows(x)
    weight = quantize_weight(normal(64, 40, seed=1) / 8)
    residual = None if stream is None else normal(2, 3, 5, 40, seed=3).astype(stream)
    dtype = stream or "bfloat16"
    out = projection(rows, weight, bias, residual=residual, dtype=dtype, **XLA)
    assert out.dtype == dtype
    want = dequantize(rows) @ dequantize(weight) + bias
    assert error(out, want if residual is None else want + residual) < 3e-3


@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_mlp(stream):
    x, index, weights = float8_block(d=128, h=256, stream=stream)
    out = mlp(x, weights, **XLA)
    assert out.dtype == stream
    # Three roundings to e4m3, each of relative variance 2^-8 / 12 or less.
    assert error(update(out, x), exact_update(x, weights)) < 0.05
    sparse = routed_mlp(x, index, weights, **XLA)
    routed = np.zeros(x.shape[:2], bool)
    np.put_along_axis(routed, np.asarray(index), True, axis=1)
    want = np.where(routed[..., None], np.asarray(out, np.float32), np.asarray(x, np.float32))
    assert error(sparse, jnp.asarray(want)) < 1e-3


@pytest.mark.parametrize("which", ["kernel1", "kernel2"])
def test_mlp_of_which_one_product_has_8_bits(which):
    x, _, weights = float8_block(d=128, h=256)
    mixed = weights._replace(**{which: dequantize(getattr(weights, which), jnp.bfloat16)})
    if which == "kernel2":
        mixed = mixed._replace(hidden_scale=None)
    out = mlp(x, mixed, **XLA)
    assert error(update(out, x), exact_update(x, weights)) < 0.05


@pytest.mark.parametrize("order", ["tiles", "groups"])
def test_stripe_attention(order):
    case = stripe_cases.Case(batch=1, side=16, num_heads=2, density=0.5, order=order)
    arguments = stripe_cases.inputs(case, 0)
    qkv, *rest, block_order = arguments
    options = dict(layout=case.layout, block_order=block_order, **XLA)
    tables = [x.astype(jnp.float32) for x in rest[:2]]
    exact = stripe_attention(qkv.astype(jnp.float32), *tables, rest[2], **options)
    scale = jnp.float32(2.0**-9)  # some saturate
    out = stripe_attention(qkv, *rest, out_scale=scale, **options)
    assert isinstance(out, Float8Rows) and out.values.shape == exact.shape
    assert float(np.abs(np.asarray(exact)).max()) > 448 * scale
    want = jnp.clip(exact, -448 * scale, 448 * scale)
    assert error(dequantize(out), want) < 0.03  # e4m3 alone: 0.026


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_window_attention(density):
    case = window_cases.Case(batch=1, side=16, num_heads=2, window_size=7, density=density)
    qkv, *tables, order = window_cases.inputs(case, 0)
    options = dict(window_size=7, layout=case.layout, order=order, **XLA)
    exact = window_attention(*(x.astype(jnp.float32) for x in (qkv, *tables)), **options)
    out = window_attention(qkv, *tables, out_scale=jnp.float32(2.0**-7), **options)
    assert isinstance(out, Float8Rows)
    assert error(dequantize(out), exact) < 0.03


def test_errors():
    rows, weight, bias = quantize_rows(normal(4, 64)), quantize_weight(normal(64, 64)), normal(64)
    with pytest.raises(ValueError, match="x and kernel must both have 8 bits or neither, got"):
        projection(rows, normal(64, 64), bias)
    with pytest.raises(ValueError, match="dtype must be given where x has 8 bits and no residual"):
        projection(rows, weight, bias)
    with pytest.raises(ValueError, match="dtype must be float32 as x or the residual, got bfloat1"):
        projection(rows, weight, bias, residual=normal(4, 64), dtype="bfloat16")
    with pytest.raises(ValueError, match=r"kernel must have shape \(64, 32\), got \(64, 64\)"):
        projection(rows, weight, bias[:32], dtype="bfloat16")
    wrong = rows._replace(scale=rows.scale[:2])
    with pytest.raises(ValueError, match=r"x must have .* scale of shape \(4,\) or \(\), got"):
        projection(wrong, weight, bias, dtype="bfloat16")
    wrong = Float8Weight(weight.values.astype(jnp.float8_e5m2), weight.scale)
    with pytest.raises(ValueError, match="kernel must have float8_e4m3fn values and a float32"):
        projection(rows, wrong, bias, dtype="bfloat16")
    x, _, weights = float8_block()
    with pytest.raises(ValueError, match="hidden_scale must be there for a kernel2 in 8 bits"):
        mlp(x, weights._replace(hidden_scale=None))
    with pytest.raises(ValueError, match="hidden_scale must be there for a kernel2 in 8 bits"):
        mlp(x, weights._replace(kernel2=dequantize(weights.kernel2)))
    with pytest.raises(ValueError, match=r"hidden_scale must have shape \(\) for x"):
        mlp(x, weights._replace(hidden_scale=normal(3)))
