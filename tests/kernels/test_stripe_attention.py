"""The stripe attention kernel: interpreted and cross-lowered on a CPU, run on a GPU."""

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
from stripe_cases import (
    Arguments,
    Case,
    frobenius_error,
    inputs,
    masked_attention,
    relative_error,
    stripes,
)

from pallas_kernels import reference
from pallas_kernels import stripe_attention as module
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.stripe_attention import (
    attend_by_groups,
    image_bytes,
    image_groups,
    prepare,
    stripe_attention,
)
from pallas_kernels.stripe_schedule import Config
from pallas_kernels.tuning import H200
from sparsesam_jax.config import PRESETS

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; the error is tested below"
)
# The bias of columns, the weights and the result are rounded once to the input's dtype, by up to
# 2^-9 and 2^-12: averaged over an output's keys.
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}


def run(function, case: Case, arguments: Arguments, **options) -> jax.Array:
    """The function jitted, as op by op it takes long; numpy arrays stay known when it is traced."""
    static = {k: x for k, x in arguments._asdict().items() if not isinstance(x, jax.Array)}

    @jax.jit
    def attend(arrays: dict[str, jax.Array]) -> jax.Array:
        *positional, block_order = Arguments(**static, **arrays)
        return function(*positional, layout=case.layout, block_order=block_order, **options)

    return attend({k: x for k, x in arguments._asdict().items() if k not in static})


TWO = Config(num_warpgroups=2, block_kv=64, num_stages=2)
# A grid of 16 x 16 tokens is 4 query blocks: with 3 warpgroups two sit out the second item.
INTERPRETED = {
    "odd bar": (Case(batch=1, side=16, num_heads=1, density=0.75), H200.tiles[1]),
    "diagonal alone": (Case(batch=1, side=16, num_heads=1, density=0.1), H200.tiles[0]),
    "persistent": (
        Case(batch=2, side=16, num_heads=2, density=0.5, dtype="float16"),
        Config(num_warpgroups=2, block_kv=64, num_stages=3, num_programs=3),
    ),
    "head_dim 80": (Case(batch=1, side=16, num_heads=1, density=0.5, head_dim=80), H200.tiles[1]),
    "ranked blocks": (
        Case(batch=2, side=16, num_heads=1, density=0.5, order="blocks"),
        Config(num_warpgroups=2, block_kv=128, num_stages=2, num_programs=3),
    ),
    "ranked groups": (
        Case(batch=2, side=16, num_heads=1, density=0.5, order="groups"),
        H200.sequences[0],
    ),
    "groups by head": (Case(batch=1, side=16, num_heads=4, density=0.5, order="heads"), TWO),
    "dense": (Case(batch=1, side=24, num_heads=1), H200.tiles[0]),
    "static sequence": (Case(batch=1, side=24, num_heads=1, density=0.3), H200.sequences[1]),
}


@needs_mosaic
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_equals_reference(name):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    case, config = INTERPRETED[name]
    arguments = inputs(case, seed=0)
    interpret = plgpu.InterpretGPUParams()
    out = run(attend_by_groups, case, arguments, config=config, interpret=interpret)
    assert out.dtype == case.dtype
    assert relative_error(case, out, arguments) < TOLERANCE[case.dtype]


