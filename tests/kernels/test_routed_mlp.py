"""The MLP block's kernels: interpreted and cross-lowered on a CPU, measured on a GPU."""

from __future__ import annotations

import functools
import os

# The interpreter runs every warpgroup on a thread of XLA's pool, whose size is read at start-up:
# on a machine of few cores they would wait for one another for ever.
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import mlp_reference
from pallas_kernels.gelu import gelu
from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.matmul_kernel import Config
from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.routed_mlp import launch, mlp, prepare, routed_mlp
from sparsesam_jax.config import PRESETS

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; the error is tested below"
)
WIDTHS = [192, *sorted({preset.image_encoder.embed_dim for preset in PRESETS.values()})]
# Normalised rows, hidden layer, update and sum are each rounded once to the input's dtype.
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}


def block(
    *,
    batch: int = 2,
    num_tokens: int = 40,
    routed: int = 13,
    d: int = 64,
    h: int = 128,
    dtype: str = "bfloat16",
    vectors: str = "float32",
    stream: str | None = None,
    seed: int = 0,
) -> tuple[jax.Array, jax.Array, MLPWeights]:
    """Random x, in the dtype of the products or another, token_index and weights."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0, offset=0.0, dtype=vectors):
        return jnp.asarray(rng.standard_normal(shape) * scale + offset, dtype)

    index = [rng.permutation(num_tokens)[:routed] for _ in range(batch)]
    weights = MLPWeights(
        norm_scale=normal(d, scale=0.2, offset=1.0),
        norm_bias=normal(d, scale=0.2),
        kernel1=normal(d, h, scale=d**-0.5, dtype=dtype),
        bias1=normal(h, scale=0.5),
        kernel2=normal(h, d, scale=h**-0.5, dtype=dtype),
        bias2=normal(d, scale=0.5),
    )
    x = normal(batch, num_tokens, d, scale=2.0, offset=0.5, dtype=stream or dtype)
    return x, jnp.asarray(np.stack(index), jnp.int32), weights


def check(out: jax.Array, x: jax.Array, index: jax.Array | None, weights: MLPWeights) -> None:
    """Close to float32 where routed, and elsewhere the bits of x."""
    assert out.dtype == x.dtype and out.shape == x.shape
    if index is None:
        index = jnp.tile(jnp.arange(x.shape[1], dtype=jnp.int32), (len(x), 1))
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weights))
    want = mlp_reference.routed_mlp(exact[0], index, exact[1])
    routed = np.zeros(x.shape[:2], bool)
    np.put_along_axis(routed, np.asarray(index), True, axis=1)
    got = np.asarray(out.astype(jnp.float32))[routed]
    want = np.asarray(want)[routed]
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < TOLERANCE[str(weights.kernel1.dtype)]
    got, want = (np.asarray(a).view(np.int16)[~routed] for a in (out, x))
    np.testing.assert_array_equal(got, want)


def test_kernel_gelu_is_exact():
    from scipy.special import log_ndtr  # pyright: ignore[reportMissingImports]

    x = np.concatenate([np.linspace(-40, 40, 200_001), [0.0, -1e4, 1e4]]).astype(np.float32)
    want = x.astype(np.float64) * np.exp(log_ndtr(x.astype(np.float64)))
    error = np.abs(np.asarray(gelu(jnp.asarray(x)), np.float64) - want)
    assert (error <= 3e-7 + 1.2e-7 * np.abs(x)).all()
    assert np.isnan(gelu(jnp.asarray([np.nan], jnp.float32))).all()


def run_routed(x, token_index, weights, **options) -> jax.Array:
    """The kernels on routed tokens."""
    statics, operands = prepare(x, token_index, weights, **options)
    return launch(statics, *operands)


def run_dense(x, weights, **options) -> jax.Array:
    """The kernels on all tokens."""
    return run_routed(x, None, weights, **options)


SHARED = Config(take_turns=False, tile_m=128, tile_n=64, num_stages=2, num_slots=1, num_programs=2)
TURNS = Config(tile_m=64, tile_n=64, num_stages=3, num_slots=1, num_programs=2)
CLUSTER = Config(cluster=2, tile_m=64, tile_n=64, num_stages=3, num_programs=4)
INTERPRETED = {
    "one token": (dict(routed=1, dtype="float16", vectors="float16"), None),
    "ragged, shared tiles": (dict(batch=3, routed=22, d=192, h=192), (SHARED, SHARED)),
    "ragged, in turns": (dict(batch=3, routed=22, d=64, h=256), (TURNS, TURNS)),
    "cluster": (dict(d=128, h=256, dtype="float16"), (CLUSTER, CLUSTER)),
    "another dtype of the stream": (dict(routed=22, stream="float16"), None),
}


def interpreted(function):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return jax.jit(functools.partial(function, interpret=plgpu.InterpretGPUParams()))


@needs_mosaic
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_routed_kernels(name):
    shape, configs = INTERPRETED[name]
    x, index, weights = block(**shape)
    out = interpreted(functools.partial(run_routed, configs=configs))(x, index, weights)
    check(out, x, index, weights)


@needs_mosaic
@pytest.mark.parametrize("stream", ["bfloat16", "float16"])
def test_interpreted_dense_kernels(stream):
    x, _, weights = block(num_tokens=128, stream=stream)
    check(interpreted(run_dense)(x, weights), x, None, weights)


@pytest.mark.parametrize("stream", ["bfloat16", "float16"])
def test_xla_keeps_the_streams_dtype(stream):
    x, index, weights = block(stream=stream)
    check(routed_mlp(x, index, weights, implementation="xla"), x, index, weights)
    check(mlp(x, weights, implementation="xla"), x, None, weights)


@needs_mosaic
@pytest.mark.parametrize(("batch", "density"), [(8, 1.0), (8, 0.3), (1, 0.4)])
@pytest.mark.parametrize("width", WIDTHS)
def test_lowers_in_place_for_every_preset(width, density, batch):
    text = lowered(width, density, batch)
    assert text.count("@mosaic_gpu_v2") == 3
    assert "output_operand_alias" in text


def lowered(d: int, density: float, batch: int, num_tokens: int = 4096) -> str:
    def struct(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    h = 4 * d
    weights = MLPWeights(struct(d), struct(d), struct(d, h), struct(h), struct(h, d), struct(d))
    x = struct(batch, num_tokens, d, dtype="float16")
    if density == 1.0:
        traced = jax.jit(run_dense).trace(x, weights)
    else:
        index = struct(batch, round(density * num_tokens), dtype="int32")
        traced = jax.jit(run_routed).trace(x, index, weights)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_mosaic_gpu_raises_where_it_cannot_run():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine can run the kernels")
    x, index, weights = block()
    expected = "compute capability" if JAX_SUPPORTS_MOSAIC_GPU else "jax >= 0.11"
    with pytest.raises(ValueError, match=rf"routed_mlp: .*{expected}"):
        routed_mlp(x, index, weights, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=rf"for mlp: .*{expected}"):
        mlp(x, weights, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (dict(stream="float32"), "x must be bfloat16 or float16, got float32"),
        (dict(dtype="float32"), "kernel1 and kernel2 must be both bfloat16 or both float16"),
        (dict(vectors="int32"), "norm_scale must be float32, bfloat16 or float16, got int32"),
        (dict(d=72), "d must be a multiple of 64 up to 7168, got 72"),
        (dict(h=96), "h must be a multiple of 64 up to 8192, got 96"),
    ],
)
def test_mosaic_gpu_names_what_it_does_not_support(shape, expected):
    x, index, weights = block(**shape)
    with pytest.raises(ValueError, match=expected):
        routed_mlp(x, index, weights, implementation="mosaic_gpu")


def test_shapes_that_disagree():
    x, index, weights = block()
    with pytest.raises(ValueError, match=r"x must have shape \[B, N, d\], got \(40, 64\)"):
        mlp(x[0], weights)
    with pytest.raises(ValueError, match=r"kernel2 must have shape \(128, 64\) .* got \(64, 128\)"):
        mlp(x, weights._replace(kernel2=weights.kernel1))
    with pytest.raises(ValueError, match=r"kernel1 must have shape \[d, h\], got \(64,\)"):
        mlp(x, weights._replace(kernel1=weights.bias2))
    for wrong in (index[0], index[:1], index[:, :0]):
        with pytest.raises(ValueError, match=r"token_index must have shape \[2, M\]"):
            routed_mlp(x, wrong, weights)
    for wrong in (index.astype(jnp.int16), jnp.tile(index, (1, 4))):
        with pytest.raises(ValueError, match="token_index must be int32, at most 40 an image"):
            routed_mlp(x, wrong, weights)


def test_auto_takes_xla():
    x, index, weights = block()
    for function, reference, arguments in (
        (routed_mlp, mlp_reference.routed_mlp, (x, index, weights)),
        (mlp, mlp_reference.mlp, (x, weights)),
    ):
        got, want = (jax.jit(f)(*arguments) for f in (function, reference))
        np.testing.assert_array_equal(got, want)


def test_gradient_of_the_xla_path():
    x, index, weights = block(num_tokens=5, routed=2, d=8, h=12, dtype="float32")

    def loss(x, weights):
        x, weights = jax.tree.map(jnp.asarray, (x, weights))
        return (routed_mlp(x, index, weights) ** 2).sum()

    check_grads(jax.jit(loss), (x, weights), order=1, modes=["rev"], atol=0.1, rtol=0.05)


@needs_mosaic
def test_differentiation_names_the_xla_path():
    x, index, weights = block()
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(lambda x: run_routed(x, index, weights).sum())(x)
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(lambda w: run_dense(x, w).sum())(weights)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [1.0, 0.4, 0.3])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("dtype", "stream"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float16")],
)
def test_error_and_repeats_on_gpu(dtype, stream, width, batch, density):
    seed = int.from_bytes(os.urandom(3))
    routed = round(density * 4096)
    shape = dict(batch=batch, num_tokens=4096, routed=routed, d=width, h=4 * width)
    x, index, weights = block(**shape, dtype=dtype, stream=stream, seed=seed)
    if density == 1.0:
        run, index = functools.partial(jax.jit(run_dense), x, weights), None
    else:
        run = functools.partial(jax.jit(run_routed), x, index, weights)
    out = run()
    check(out, x, index, weights)
    for _ in range(20):
        assert bool((run() == out).all()), f"{seed=}"


@pytest.mark.gpu
def test_donated_stream_is_not_copied_on_gpu():
    x, index, weights = block(batch=1, num_tokens=1024, routed=300, d=256, h=512)
    run = jax.jit(run_routed, donate_argnums=0).lower(x, index, weights).compile()
    copies = [line for line in run.as_text().splitlines() if " copy(" in line and "256]" in line]
    assert not copies
