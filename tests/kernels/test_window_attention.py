"""The window attention kernel: interpreted and cross-lowered on a CPU, run on a GPU."""

from __future__ import annotations

import os

# The interpreter runs every warpgroup on a thread of XLA's pool, whose size is read at start-up:
# on a machine of few cores they would wait for one another for ever.
os.environ.setdefault("NPROC", "16")

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from window_cases import (
    Arguments,
    Case,
    inputs,
    relative_error,
    static_order,
)

from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.window_attention import (
    HEAD_DIMS,
    WINDOW_SIZES,
    launch,
    prepare,
    window_attention,
)
from pallas_kernels.window_kernel import Config
from sparsesam_jax.config import PRESETS

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; the error is tested below"
)
# The bias, the weights and the result are rounded once to the input's dtype, by up to 2^-9 and
# 2^-12: averaged over an output's keys.
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}


def run(function, case: Case, arguments: Arguments, **options) -> jax.Array:
    """The function jitted, as op by op it takes long; numpy arrays stay known when it is traced."""
    static = {k: x for k, x in arguments._asdict().items() if not isinstance(x, jax.Array)}

    @jax.jit
    def attend(arrays: dict[str, jax.Array]) -> jax.Array:
        *positional, order = Arguments(**static, **arrays)
        shape = dict(window_size=case.window_size, layout=case.layout)
        return function(*positional, order=order, **shape, **options)

    return attend({k: x for k, x in arguments._asdict().items() if k not in static})


def kernel(*arrays, **options) -> jax.Array:
    """The kernel on these arguments."""
    statics, operands = prepare(*arrays, **options)
    return launch(statics, *operands)


