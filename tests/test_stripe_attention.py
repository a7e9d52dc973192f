"""The stripe attention kernel: interpreted and cross-lowered on a CPU, measured on a GPU."""

from __future__ import annotations

import os

# The interpreter runs every warpgroup on a thread of XLA's pool, whose size is read at start-up:
# on a machine of few cores they would wait for one another for ever.
os.environ.setdefault("NPROC", "16")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.stripe_attention import Case, inputs, relative_error, stripe_coordinates
from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.key_side import key_side
from pallas_kernels.stripe_attention import mosaic_stripe_attention, stripe_attention
from pallas_kernels.stripe_kernel import CONFIGS, Config
from sparsesam_jax.config import PRESETS

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; the error is tested below"
)
# Both operands of the second product are rounded once to the input's dtype.
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}


def run(case: Case, seed: int = 0, **options) -> tuple[jax.Array, tuple, dict]:
    arrays, keys = inputs(case, seed)
    out = mosaic_stripe_attention(
        *arrays,
        keys["rows"],
        keys["cols"],
        layout=case.layout,
        block_order=keys["block_order"],
        **options,
    )
    return out, arrays, keys


INTERPRETED = {
    "dense": (Case(batch=1, side=16, num_heads=2), CONFIGS[0]),
    "odd bar": (Case(batch=1, side=16, num_heads=1, density=0.75, bias=20.0), CONFIGS[0]),
    "diagonal alone": (Case(batch=1, side=16, num_heads=1, density=0.1), CONFIGS[1]),
    "persistent": (
        Case(batch=2, side=16, num_heads=1, density=0.5, head_dim=80, dtype="float16"),
        Config(num_warpgroups=3, block_kv=64, num_stages=4, num_programs=1),
    ),
    "ranked blocks": (
        Case(batch=2, side=16, num_heads=1, density=0.5, order="blocks"),
        Config(num_warpgroups=2, block_kv=128, num_stages=2, num_programs=3),
    ),
    "ranked groups": (
        Case(batch=1, side=24, num_heads=1, density=0.3, order="groups", rel_dtype="float32"),
        Config(num_warpgroups=3, block_kv=64, num_stages=3),
    ),
}


@needs_mosaic
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_equals_reference(name):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    case, config = INTERPRETED[name]
    if case.dtype == "float16":
        case = Case(**{**vars(case), "rel_dtype": "float16"})
    out, arrays, keys = run(case, config=config, interpret=plgpu.InterpretGPUParams())
    assert out.dtype == arrays[0].dtype
    assert relative_error(case, out, arrays, keys) < TOLERANCE[case.dtype]


@needs_mosaic
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("preset", PRESETS)
def test_lowers_for_every_preset(preset, density, batch):
    encoder = PRESETS[preset].image_encoder
    side = encoder.grid_size
    lowers(batch, side, encoder.num_heads, encoder.head_dim, density)