@needs_mosaic
@pytest.mark.parametrize("order", ["tiles", "blocks", "groups", "heads"])
def test_interpreted_groups_of_images_equal_reference(order, monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    heads = {"tiles": 2, "blocks": 1, "groups": 4, "heads": 2}[order]
    case = Case(batch=3, side=16, num_heads=heads, density=0.5, order=order)
    tiles = order in ("tiles", "blocks")
    needed = image_bytes((case.side, case.side), heads, case.head_dim, tiles=tiles)
    monkeypatch.setattr(module, "GROUP_BYTES", 2 * needed)
    arguments = inputs(case, seed=0)
    interpret = plgpu.InterpretGPUParams()
    out = run(attend_by_groups, case, arguments, config=TWO, interpret=interpret)
    for image in range(case.batch):
        assert error_of_image(case, out, arguments, image) < TOLERANCE[case.dtype]


def error_of_image(case: Case, out: jax.Array, arguments: Arguments, image: int) -> float:
    """Relative error of the first and last head."""
    heads = sorted({0, case.num_heads - 1})
    want = masked_attention(case, arguments, image, heads)
    return frobenius_error(out[image][:, :, np.array(heads)], want)


@pytest.mark.parametrize(
    ("batch", "items", "head_dim", "tiles", "expected"),
    [
        (1, 352, 64, True, [1]),
        (6, 352, 64, True, [6]),
        (8, 352, 64, True, [4, 4]),  # ViT-L: 11 + 11 waves, as many as in one launch
        (8, 352, 64, False, [3, 3, 2]),  # 8 + 8 + 6
        (2, 264, 1024, False, [1, 1]),  # an image needs more than a launch may
        (9, 1, 64, True, [5, 4]),
    ],
)
def test_image_groups(batch, items, head_dim, tiles, expected):
    needed = image_bytes((64, 64), 16, head_dim, tiles=tiles)
    groups = image_groups(batch, items, 132, needed)
    assert [len(images) for images in groups] == expected
    assert [image for images in groups for image in images] == list(range(batch))


@needs_mosaic
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("preset", PRESETS)
def test_lowers_for_every_preset(preset, density, batch):
    encoder = PRESETS[preset].image_encoder
    shape = dict(side=encoder.grid_size, num_heads=encoder.num_heads, head_dim=encoder.head_dim)
    program = lowered(Case(batch=batch, density=density, **shape))
    assert "mosaic_gpu" in program
    # Groups come one after the other, in the place of the first one's output. Those of as many
    # images share a kernel, of which there are two sizes at most.
    grouped = "stablehlo.optimization_barrier" in program
    assert grouped or batch == 1 or encoder.num_heads < 16
    aliases = program.count("stablehlo.output_operand_alias<")
    assert 1 <= aliases <= 2 if grouped else aliases == 0


@needs_mosaic
@pytest.mark.parametrize("order", ["tiles", "blocks", "groups", "heads"])
@pytest.mark.parametrize("side", [16, 24, 40, 128])
def test_lowers_for_other_grids_and_orders(side, order):
    case = Case(batch=2, side=side, num_heads=2, density=0.3, order=order)
    assert "mosaic_gpu" in lowered(case)


def lowered(case: Case, *, has_bias: bool = True) -> str:
    """The program for CUDA."""
    arguments = jax.eval_shape(lambda: inputs(case, seed=0))
    if not has_bias:
        arguments = arguments._replace(rel_pos_h=None, rel_pos_w=None)
    if case.order in ("tiles", "blocks"):
        arguments = arguments._replace(sequence=stripes(case.side))
    sequence = arguments.sequence
    is_static = isinstance(sequence, np.ndarray)

    def attend(arguments: Arguments) -> jax.Array:
        if is_static:
            arguments = arguments._replace(sequence=sequence)
        return run(attend_by_groups, case, arguments)

    traced = jax.jit(attend).trace(arguments._replace(sequence=None) if is_static else arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("order", ["tiles", "blocks", "groups", "heads"])
def test_xla_equals_masked_attention(order, density):
    shape = dict(batch=2, side=16, num_heads=2, head_dim=16, dtype="float32")
    case = Case(**shape, density=density, order=order)
    arguments = inputs(case, seed=0)
    out = run(stripe_attention, case, arguments, implementation="xla")
    for image in range(case.batch):
        want = masked_attention(case, arguments, image, heads=[0, 1])
        # float32 rounding of a few hundred sums of terms of size 1, in another order.
        np.testing.assert_allclose(out[image], want, atol=2e-5)


@pytest.mark.parametrize("order", ["images", "heads"])
def test_static_sequences_by_image_are_no_tiles(order):
    case = Case(batch=2, side=16, num_heads=2, head_dim=16, density=0.5)
    arguments = inputs(case, seed=0)
    lead = {"images": (2,), "heads": (2, 2)}[order]
    sequence = np.broadcast_to(arguments.sequence, (*lead, 256))
    options = dict(layout=case.layout, position_bias="xla")
    statics, (first, _, operands, table) = prepare(*arguments[:3], sequence, **options)
    assert statics.gathered and first is None and operands.onehot is not None
    assert statics.schedule.layout.num_q_blocks == 4 and table.shape == (1, 2 + 4 + 4)
    got = run(stripe_attention, case, arguments._replace(sequence=sequence))
    want = run(stripe_attention, case, arguments)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), atol=2e-2)


