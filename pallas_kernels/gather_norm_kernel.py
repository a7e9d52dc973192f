"""Gather and LayerNorm in one pass: rows of the residual stream to a compact buffer.

    out[m] = (x[rows[m]] - mean) / sqrt(variance + epsilon) * scale + bias

with mean and variance over a row in float32; in 8 bits divided by a scale of the row, which is
written too. Bound by bandwidth: a block of threads copies its rows
to shared memory, one copy a row, and each warp normalises a row at a time in registers. Rows that
no `rows` names are not read.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import float8, hopper
from pallas_kernels.float8 import Float8Rows
from pallas_kernels.implementation import undifferentiable

CHUNK = 64  # columns that a warp has in one register of each thread, two a thread
WARPS = 4
BLOCK_ROWS = 16  # that a block of threads normalises, unless it is being tuned


class Statics(NamedTuple):
    """What a launch knows when it is traced; `interpret` as in `plgpu.kernel`."""

    dtype: jnp.dtype  # of the output
    epsilon: float
    block_rows: int
    num_rows: int  # of the output that count: those behind may stay unwritten
    interpret: Any


def _kernel(
    x_gmem, rows_gmem, scale_gmem, bias_gmem, out_gmem, out_scale_gmem=None,
    *, x_smem, ready, statics: Statics,
):  # fmt: skip
    block_rows = statics.block_rows
    first = lax.axis_index("block") * block_rows
    if rows_gmem is None:
        plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(first, block_rows)], x_smem, ready)
    else:
        rows = [rows_gmem[first + r] for r in range(block_rows)]  # first, as loads take long
        for r, row in enumerate(rows):
            plgpu.copy_gmem_to_smem(x_gmem.at[row], x_smem.at[r], ready)

    # A row is a warp's, so that its sums stay within the warp.
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((WARPS, 1, CHUNK), (2,))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1
    )
    vector = layout.reduce(0)
    # pyright reads jax 0.10, where an index had to be given.
    scale = plgpu.load(scale_gmem, layout=vector, optimized=False)  # pyright: ignore
    bias = plgpu.load(bias_gmem, layout=vector, optimized=False)  # pyright: ignore
    plgpu.barrier_wait(ready)

    @pl.loop(0, block_rows // WARPS)
    def _rows(i):
        own = pl.ds(i * WARPS, WARPS)
        x = plgpu.load(x_smem.at[own], layout=layout, optimized=False)  # pyright: ignore
        x = x.astype(jnp.float32)  # [WARPS, d / CHUNK, CHUNK]

        def broadcast(y, dimensions):
            return plgpu.layout_cast(lax.broadcast_in_dim(y, x.shape, dimensions), layout)

        def mean(y):
            return broadcast(y.sum(axis=1).sum(axis=1) / (y.shape[1] * y.shape[2]), [0])

        centred = x - mean(x)
        out = centred * lax.rsqrt(mean(centred * centred) + statics.epsilon)
        out = out * broadcast(scale.astype(jnp.float32), [1, 2])
        out = out + broadcast(bias.astype(jnp.float32), [1, 2])
        if out_scale_gmem is not None:
            row_scale, inverse = float8.scales_of(jnp.abs(out).max(axis=1).max(axis=1))
            out_scale_gmem[pl.ds(first + i * WARPS, WARPS)] = row_scale
            out = out * broadcast(inverse, [0])
        out = hopper.rounded(out, out_gmem.dtype, interpret=statics.interpret)
        out_gmem[pl.ds(first + i * WARPS, WARPS)] = out


def scratch_types(statics: Statics, width: int, dtype: DTypeLike, *, gathers: bool) -> dict:
    """Shared memory and barriers of a block of threads."""
    return dict(
        x_smem=plgpu.SMEM((statics.block_rows, width // CHUNK, CHUNK), dtype),
        ready=plgpu.Barrier(num_arrivals=statics.block_rows if gathers else 1),
    )


@functools.cache
def widest(block_rows: int = BLOCK_ROWS) -> int:
    """The widest row of 16-bit floats of which a block of threads holds its share."""
    statics = Statics(jnp.dtype(jnp.bfloat16), 0.0, block_rows, block_rows, False)

    def fits(width: int) -> bool:
        scratch = scratch_types(statics, width, statics.dtype, gathers=True)
        return hopper.smem_bytes(scratch, reduces=True) <= hopper.smem_limit()

    return next(width for width in range(8192, 0, -CHUNK) if fits(width))


def prepare(
    x: Array,
    scale: Array,
    bias: Array,
    rows: Array | None = None,
    *,
    num_rows: int | None = None,
    dtype: DTypeLike | None = None,
    epsilon: float = 1e-6,
    block_rows: int = BLOCK_ROWS,
    interpret: Any = False,
) -> tuple[Statics, tuple[Array, Array, Array, Array | None]]:
    """What `launch` takes, for checked arguments.

    Args:
        x: Rows of the residual stream [any, d], 16-bit floats, d a multiple of 64.
        scale: LayerNorm's scale [d], float32 or 16-bit floats.
        bias: Its bias [d], likewise.
        rows: Rows of x, int32 [M]; None takes all in order.
        num_rows: How many of the M rows count; None is all.
        dtype: Of the output; None is x's. float8_e4m3fn gives `Float8Rows`.
        epsilon: Added to the variance.
        block_rows: Rows that a block of threads normalises.
        interpret: For tests: parameters of Mosaic GPU's interpret mode.

    Returns:
        Statics and operands. Rows are padded to whole blocks by the last one, which may be read
        again.
    """
    given = len(x) if rows is None else len(rows)
    if padding := -given % block_rows:
        rows = jnp.arange(given, dtype=jnp.int32) if rows is None else rows
        rows = jnp.pad(rows, (0, padding), mode="edge")
    num_rows = given if num_rows is None else num_rows
    statics = Statics(jnp.dtype(dtype or x.dtype), epsilon, block_rows, num_rows, interpret)
    return statics, (x, scale, bias, rows)


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def launch(
    statics: Statics, x: Array, scale: Array, bias: Array, rows: Array | None = None
) -> Array | Float8Rows:
    """Run the kernel on what `prepare` gives.

    Returns:
        The normalised rows [M, d], M a multiple of `block_rows`.
    """
    x, scale, bias = undifferentiable("layer_norm", (x, scale, bias))
    width, block_rows = x.shape[1], statics.block_rows
    out_rows = x.shape[0] if rows is None else rows.shape[0]
    chunks = (width // CHUNK, CHUNK)
    operands = [x.reshape(-1, *chunks), rows, scale.reshape(chunks), bias.reshape(chunks)]
    out_type: Any = jax.ShapeDtypeStruct((out_rows, *chunks), statics.dtype)
    if statics.dtype == float8.DTYPE:
        out_type = out_type, jax.ShapeDtypeStruct((out_rows,), jnp.float32)
    kernel = hopper.kernel(
        functools.partial(_kernel, statics=statics),
        name="gather_norm",
        interpret=statics.interpret,
        out_type=out_type,
        scratch_types=scratch_types(statics, width, x.dtype, gathers=rows is not None),
        grid=(-(-statics.num_rows // block_rows),),
        grid_names=("block",),
        num_threads=1,
        thread_name="wg",
    )
    out = kernel(*operands)
    if isinstance(out, jax.Array):
        return out.reshape(out_rows, width)
    values, scales = out
    return Float8Rows(values.reshape(out_rows, width), scales)
