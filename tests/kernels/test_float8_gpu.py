"""The kernels on 8-bit operands, on a GPU: errors, saturation, NaN and repeats."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stripe_cases
import window_cases
from float8_cases import (
    TOLERANCE,
    check_mlp,
    check_quantized,
    error,
    error_before_rounding,
    float8_block,
    run,
)

from pallas_kernels import float8, matmul_kernel
from pallas_kernels.float8 import (
    DTYPE,
    Float8Rows,
    dequantize,
    quantize_rows,
    quantize_static,
    quantize_weight,
)
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.projection import projection
from pallas_kernels.routed_mlp import mlp, routed_mlp
from pallas_kernels.stripe_attention import stripe_attention
from pallas_kernels.tuning import fitting_matmul
from pallas_kernels.window_attention import window_attention

pytestmark = pytest.mark.gpu
KERNEL = {"implementation": "mosaic_gpu"}
SCALE = jnp.float32(2.0**-6)  # of GELU's output
ROWS = 2048


def repeated(function: Callable[..., Any], *arrays: Any) -> Any:
    """What a function gives, of the same bits in 20 repeats."""
    function = jax.jit(function)
    first = function(*arrays)
    for _ in range(20):
        pairs = zip(*(jax.tree.leaves(x) for x in (function(*arrays), first)), strict=True)
        for got, want in pairs:
            bits = f"uint{8 * want.dtype.itemsize}"
            assert bool((got.view(bits) == want.view(bits)).all())
    return first


def operands(d: int, n: int, *, static: bool) -> tuple[Float8Rows, Any, jax.Array, jax.Array]:
    """Rows, of one scale as behind a GELU or of one each; a weight, a bias and the exact layer."""
    keys = jax.random.split(jax.random.key(d + n), 3)
    x, kernel, bias = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((ROWS, d), (d, n), (n,)), strict=True)
    )
    x = x.at[3].set(0).at[5, 7].set(1e3)
    rows = quantize_static(jax.nn.gelu(x), SCALE) if static else quantize_rows(x)
    weight = quantize_weight(kernel * d**-0.5)
    product = jnp.matmul(dequantize(rows), dequantize(weight), precision="highest")
    return rows, weight, bias, product + bias


@pytest.mark.parametrize("d", [192, 768, 1024, 1280, 4096, 5120])
def test_rows_with_a_scale_each(d):
    rows, weight, bias, want = operands(d, 576 if d == 192 else 1024, static=False)
    out = repeated(lambda *a: projection(*a, dtype="bfloat16", **KERNEL), rows, weight, bias)
    assert error(out, want) <= TOLERANCE
    without_bias = float8.product(rows, weight)  # XLA's
    assert error(without_bias, want - bias) <= TOLERANCE


@pytest.mark.parametrize(("d", "n"), [(1024, 1024), (4096, 1024), (5120, 1280)])
def test_residual_and_scatter(d, n):
    rows, weight, bias, want = operands(d, n, static=True)
    # Small beside the update and finer than bfloat16, the stream hides none of its error.
    stream = (0.1 * jax.random.normal(jax.random.key(1), (2 * ROWS, n))).astype("float16")
    out = repeated(
        lambda *a: projection(*a[:3], residual=a[3], **KERNEL), rows, weight, bias, stream[:ROWS]
    )
    assert error(out, want + stream[:ROWS]) <= TOLERANCE

    num_rows = ROWS - 100
    index = jax.random.permutation(jax.random.key(2), 2 * ROWS)[:ROWS].astype(jnp.int32)
    config = fitting_matmul("add", ROWS, n, d, DTYPE)
    options = dict(epilogue="add", config=config, num_rows=num_rows)
    arrays = rows, weight, bias, index, stream
    out = repeated(lambda *a: run(matmul_kernel, *a, **options), *arrays)
    index = index[:num_rows]
    assert error(out[index], want[:num_rows] + stream[index]) <= TOLERANCE
    others = np.setdiff1d(np.arange(2 * ROWS), index)
    np.testing.assert_array_equal(out[others], stream[others])


@pytest.mark.parametrize("dtype", ["bfloat16", DTYPE.name])
@pytest.mark.parametrize("d", [1024, 192])
def test_gelu(d, dtype):
    rows, weight, bias, want = operands(d, 1024, static=False)
    bias = bias.at[0].set(100.0).at[1].set(jnp.nan)
    want = jax.nn.gelu(want, approximate=False)[:, 2:]
    config = fitting_matmul("gelu", ROWS, 1024, d, DTYPE)
    options = dict(epilogue="gelu", config=config, dtype=dtype)

    def hidden(rows, weight, bias, scale):
        own = {"out_scale": scale} if dtype == DTYPE else {}
        return run(matmul_kernel, rows, weight, bias, **options, **own)

    out = repeated(hidden, rows, weight, bias, SCALE)
    assert bool(jnp.isnan(out[:, 1]).all())
    if dtype != DTYPE:
        assert error(out[:, 2:], want) <= TOLERANCE
        return
    assert bool((out[:, 0].astype(jnp.float32) == 448).all())
    assert error_before_rounding(Float8Rows(out[:, 2:], SCALE), want) <= TOLERANCE


@pytest.mark.parametrize("num_rows", [4096, 21])
@pytest.mark.parametrize("d", [192, 1024, 1280])
def test_layer_norm(d, num_rows):
    x = 3 * jax.random.normal(jax.random.key(d), (num_rows, d)) + 5
    x = x.at[3].set(0).at[5, 7].set(1e3).at[6, 0].set(jnp.nan).astype("bfloat16")
    scale, bias = jnp.ones(d).at[0].set(9.0), jnp.zeros(d)
    out = repeated(lambda *a: layer_norm(*a, dtype=DTYPE, **KERNEL), x, scale, bias)
    want = layer_norm(x, scale, bias, dtype="float32", implementation="xla")
    assert bool(jnp.isnan(want[6]).all() and jnp.isnan(dequantize(out)[6]).all())
    keep = np.arange(num_rows) != 6
    check_quantized(Float8Rows(out.values[keep], out.scale[keep]), want[keep])
    assert not np.asarray(out.values[3], np.float32).any()


@pytest.mark.parametrize("d", [192, 1024])
def test_mlp(d):
    x, index, weights = float8_block(num_tokens=1000, routed=300, d=d, h=4 * d)
    check_mlp(repeated(lambda *a: mlp(*a, **KERNEL), x, weights), x, None, weights)
    routed = repeated(lambda *a: routed_mlp(*a, **KERNEL), x, index, weights)
    check_mlp(routed, x, index, weights)


def check_attention(function, qkv: jax.Array, tables: tuple, **options: Any) -> None:
    """Beside float32: the error before the rounding, what saturates, and a NaN among values."""
    qkv = qkv.at[1, 5, 5, 2, 0, 0].set(jnp.nan)
    exact = (x.astype(jnp.float32) for x in (qkv, *tables))
    exact = jax.jit(functools.partial(function, implementation="xla", **options))(*exact)
    nan = jnp.isnan(exact)
    assert 0 < int(nan.sum()) < nan.size / 8
    exact = jnp.where(nan, 0, exact)
    scale = 2.0 ** jnp.floor(jnp.log2(jnp.abs(exact).max() / 448))

    def attend(qkv, scale, *tables):
        return function(qkv, *tables, out_scale=scale, **KERNEL, **options)

    out = repeated(attend, qkv, scale, *tables)
    np.testing.assert_array_equal(jnp.isnan(out.values), nan)
    values = jnp.where(nan, jnp.zeros((), DTYPE), out.values)
    assert bool((jnp.abs(values.astype(jnp.float32)) == 448).any())
    # As the kernels in 16 bits: the weights of the softmax are rounded to q's dtype.
    assert error_before_rounding(Float8Rows(values, scale), exact) <= 5e-3


@pytest.mark.parametrize(
    ("density", "order", "head_dim"),
    [(1.0, "tiles", 64), (0.3, "tiles", 64), (0.3, "groups", 64), (0.3, "tiles", 80)],
)
def test_stripe_attention(density, order, head_dim):
    sizes = dict(batch=2, num_heads=4, head_dim=head_dim)
    case = stripe_cases.Case(density=density, order=order, **sizes)
    qkv, *tables, sequence, block_order = stripe_cases.inputs(case, 0)

    def attend(qkv, *tables, **own):
        return stripe_attention(
            qkv, *tables, sequence, layout=case.layout, block_order=block_order, **own
        )

    check_attention(attend, qkv, tuple(tables))


@pytest.mark.parametrize(("density", "head_dim"), [(1.0, 64), (0.3, 64), (1.0, 80)])
def test_window_attention(density, head_dim):
    case = window_cases.Case(batch=2, num_heads=4, head_dim=head_dim, density=density)
    qkv, *tables, order = window_cases.inputs(case, 0)
    options = dict(window_size=14, layout=case.layout, order=order)
    check_attention(window_attention, qkv, tuple(tables), **options)