def without_bias(case: Case, seed: int) -> tuple[Arguments, Arguments]:
    """Arguments without a position bias, and the same with a bias of zero for the reference."""
    arguments = inputs(case, seed)
    zeros = jnp.zeros_like(arguments.rel_pos_h)
    same = arguments._replace(rel_pos_h=zeros, rel_pos_w=zeros)
    return arguments._replace(rel_pos_h=None, rel_pos_w=None), same


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("order", ["tiles", "blocks", "groups", "heads"])
def test_xla_without_bias_equals_masked_attention(order, density):
    shape = dict(batch=1, side=16, num_heads=2, head_dim=16, dtype="float32")
    case = Case(**shape, density=density, order=order)
    arguments, same = without_bias(case, seed=0)
    out = run(stripe_attention, case, arguments, implementation="xla")
    # float32 rounding of a few hundred sums of terms of size 1, in another order.
    np.testing.assert_allclose(out[0], masked_attention(case, same, 0, heads=[0, 1]), atol=2e-5)


@needs_mosaic
@pytest.mark.parametrize(
    ("order", "head_dim", "dtype"),
    [("tiles", 64, "bfloat16"), ("blocks", 80, "float16"), ("groups", 64, "bfloat16")],
)
def test_interpreted_kernel_without_bias_equals_reference(order, head_dim, dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape = dict(batch=1, side=16, num_heads=2, head_dim=head_dim, dtype=dtype)
    case = Case(**shape, density=0.75, order=order)
    arguments, same = without_bias(case, seed=0)
    options = dict(config=TWO, interpret=plgpu.InterpretGPUParams())
    out = run(attend_by_groups, case, arguments, **options)
    assert relative_error(case, out, same) < TOLERANCE[dtype]


@needs_mosaic
@pytest.mark.parametrize("order", ["tiles", "blocks", "groups", "heads"])
def test_lowers_without_bias(order):
    program = lowered(Case(batch=2, density=0.3, order=order), has_bias=False)
    assert program.count("@mosaic_gpu_v2") == 1  # no kernel of the bias


def test_tables_are_given_together():
    case = Case(batch=1, side=16, num_heads=1)
    arguments = inputs(case, seed=0)._replace(rel_pos_w=None)
    with pytest.raises(ValueError, match="rel_pos_w must be given with rel_pos_h or both be None"):
        run(stripe_attention, case, arguments)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_no_sequence_is_raster_order(density):
    case = Case(batch=1, side=16, num_heads=1, density=density)
    raster = inputs(case, seed=0)._replace(sequence=np.arange(256, dtype=np.int32))
    got = run(stripe_attention, case, raster._replace(sequence=None))
    want = run(stripe_attention, case, raster)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_mosaic_gpu_raises_where_it_cannot_run():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine can run the kernel")
    case = Case(batch=1, side=16, num_heads=1)
    expected = "compute capability" if JAX_SUPPORTS_MOSAIC_GPU else "jax >= 0.11"
    with pytest.raises(ValueError, match=expected):
        run(stripe_attention, case, inputs(case, seed=0), implementation="mosaic_gpu")


def shapes(height: int, width: int, heads: int, head_dim: int, dtype: str) -> tuple:
    """Shapes of the arrays of one image."""
    shapes = (height, width, 3, heads, head_dim), (height,) * 2, (width,) * 2
    shapes = (1, *shapes[0]), *((*x, head_dim) for x in shapes[1:])
    return tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(dtype="float32"), "qkv must be bfloat16 or float16, got float32"),
        (dict(head_dim=72), "head_dim must be a multiple of 16 up to 128, got 72"),
        (dict(head_dim=144), "head_dim must be a multiple of 16 up to 128, got 144"),
        (dict(height=20, width=20), "Gh . Gw must be a multiple of 64, got 20 x 20"),
        (dict(height=136, width=8), "Gh and Gw must be at most 128, got 136 x 8"),
        (dict(block=32), "layout must have blocks of 64 x 64, got 32 x 32"),
        (
            dict(height=128, width=128, head_dim=128, groups=True),
            "must fit in shared memory, got head_dim 128 and 128 x 128 tokens",
        ),
    ],
    ids=str,
)
def test_mosaic_gpu_names_what_it_does_not_support(change, expected):
    case = dict(height=16, width=16, head_dim=64, dtype="bfloat16", block=64, groups=False)
    height, width, head_dim, dtype, block, groups = (case | change).values()
    seq_len = height * width
    arrays = shapes(height, width, 1, head_dim, dtype)
    layout = BlockLayout.a_shape(seq_len, 0.5, block_q=block, block_kv=block)
    sequence = np.arange(seq_len, dtype=np.int32)

    def attend(implementation, *arrays):
        own_sequence = jnp.asarray(sequence)[None] if groups else sequence
        options = dict(layout=layout, implementation=implementation)
        return stripe_attention(*arrays, own_sequence, **options)

    with pytest.raises(ValueError, match=expected):
        jax.eval_shape(functools.partial(attend, "mosaic_gpu"), *arrays)
    # What auto cannot give the kernel, XLA runs.
    assert jax.eval_shape(functools.partial(attend, "auto"), *arrays).dtype == dtype


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(qkv=(1, 16, 16, 2, 1, 16)), r"qkv must have shape \[B, Gh, Gw, 3, H, D\], got"),
        (dict(rel_pos_h=(31, 16)), r"rel_pos_h must have shape \(16, 16, 16\) and dtype bfloat16"),
        (dict(rel_pos_w=(16, 14, 16)), "rel_pos_w must have shape .*, got .16, 14, 16. and bfl"),
        (dict(sequence=(2, 256)), r"sequence must have one of the shapes .*, got \(2, 256\)"),
        (dict(seq_len=512), "layout must have seq_len 256, got 512"),
        (dict(block_order=(1, 5)), r"block_order must have shape \(1, 4\), got \(1, 5\)"),
    ],
    ids=str,
)
def test_arguments_are_checked(change, expected):
    arguments = dict(
        qkv=(1, 16, 16, 3, 1, 16),
        rel_pos_h=(16, 16, 16),
        rel_pos_w=(16, 16, 16),
        sequence=(1, 256),
        block_order=(1, 4),
    )
    seq_len = change.get("seq_len", 256)
    arguments |= {name: shape for name, shape in change.items() if name != "seq_len"}
    dtypes = dict(sequence=jnp.int32, block_order=jnp.int32)
    arrays = {name: jnp.zeros(x, dtypes.get(name, jnp.bfloat16)) for name, x in arguments.items()}
    with pytest.raises(ValueError, match=expected):
        stripe_attention(**arrays, layout=BlockLayout.a_shape(seq_len, 0.5))