@needs_mosaic
@pytest.mark.parametrize("order", ["tiles", "blocks", "groups"])
@pytest.mark.parametrize("side", [16, 24, 40, 128])
@pytest.mark.parametrize("rel_dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_for_other_grids_and_orders(side, order, rel_dtype):
    if (side, order, rel_dtype) == (128, "groups", jnp.float32):
        pytest.skip("does not fit in shared memory: the error is tested below")
    lowers(1, side, 2, 64, 0.3, order, rel_dtype)


def lowers(batch, side, num_heads, head_dim, density, order="tiles", rel_dtype=jnp.bfloat16):
    shape = (batch, side**2, num_heads, head_dim)
    qkv = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    rel = jax.ShapeDtypeStruct((*shape[:3], side), rel_dtype)
    layout = BlockLayout.a_shape(side**2, density)
    ranks = jax.ShapeDtypeStruct((batch, layout.num_kv_blocks), jnp.int32)
    place = jax.ShapeDtypeStruct((batch, side**2), jnp.int32)
    rows, cols = stripe_coordinates(side)

    def attend(q, k, v, rel_h, rel_w, ranks, place):
        key_rows, key_cols = (place, place) if order == "groups" else (rows, cols)
        block_order = ranks if order == "blocks" else None
        arrays = (q, k, v, rel_h, rel_w, key_rows, key_cols)
        return mosaic_stripe_attention(*arrays, layout=layout, block_order=block_order)

    traced = jax.jit(attend).trace(qkv, qkv, qkv, rel, rel, ranks, place)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_tiles_take_two_products():
    for side in (16, 32, 64, 128):
        rows, cols = stripe_coordinates(side)
        layout = BlockLayout.a_shape(side**2, 0.3)
        labels = np.stack([rows, cols + side])
        keys = key_side(labels, side // 8, layout, block_kv=128, block_order=None)
        assert keys.onehot.shape[1] == 2


def test_mosaic_gpu_raises_where_it_cannot_run():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine can run the kernel")
    arrays, keys = inputs(Case(batch=1, side=16, num_heads=1), 0)
    expected = "compute capability" if JAX_SUPPORTS_MOSAIC_GPU else "jax >= 0.11"
    with pytest.raises(ValueError, match=expected):
        stripe_attention(
            *arrays,
            keys["rows"],
            keys["cols"],
            layout=BlockLayout.dense(256),
            implementation="mosaic_gpu",
        )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "float32"}, "bfloat16 or all float16"),
        ({"head_dim": 72}, "head_dim must be a multiple of 16"),
        ({"rel_dtype": "float16"}, "rel_h must have the dtype of q"),
    ],
)
def test_mosaic_gpu_names_what_it_does_not_support(changes, expected):
    arrays, keys = inputs(Case(batch=1, side=16, num_heads=1, **changes), 0)
    place = (keys["rows"], keys["cols"])
    layout = BlockLayout.dense(256)
    with pytest.raises(ValueError, match=expected):
        stripe_attention(*arrays, *place, layout=layout, implementation="mosaic_gpu")


def test_mosaic_gpu_names_shared_memory():
    case = Case(batch=1, side=128, num_heads=1, order="groups", rel_dtype="float32")
    arrays, keys = inputs(case, 0)
    place = (keys["rows"], keys["cols"])
    with pytest.raises(ValueError, match="must fit in shared memory"):
        stripe_attention(*arrays, *place, layout=case.layout, implementation="mosaic_gpu")


def test_auto_takes_xla():
    case = Case(batch=1, side=16, num_heads=1, density=0.5)
    arrays, keys = inputs(case, 0)
    place = (keys["rows"], keys["cols"])
    got = stripe_attention(*arrays, *place, layout=case.layout)
    want = reference.stripe_attention(*arrays, *place, layout=case.layout)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@needs_mosaic
def test_differentiation_names_the_xla_path():
    arrays, keys = inputs(Case(batch=1, side=16, num_heads=1), 0)

    def loss(q):
        place = (keys["rows"], keys["cols"])
        layout = BlockLayout.dense(256)
        return mosaic_stripe_attention(q, *arrays[1:], *place, layout=layout).sum()

    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(loss)(arrays[0])


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["tiles", "blocks", "groups"])
@pytest.mark.parametrize("density", [0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_error_on_gpu(dtype, head_dim, density, order):
    case = Case(head_dim=head_dim, density=density, order=order, dtype=dtype, rel_dtype=dtype)
    seed = int.from_bytes(os.urandom(3))
    out, arrays, keys = run(case, seed)
    assert relative_error(case, out, arrays, keys) < TOLERANCE[dtype], f"{seed=}"


@pytest.mark.gpu
@pytest.mark.parametrize("rel_dtype", ["bfloat16", "float32"])
def test_large_biases_and_repeats_on_gpu(rel_dtype):
    case = Case(batch=1, density=0.3, bias=12.0, rel_dtype=rel_dtype)  # up to about 50
    seed = int.from_bytes(os.urandom(3))
    out, arrays, keys = run(case, seed)
    assert bool(jnp.isfinite(out.astype(jnp.float32)).all()), f"{seed=}"
    assert relative_error(case, out, arrays, keys) < TOLERANCE["bfloat16"], f"{seed=}"
    for _ in range(20):
        again, _, _ = run(case, seed)
        assert bool((again == out).all()), f"{seed=}"