def with_map(case: Case, height: int, width: int, seed: int) -> Arguments:
    """Arguments for the top left of the case's map, with the case's orders of its windows."""
    qkv, rel_pos_h, rel_pos_w, order = inputs(case, seed)
    if case.order != "static":
        w = case.window_size
        order = order[:, : -(-height // w) * -(-width // w)]
    return Arguments(qkv[:, :height, :width], rel_pos_h[:height], rel_pos_w[:width], order)


CASE = Case(batch=1, side=16, num_heads=1)


def changed(**changes) -> Case:
    return dataclasses.replace(CASE, **changes)


TWO = Config(num_ctas=2)
PAIR = changed(num_heads=2, window_size=12)
THREE = changed(side=30, window_size=10)  # windows for one program
# The map of every case is cut to these rows and columns.
INTERPRETED = {
    "a row in the second window": (changed(num_heads=2), (15, 14), TWO),
    "float16": (changed(batch=2, side=20, window_size=8, dtype="float16"), (9, 17), TWO),
    "bias from its kernel": (changed(window_size=8, head_dim=80), (16, 8), TWO),
    "smallest window": (changed(window_size=7, head_dim=80, dtype="float16"), (8, 7), TWO),
    "odd number of query tiles": (changed(window_size=12), (12, 12), TWO),
    "items in sequence": (THREE, (10, 30), Config(num_ctas=1)),
    "without turns": (THREE, (10, 30), Config(num_ctas=1, take_turns=False)),
    "one stage of queries": (THREE, (10, 30), Config(num_ctas=1, q_stages=1)),
    "one stage": (THREE, (10, 30), Config(num_ctas=1, q_stages=1, kv_stages=1)),
    "static bar": (dataclasses.replace(PAIR, density=0.3), (13, 12), TWO),
    "bar by window": (changed(window_size=12, density=0.5, order="window"), (13, 12), TWO),
    "bar by head": (dataclasses.replace(PAIR, density=0.3, order="head"), (13, 12), TWO),
}


@needs_mosaic
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_equals_reference(name):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    case, size, config = INTERPRETED[name]
    assert case.density == 1 or not case.layout.is_dense
    arguments = with_map(case, *size, seed=0)
    interpret = plgpu.InterpretGPUParams()
    out = run(kernel, case, arguments, config=config, interpret=interpret)
    assert out.dtype == case.dtype
    assert relative_error(case, out, arguments) < TOLERANCE[case.dtype]


def test_tables_may_be_padded():
    case = changed(window_size=12)
    arguments = with_map(case, 15, 14, seed=0)
    padded = (jnp.pad(x, ((0, 0), (0, 4), (0, 0))) for x in arguments[1:3])
    padded = Arguments(arguments.qkv, *padded, arguments.order)
    out, want = (run(window_attention, case, x, implementation="xla") for x in (padded, arguments))
    np.testing.assert_array_equal(out, want)


def lowered(case: Case, *, has_bias: bool = True) -> str:
    """The program for CUDA."""
    arguments = jax.eval_shape(lambda: inputs(case, seed=0))
    if not has_bias:
        arguments = arguments._replace(rel_pos_h=None, rel_pos_w=None)
    is_static = case.order == "static"

    def attend(arguments: Arguments) -> jax.Array:
        if is_static:
            arguments = arguments._replace(order=static_order(case.window_size))
        return run(kernel, case, arguments)

    traced = jax.jit(attend).trace(arguments._replace(order=None) if is_static else arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
@pytest.mark.parametrize(("density", "order"), [(1.0, "static"), (0.3, "static"), (0.5, "head")])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("preset", PRESETS)
def test_lowers_for_every_preset(preset, batch, density, order):
    encoder = PRESETS[preset].image_encoder
    shape = dict(num_heads=encoder.num_heads, head_dim=encoder.head_dim)
    shape |= dict(side=encoder.grid_size, window_size=encoder.window_size)
    case = Case(batch=batch, density=density, order=order, **shape)
    assert "mosaic_gpu_v2" in lowered(case)


@needs_mosaic
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("window_size", WINDOW_SIZES)
def test_every_window_size_lowers(window_size, head_dim):
    case = Case(batch=1, side=20, num_heads=3, head_dim=head_dim, window_size=window_size)
    assert "mosaic_gpu_v2" in lowered(case)


def masked_attention(case: Case, arguments: Arguments) -> np.ndarray:
    """Attention of every token over a full mask of its window's tokens, in float64."""
    qkv, rel_pos_h, rel_pos_w = (np.asarray(x, np.float64) for x in arguments[:3])
    batch, height, width, _, heads, head_dim = qkv.shape
    w, out = case.window_size, np.zeros((batch, height, width, heads, head_dim))
    across = -(-width // w)
    padding = [(0, 0), (0, -height % w), (0, -width % w), (0, 0), (0, 0), (0, 0)]
    padded = np.pad(qkv, padding)
    shape = (batch, padded.shape[1] // w * across, heads, w * w)
    lead = arguments.order.shape[:-1]
    order = arguments.order.reshape(*lead, *(1,) * (3 - len(lead)), w * w)
    order = np.broadcast_to(order, shape)
    for image, row, col, head in np.ndindex(out.shape[:4]):
        top, left = row // w * w, col // w * w
        q = qkv[image, row, col, 0, head]
        keys = padded[image, top : top + w, left : left + w, 1:, head]
        bias = (rel_pos_h[row] @ q)[:, None] + rel_pos_w[col] @ q
        logits = (keys[:, :, 0] @ q / np.sqrt(head_dim) + bias).ravel()
        bar = order[image, top // w * across + left // w, head, : case.layout.bar_len]
        weights = np.exp(logits[bar] - logits[bar].max())
        values = keys[:, :, 1].reshape(w * w, head_dim)[bar]
        out[image, row, col, head] = weights / weights.sum() @ values
    return out


@pytest.mark.parametrize(
    ("density", "order"), [(1.0, "static"), (0.5, "static"), (0.5, "window"), (0.3, "head")]
)
def test_xla_equals_masked_attention(density, order):
    shape = dict(batch=2, side=30, num_heads=2, head_dim=16, window_size=12, dtype="float32")
    case = Case(**shape, density=density, order=order)
    arguments = with_map(case, 13, 25, seed=0)
    out = run(window_attention, case, arguments, implementation="xla")
    # float32 rounding of a few hundred sums of terms of size 1.
    np.testing.assert_allclose(out, masked_attention(case, arguments), atol=2e-5)


def without_bias(case: Case, arguments: Arguments) -> tuple[Arguments, Arguments]:
    """Arguments without a position bias, and the same with a bias of zero for the reference."""
    by_row, by_col = (jnp.zeros_like(x) for x in arguments[1:3])
    same = arguments._replace(rel_pos_h=by_row, rel_pos_w=by_col)
    return arguments._replace(rel_pos_h=None, rel_pos_w=None), same


@pytest.mark.parametrize(("density", "order"), [(1.0, "static"), (0.5, "window"), (0.3, "head")])
def test_xla_without_bias_equals_masked_attention(density, order):
    shape = dict(batch=1, side=30, num_heads=2, head_dim=16, window_size=12, dtype="float32")
    case = Case(**shape, density=density, order=order)
    arguments, same = without_bias(case, with_map(case, 13, 25, seed=0))
    out = run(window_attention, case, arguments, implementation="xla")
    # float32 rounding of a few hundred sums of terms of size 1.
    np.testing.assert_allclose(out, masked_attention(case, same), atol=2e-5)


@needs_mosaic
@pytest.mark.parametrize(
    ("density", "head_dim", "dtype"), [(1.0, 64, "bfloat16"), (0.3, 80, "float16")]
)
def test_interpreted_kernel_without_bias_equals_reference(density, head_dim, dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape = dict(head_dim=head_dim, window_size=12, dtype=dtype)
    case = dataclasses.replace(PAIR, density=density, **shape)
    arguments, same = without_bias(case, with_map(case, 13, 12, seed=0))
    options = dict(config=TWO, interpret=plgpu.InterpretGPUParams())
    out = run(kernel, case, arguments, **options)
    assert relative_error(case, out, same) < TOLERANCE[dtype]


@needs_mosaic
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_lowers_without_bias(head_dim, density):
    program = lowered(Case(batch=2, head_dim=head_dim, density=density), has_bias=False)
    assert program.count("@mosaic_gpu_v2") == 1  # no kernel of the bias


def test_tables_are_given_together():
    arguments = inputs(CASE, seed=0)._replace(rel_pos_h=None)
    with pytest.raises(ValueError, match="rel_pos_h must be given with rel_pos_w or both be None"):
        run(window_attention, CASE, arguments)


@pytest.mark.parametrize("side", [7, 8])  # of 8: the bias has a kernel too
def test_differentiation_names_the_xla_path(side):
    case = changed(side=side, window_size=side)
    arguments = inputs(case, seed=0)

    def loss(qkv, function):
        return run(function, case, arguments._replace(qkv=qkv)).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(loss)(arguments.qkv, kernel)
    xla = functools.partial(window_attention, implementation="xla")
    assert bool(jnp.isfinite(jax.grad(loss)(arguments.qkv, xla)).all())


def test_mosaic_gpu_raises_where_it_cannot_run():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine can run the kernel")
    expected = "compute capability" if JAX_SUPPORTS_MOSAIC_GPU else "jax >= 0.11"
    with pytest.raises(ValueError, match=expected):
        run(window_attention, CASE, inputs(CASE, seed=0), implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(window_size=17, side=17), "window_size must lie in 7 to 16, got 17"),
        (dict(head_dim=48), r"head_dim must be one of \(64, 80\), got 48"),
        (dict(dtype="float32"), "qkv must be bfloat16 or float16, got float32"),
    ],
    ids=str,
)
def test_mosaic_gpu_names_what_it_does_not_support(change, expected):
    case = changed(**change)
    arguments = inputs(case, seed=0)
    with pytest.raises(ValueError, match=expected):
        run(window_attention, case, arguments, implementation="mosaic_gpu")
    # What auto cannot give the kernel, XLA runs.
    assert run(window_attention, case, arguments).dtype == case.dtype


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(qkv=(1, 16, 16, 1, 64)), r"qkv must have shape \[B, Gh, Gw, 3, H, D\], got"),
        (
            dict(rel_pos_h=(14, 14, 64)),
            r"rel_pos_h must have shape \(16, 14, 64\) and dtype bfloat16",
        ),
        (dict(rel_pos_w=(16, 15, 64)), r"rel_pos_w must have .* and dtype bfloat16, got \(16, 15"),
        (dict(order=None), r"order must have one of the shapes .* with a bar, got None"),
        (dict(order=(1, 1, 196)), r"order must have one of the shapes .*, got \(1, 1, 196\)"),
    ],
    ids=str,
)
def test_arguments_are_checked(change, expected):
    shapes = dict(qkv=(1, 16, 16, 3, 1, 64), rel_pos_h=(16, 14, 64), rel_pos_w=(16, 14, 64))
    shapes |= dict(order=(196,)) | change
    arrays = {
        name: shape and jnp.zeros(shape, jnp.int32 if name == "order" else jnp.bfloat16)
        for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=expected):
        window_attention(**arrays, window_size=14, layout=BlockLayout.bar(196, 0.3))


def test_tables_have_the_dtype_of_qkv_and_the_layout_is_a_bar():
    arguments = inputs(changed(density=0.5), seed=0)
    arrays, order = arguments[:3], arguments.order
    with pytest.raises(ValueError, match=r"rel_pos_w must have .* bfloat16, got .* float32"):
        window_attention(*arrays[:2], arrays[2].astype(jnp.float32), window_size=14)
    for layout in (BlockLayout.bar(100, 0.3), BlockLayout.a_shape(196, 0.3)):
        with pytest.raises(ValueError, match=r"layout must be BlockLayout.bar\(196, density\)"):
            window_attention(*arrays, window_size=14, layout=layout, order=order)


def error_on_gpu(case: Case, seed: int, arguments: Arguments | None = None) -> float:
    arguments = arguments or inputs(case, seed)
    out = run(window_attention, case, arguments, implementation="mosaic_gpu")
    error = relative_error(case, out, arguments)
    print(f"{case} bias {case.bias}: error {error:.2e} ({seed=})")
    return error


ON_GPU = [
    Case(),
    Case(head_dim=80),
    Case(batch=1),
    Case(batch=1, side=128),
    Case(batch=1, side=24, num_heads=3, head_dim=80),
    Case(density=0.3, head_dim=80),
    Case(density=0.3, order="window", dtype="float16"),
    Case(density=0.3, order="head"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_error_on_gpu(case):
    error = error_on_gpu(case, seed=int.from_bytes(os.urandom(3)))
    assert error < TOLERANCE[case.dtype]  # a NaN is none


@pytest.mark.gpu
@pytest.mark.parametrize("window_size", WINDOW_SIZES)
def test_window_sizes_on_gpu(window_size):
    seed = int.from_bytes(os.urandom(3))
    head_dim = HEAD_DIMS[window_size % len(HEAD_DIMS)]
    shape = dict(batch=2, side=37, num_heads=3, head_dim=head_dim, window_size=window_size)
    case = Case(**shape, dtype="float16")
    error = error_on_gpu(case, seed, with_map(case, 37, 33, seed))
    assert error < TOLERANCE["float16"]


@pytest.mark.gpu
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_without_bias_on_gpu(head_dim, density):
    case = Case(batch=2, head_dim=head_dim, density=density)
    arguments, same = without_bias(case, inputs(case, seed=int.from_bytes(os.urandom(3))))
    out = run(window_attention, case, arguments, implementation="mosaic_gpu")
    assert relative_error(case, out, same) < TOLERANCE[case.dtype]


@pytest.mark.gpu
def test_large_biases_on_gpu():
    case = Case(batch=1, head_dim=80, bias=12.0)
    seed = int.from_bytes(os.urandom(3))
    arguments = inputs(case, seed)
    rel = reference.relative_position(arguments.qkv[:, :, :, 0], *arguments[1:3])
    assert min(float(abs(x).max()) for x in rel) > 50
    # A bias of 12, the standard deviation, is stored as 12 sqrt(D) in bfloat16, which moves it by
    # up to 1/32: that alone is an error of 0.9e-2.
    assert error_on_gpu(case, seed, arguments) < 2.5e-2


@pytest.mark.gpu
def test_repeats_are_bit_identical_on_gpu():
    case = Case()
    *arrays, _ = inputs(case, seed=int.from_bytes(os.urandom(3)))

    @jax.jit
    def attend(*arrays: jax.Array) -> jax.Array:
        arguments = Arguments(*arrays, order=None)
        return run(window_attention, case, arguments, implementation="mosaic_gpu")

    first = attend(*arrays)
    assert bool(jnp.isfinite(first).all())
    for _ in range(20):
        assert bool((attend(*arrays) == first).all())