def test_tables_have_the_dtype_of_qkv():
    case = Case(batch=1, side=16, num_heads=1)
    arguments = inputs(case, seed=0)
    arguments = arguments._replace(rel_pos_w=arguments.rel_pos_w.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"rel_pos_w must have .* bfloat16, got .* float32"):
        run(stripe_attention, case, arguments)


@needs_mosaic
def test_differentiation_names_the_xla_path():
    case = Case(batch=1, side=16, num_heads=1)
    arguments = inputs(case, seed=0)

    def loss(qkv, function):
        return run(function, case, arguments._replace(qkv=qkv)).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(loss)(arguments.qkv, attend_by_groups)
    xla = functools.partial(stripe_attention, implementation="xla")
    assert bool(jnp.isfinite(jax.grad(loss)(arguments.qkv, xla)).all())


def on_gpu(case: Case, seed: int) -> tuple[jax.Array, float]:
    """What the kernel gives on this machine's GPU, and its error."""
    arguments = inputs(case, seed)
    out = run(stripe_attention, case, arguments, implementation="mosaic_gpu")
    error = relative_error(case, out, arguments)
    print(f"{case} bias {case.bias}: error {error:.2e} ({seed=})")
    return out, error


ON_GPU = [
    Case(),
    Case(density=0.5),
    Case(density=0.3),
    Case(density=0.25, head_dim=80),
    Case(head_dim=80),
    Case(density=0.3, dtype="float16"),
    Case(density=0.5, head_dim=80, dtype="float16"),
    Case(density=0.25, order="blocks"),
    Case(density=0.3, order="blocks", head_dim=80, dtype="float16"),
    Case(density=0.3, order="groups"),
    Case(density=0.5, order="groups", head_dim=80),
    Case(density=0.25, order="groups", dtype="float16"),
    Case(density=0.3, order="heads"),
    Case(batch=1),
    Case(batch=1, density=0.3),
    Case(batch=1, density=0.3, side=40),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_error_on_gpu(case):
    _, error = on_gpu(case, seed=int.from_bytes(os.urandom(3)))
    assert error < TOLERANCE[case.dtype]  # a NaN is none


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["tiles", "blocks", "groups", "heads"])
@pytest.mark.parametrize("batch", [5, 8])
def test_every_image_on_gpu(batch, order):
    case = Case(batch=batch, density=0.3, order=order)
    arguments = inputs(case, seed=int.from_bytes(os.urandom(3)))
    out = run(stripe_attention, case, arguments, implementation="mosaic_gpu")
    for image in range(batch):
        assert error_of_image(case, out, arguments, image) < TOLERANCE[case.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["tiles", "blocks", "groups", "heads"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_without_bias_on_gpu(head_dim, order):
    case = Case(density=0.3, order=order, head_dim=head_dim)
    arguments, same = without_bias(case, seed=int.from_bytes(os.urandom(3)))
    out = run(stripe_attention, case, arguments, implementation="mosaic_gpu")
    assert relative_error(case, out, same) < TOLERANCE[case.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["tiles", "groups"])
def test_large_biases_on_gpu(order):
    case = Case(batch=1, density=0.3, order=order, bias=12.0)
    seed = int.from_bytes(os.urandom(3))
    arguments = inputs(case, seed)
    rel = reference.relative_position(arguments.qkv[:, :, :, 0], *arguments[1:3])
    assert min(float(abs(x).max()) for x in rel) > 50
    out, error = on_gpu(case, seed)
    assert bool(jnp.isfinite(out.astype(jnp.float32)).all()), f"{seed=}"
    # A bias of 12, the standard deviation, is stored as 12 sqrt(64) in bfloat16 (of tiles that of
    # columns, of groups both), which moves it by up to 1/32: that alone is an error of 1.4e-2.
    assert error < 2.5e-2, f"{seed=}"


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_repeats_are_bit_identical_on_gpu(density):
    case = Case(density=density)
    *arrays, sequence, _ = inputs(case, seed=int.from_bytes(os.urandom(3)))

    @jax.jit
    def attend(*arrays: jax.Array) -> jax.Array:
        arguments = Arguments(*arrays, sequence=sequence, block_order=None)
        return run(stripe_attention, case, arguments, implementation="mosaic_gpu")

    first = attend(*arrays)
    assert bool(jnp.isfinite(first).all())
    for _ in range(20):
        assert bool((attend(*arrays) == first).all())
