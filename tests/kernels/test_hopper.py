"""What the kernels know of the card and of operands."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gather_norm_kernel, hopper
from pallas_kernels.boxes import split_head_dim
from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.matmul_kernel import Config

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; its layout is asked for"
)


def test_shared_memory_of_programs():
    assert hopper.smem_limit() == 232448  # by the CUDA programming guide, 227 KiB
    assert 2 * (hopper.smem_limit(2) + 1024) == 228 * 1024


def scratch(num_bytes: int) -> dict:
    return dict(
        data_smem=[plgpu.SMEM((8, num_bytes // 8), jnp.int8), plgpu.SMEM((3,), jnp.float32)],
        ready=plgpu.Barrier(num_barriers=5),
    )


def test_smem_bytes():
    # 3000 and 12 bytes begin at multiples of 1024; five barriers.
    assert hopper.smem_bytes(scratch(3000), reduces=False) == 3072 + 1024 + 40
    assert hopper.smem_bytes(scratch(3000), reduces=True) == 3072 + 1024 + 40 + 2048


def lower(num_bytes: int, *, reduces: bool) -> None:
    """Lower a kernel with this scratch for CUDA."""

    def body(x_gmem, out_gmem, **_):
        x = plgpu.load(x_gmem, layout=plgpu.Layout.WGMMA, optimized=False)  # pyright: ignore
        out_gmem[...] = x.sum(axis=1) if reduces else x

    x = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    kernel = hopper.kernel(
        body,
        name="scratch",
        interpret=False,
        out_type=jax.ShapeDtypeStruct((64,), jnp.float32) if reduces else x,
        scratch_types=scratch(num_bytes),
        num_threads=1,
        thread_name="wg",
    )
    jax.jit(kernel).trace(x).lower(lowering_platforms=("cuda",))


@needs_mosaic
@pytest.mark.parametrize("reduces", [False, True])
def test_smem_bytes_are_those_that_mosaic_takes(reduces):
    taken = functools.partial(hopper.smem_bytes, reduces=reduces)
    most = max(range(200_000, 240_000, 8), key=lambda n: (taken(scratch(n)) <= 232448) * n)
    lower(most, reduces=reduces)
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lower(most + 8, reduces=reduces)


@needs_mosaic
def test_widest_row():
    widest = gather_norm_kernel.widest()

    def lower_norm(width: int) -> None:
        x, vector = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((32, width), (width,)))
        rows = jax.ShapeDtypeStruct((32,), jnp.int32)
        statics, _ = gather_norm_kernel.prepare(x, vector, vector, rows)
        launch = functools.partial(gather_norm_kernel.launch, statics)
        jax.jit(launch).trace(x, vector, vector, rows).lower(lowering_platforms=("cuda",))

    lower_norm(widest)
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lower_norm(widest + 64)


@pytest.mark.parametrize(
    ("head_dim", "parts"), [(64, (64,)), (80, (64, 16)), (96, (64, 16, 16)), (128, (64, 64))]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parts_of_head_dim(head_dim, parts, dtype):
    assert split_head_dim(head_dim, dtype) == parts


def test_an_operands_dtype_is_an_entry(monkeypatch):
    """Half as wide elements: twice the columns, half the shared memory, no accumulators more."""
    eight = jnp.dtype(jnp.float8_e4m3fn)
    operand = hopper.Operand(itemsize=1, k_major=True, accumulator=jnp.float32)
    monkeypatch.setitem(hopper.OPERANDS, eight, operand)
    assert (operand.columns, operand.step) == (128, 32)
    assert split_head_dim(160, eight) == (128, 32)
    buffer = hopper.buffer(eight, 64, 256)
    assert str(buffer.transforms[1]) == str(plgpu.SwizzleTransform(128))  # pyright: ignore
    config = Config(tile_n=256, tile_k=128, num_stages=3, num_slots=1, take_turns=False)
    assert config.fits(256, 256, 256, eight) and not config.fits(256, 256, 256, jnp.bfloat16)


def test_dtype_problems():
    dtypes = {"x": jnp.dtype("float16"), "bias": jnp.dtype("int32")}
    expected = ["bias must be float32, bfloat16 or float16, got int32"]
    assert hopper.dtype_problems(hopper.VECTOR_DTYPES, **dtypes) == expected
    assert hopper.dtype_problems(hopper.KERNEL_DTYPES, x=jnp.dtype("float16")) == []
