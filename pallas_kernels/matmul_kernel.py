"""A block's matrix products: one persistent kernel with the rest of the layer in its epilogue.

    bias:  out[m] = a[m] @ b + bias
    gelu:  out[m] = GELU(a[m] @ b + bias),  GELU(x) = x Phi(x) = x (1 + erf(x / sqrt(2))) / 2
    add:   x[rows[m]] += a[m] @ b + bias,   in place; other rows of x are neither read nor written

A program is a block of threads that stays on its multiprocessor and works through every
`num_programs`-th output tile. One warpgroup streams tiles of a and b through a ring in shared
memory with the tensor memory accelerator (TMA), two multiply. They take tiles in turns, one in its
epilogue while the other has the tensor core to itself ("ping-pong"), or share a tile by rows.
Blocks of a cluster of two take neighbouring columns and load half of a's rows each, for both.

Operands of 8-bit floats come with scales: one a row of a (or of all a, which is folded into the
next), one a column of b. The sums are multiplied by both before the bias. GELU's output in 8 bits
is divided by a scale that is known beforehand. The tensor core takes 8 bits contiguous along the
contraction alone, so b is then stored as [N, K].

The TMA adds the update to x on its way to memory, by whole tiles where rows are consecutive and
else row by row: one addition an element, hence deterministic, and the residual is never loaded.
Design after CUTLASS's ping-pong GEMM and jax's `hopper_matmul_mgpu`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import hopper
from pallas_kernels.boxes import plain_rows
from pallas_kernels.float8 import Float8Rows, Float8Weight
from pallas_kernels.gelu import gelu
from pallas_kernels.hopper import MULTIPROCESSORS, OPERANDS, REGISTERS
from pallas_kernels.implementation import undifferentiable

# What an epilogue does; the first serves to measure what the others cost.
Epilogue = Literal["none", "bias", "gelu", "add"]

WARPGROUPS = 2  # that multiply


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the kernel.

    Attributes:
        tile_m: Rows of an output tile.
        tile_n: Columns of an output tile.
        tile_k: Depth of a step.
        num_stages: Steps in flight between TMA and the warpgroups.
        num_slots: Chunks of the output, one swizzle wide, in flight from a warpgroup to memory.
        take_turns: Whether the warpgroups take tiles in turns; else they share each by its rows.
        group_m: Tiles follow one another down a group of this many rows of tiles, which keeps the
            operands of the tiles in flight in the L2 cache.
        cluster: Blocks that share a's tiles, 1 or 2.
        num_programs: Programs at most.
    """

    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 64
    num_stages: int = 4
    num_slots: int = 2
    take_turns: bool = True
    group_m: int = 16
    cluster: int = 1
    num_programs: int = MULTIPROCESSORS

    @property
    def warpgroup_rows(self) -> int:
        """Rows of a tile that one warpgroup multiplies."""
        return self.tile_m if self.take_turns else self.tile_m // WARPGROUPS

    def fits(self, m: int, n: int, k: int, dtype: DTypeLike = jnp.bfloat16) -> bool:
        """Whether the tiles divide the shapes and fit in registers and shared memory.

        Args:
            m: Rows of a.
            n: Columns of b.
            k: Columns of a.
            dtype: Of a and b. The output takes the same memory in any.
        """
        if m % self.tile_m or n % (self.tile_n * self.cluster) or k % self.tile_k:
            return False
        if self.warpgroup_rows * self.tile_n > 128 * 128:  # accumulators
            return False
        scaled = OPERANDS[jnp.dtype(dtype)].k_major
        scratch = scratch_types(self, dtype, out_dtype=dtype, bias_dtype=jnp.float32, scaled=scaled)
        return hopper.smem_bytes(scratch, reduces=False) <= hopper.smem_limit()


class Statics(NamedTuple):
    """What a launch knows when it is traced; `interpret` as in `plgpu.kernel`."""

    epilogue: Epilogue
    config: Config
    num_rows: int  # of a that count: those behind are padding
    dtype: jnp.dtype  # of the output
    interpret: Any


class Scales(NamedTuple):
    """Scales of 8-bit operands and outputs, float32.

    Attributes:
        columns: Of the output's columns [N].
        rows: Of its rows [M]; None where a has one scale, which is in those of the columns.
        inverse_out: What GELU's output in 8 bits is multiplied by, [1].
    """

    columns: Any = None
    rows: Any = None
    inverse_out: Any = None


def _kernel(
    a_gmem, b_gmem, bias_gmem, rows_gmem, scales_gmem, x_gmem, out_gmem=None,
    *, a_smem, b_smem, out_smem, bias_smem, rows_smem, full, empty, turn, vectors_ready,
    statics: Statics, scales_smem: Any = None,
):  # fmt: skip
    out_gmem = x_gmem if out_gmem is None else out_gmem
    k_major = OPERANDS[a_gmem.dtype].k_major
    epilogue, config, interpret = statics.epilogue, statics.config, statics.interpret
    num_rows, chunk_columns = statics.num_rows, out_smem.shape[-1]
    tile_m, tile_n, tile_k = config.tile_m, config.tile_n, config.tile_k
    num_stages, cluster = config.num_stages, config.cluster
    compute_registers, load_registers = REGISTERS[WARPGROUPS]
    num_columns = b_gmem.shape[0 if k_major else 1]
    num_m, num_n = -(-num_rows // tile_m), num_columns // (tile_n * cluster)
    num_steps = a_gmem.shape[1] // tile_k  # of one tile
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    num_programs = lax.axis_size("program")
    num_own_tiles = lax.div(num_m * num_n - 1 - program, num_programs) + 1

    def place(count):
        """First row and column of this program's tile `count`."""
        tile = program + count * num_programs
        m, n = plgpu.planar_snake(tile, (num_m, num_n), 0, config.group_m)
        if cluster > 1:
            n = n * cluster + lax.axis_index("cluster")
        return m * tile_m, n * tile_n

    def barrier(step):
        """The index of a step's barriers: the warpgroups have sets of their own if in turns."""
        slot = lax.rem(step, num_stages)
        if not config.take_turns:
            return slot
        return lax.rem(lax.div(step, num_steps), WARPGROUPS) * num_stages + slot

    @pl.when(wg < WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(compute_registers, action="increase")
        wg_rows = config.warpgroup_rows
        first_wg_row = 0 if config.take_turns else wg * wg_rows
        inverse_out = None if scales_gmem.inverse_out is None else scales_gmem.inverse_out[0]

        def load_vectors(row, column):
            ready = vectors_ready.at[wg]
            if epilogue != "none":
                own_bias = bias_gmem.at[pl.ds(column, tile_n)]
                plgpu.copy_gmem_to_smem(own_bias, bias_smem.at[wg], ready)
            if rows_gmem is not None:
                own_rows = rows_gmem.at[pl.ds(row + first_wg_row, wg_rows)]
                plgpu.copy_gmem_to_smem(own_rows, rows_smem.at[wg], ready)
            if scales_gmem.columns is not None:
                own = scales_gmem.columns.at[pl.ds(column, tile_n)]
                plgpu.copy_gmem_to_smem(own, scales_smem.columns.at[wg], ready)
            if scales_gmem.rows is not None:
                own = scales_gmem.rows.at[pl.ds(row + first_wg_row, wg_rows)]
                plgpu.copy_gmem_to_smem(own, scales_smem.rows.at[wg], ready)

        def by_column(smem, chunk, shape):
            """A vector's part that belongs to a chunk, for every row."""
            own = smem.at[wg, pl.ds(chunk * chunk_columns, chunk_columns)]
            layout = plgpu.Layout.WGMMA.reduce(0)
            # pyright reads jax 0.10, where an index had to be given.
            own = plgpu.load(own, layout=layout, optimized=False)  # pyright: ignore
            return lax.broadcast_in_dim(own.astype(jnp.float32), shape, [1])

        def multiply(count):
            first_step = count * num_steps

            def product(acc_ref, step):
                slot = lax.rem(step, num_stages)
                plgpu.barrier_wait(full.at[barrier(step)])
                own_a = a_smem.at[slot, pl.ds(first_wg_row, wg_rows)]
                own_b = b_smem.at[slot]
                plgpu.wgmma(acc_ref, own_a, own_b.transpose((1, 0)) if k_major else own_b)

            def products(acc_ref):
                product(acc_ref, first_step)

                @pl.loop(1, num_steps)
                def _step(k):
                    product(acc_ref, first_step + k)
                    plgpu.wgmma_wait(1)
                    plgpu.barrier_arrive(empty.at[barrier(first_step + k - 1)])

                if config.take_turns:

                    @pl.when(count + 1 < num_own_tiles)
                    def _others_turn():
                        plgpu.barrier_arrive(turn.at[1 - wg])

                return acc_ref[...]

            sums = hopper.accumulator(a_smem.dtype, wg_rows, tile_n)
            acc = pl.run_scoped(products, sums)
            plgpu.barrier_arrive(empty.at[barrier(first_step + num_steps - 1)])
            return acc

        def finish(acc, row_scales, chunk):
            """A chunk of the tile's columns, as it is stored."""
            out = acc[:, chunk * chunk_columns : (chunk + 1) * chunk_columns]
            if scales_gmem.columns is not None:
                out = out * by_column(scales_smem.columns, chunk, out.shape)
            if row_scales is not None:
                out = out * lax.broadcast_in_dim(row_scales, out.shape, [0])
            if epilogue != "none":
                out = out + by_column(bias_smem, chunk, out.shape)
            if epilogue == "gelu":
                out = gelu(out)
            if inverse_out is not None:
                out = out * inverse_out
            return hopper.rounded(out, out_smem.dtype, interpret=interpret)

        def store(slot, row, columns):
            target = out_gmem.at[pl.ds(row, wg_rows), columns]
            if epilogue == "add" and interpret:  # has no reduction
                target[...] = target[...] + out_smem[wg, slot]
                return
            reduction = "add" if epilogue == "add" else None
            plgpu.copy_smem_to_gmem(out_smem.at[wg, slot], target, reduction_op=reduction)

        def scatter(slot, row, columns):
            # Interpret mode has no reshaped references.
            plain = out_smem if interpret else plain_rows(out_smem)

            @pl.loop(0, jnp.minimum(num_rows - row, wg_rows))
            def _row(r):
                target = out_gmem.at[pl.ds(rows_smem[wg, r], 1), columns]
                if interpret:
                    target[...] = target[...] + out_smem[wg, slot, pl.ds(r, 1)]
                else:
                    source = plain.at[wg, slot, pl.ds(r, 1)]
                    plgpu.copy_smem_to_gmem(source, target, commit_group=False, reduction_op="add")

            plgpu.commit_smem_to_gmem_group()

        def one_tile(count):
            row, column = place(count)
            load_vectors(row, column)
            if config.take_turns:

                @pl.when(count > 0)
                def _own_turn():
                    plgpu.barrier_wait(turn.at[wg])

            acc, row_scales = multiply(count), None
            if epilogue != "none" or scales_gmem.columns is not None:
                plgpu.barrier_wait(vectors_ready.at[wg])
            if scales_gmem.rows is not None:
                own, by_row = scales_smem.rows.at[wg], plgpu.Layout.WGMMA.reduce(1)
                row_scales = plgpu.load(own, layout=by_row, optimized=False)  # pyright: ignore
            for chunk in range(tile_n // chunk_columns):
                slot = chunk % config.num_slots
                plgpu.wait_smem_to_gmem(config.num_slots - 1, wait_read_only=True)
                out_smem[wg, slot] = finish(acc, row_scales, chunk)
                plgpu.commit_smem()
                columns = pl.ds(column + chunk * chunk_columns, chunk_columns)
                write = store if rows_gmem is None else scatter
                write(slot, row + first_wg_row, columns)

        if config.take_turns:

            @pl.loop(0, lax.div(num_own_tiles + 1 - wg, WARPGROUPS))
            def _turn(i):
                one_tile(i * WARPGROUPS + wg)
        else:
            pl.loop(0, num_own_tiles)(one_tile)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == WARPGROUPS)
    def _load():
        plgpu.set_max_registers(load_registers, action="decrease")
        axes = "cluster" if cluster > 1 else None

        @pl.loop(0, num_own_tiles)
        def _tile(count):
            row, column = place(count)

            @pl.loop(0, num_steps)
            def _step(k):
                step = count * num_steps + k
                slot, ready = lax.rem(step, num_stages), full.at[barrier(step)]

                @pl.when(step >= num_stages)
                def _free():
                    plgpu.barrier_wait(empty.at[barrier(step - num_stages)])

                depth = pl.ds(k * tile_k, tile_k)
                a_tile = a_gmem.at[pl.ds(row, tile_m), depth]
                plgpu.copy_gmem_to_smem(a_tile, a_smem.at[slot], ready, collective_axes=axes)
                place_b = (depth, pl.ds(column, tile_n))
                b_tile = b_gmem.at[place_b[::-1] if k_major else place_b]
                plgpu.copy_gmem_to_smem(b_tile, b_smem.at[slot], ready)

        # Every completion is seen, also the last: a block must outlive its neighbour's arrivals.
        total = num_own_tiles * num_steps

        @pl.loop(jnp.maximum(total - num_stages, 0), total)
        def _finish(step):
            plgpu.barrier_wait(empty.at[barrier(step)])


def scratch_types(
    config: Config,
    dtype: DTypeLike,
    *,
    out_dtype: DTypeLike,
    bias_dtype: DTypeLike,
    num_vectors: int = 1,
    scaled: bool = False,
) -> dict[str, Any]:
    """Shared memory and barriers of a block of threads: `a` and `b` have `dtype`."""
    num_stages, wg_rows = config.num_stages, config.warpgroup_rows
    tile_m, tile_n, tile_k = config.tile_m, config.tile_n, config.tile_k
    out_columns = min(OPERANDS[jnp.dtype(out_dtype)].columns, tile_n)
    b_tile = (tile_n, tile_k) if OPERANDS[jnp.dtype(dtype)].k_major else (tile_k, tile_n)
    num_barriers = num_stages * (WARPGROUPS if config.take_turns else 1)
    num_readers = 1 if config.take_turns else WARPGROUPS
    if config.cluster > 1:
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_barriers=num_barriers, num_arrivals=num_readers
        )
    else:
        empty = plgpu.Barrier(num_barriers=num_barriers, num_arrivals=num_readers)
    scales = Scales(*(plgpu.SMEM((WARPGROUPS, size), jnp.float32) for size in (tile_n, wg_rows)))
    return dict(
        a_smem=hopper.buffer(dtype, num_stages, tile_m, tile_k),
        b_smem=hopper.buffer(dtype, num_stages, *b_tile),
        out_smem=hopper.buffer(out_dtype, WARPGROUPS, config.num_slots, wg_rows, out_columns),
        bias_smem=plgpu.SMEM((WARPGROUPS, tile_n), bias_dtype),
        rows_smem=plgpu.SMEM((WARPGROUPS, wg_rows), jnp.int32),
        full=plgpu.Barrier(num_barriers=num_barriers, num_arrivals=2),
        empty=empty,
        turn=plgpu.Barrier(num_barriers=WARPGROUPS),
        vectors_ready=plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=num_vectors),
        **({"scales_smem": scales} if scaled else {}),
    )


def prepare(
    a: Array | Float8Rows,
    b: Array | Float8Weight,
    bias: Array,
    rows: Array | None = None,
    x: Array | None = None,
    *,
    epilogue: Epilogue,
    config: Config,
    num_rows: int | None = None,
    dtype: DTypeLike | None = None,
    out_scale: Array | None = None,
    interpret: Any = False,
) -> tuple[Statics, tuple[Array, Array, Array, Array | None, Scales, Array | None]]:
    """What `launch` takes; `tuning.fitting_matmul` knows a config.

    Args:
        a: Left operand [M, K], M a multiple of the tile.
        b: Right operand [K, N], a's dtype, or in 8 bits as a is.
        bias: [N], float32 or 16-bit floats.
        rows: For "add", rows of x, int32 [M]; None is row m for row m of a.
        x: For "add", what is added to, [any, N], 16-bit floats.
        epilogue: What follows the product.
        config: How the kernel runs.
        num_rows: How many rows of a count, those behind being padding; None is all.
        dtype: Of the output; None is x's, or else a's.
        out_scale: What an output in 8 bits is divided by, float32 [].
        interpret: For tests: parameters of Mosaic GPU's interpret mode.

    Raises:
        ValueError: The config does not fit the product.
    """
    scales = Scales(inverse_out=None if out_scale is None else 1 / out_scale.reshape(1))
    if isinstance(a, Float8Rows) or isinstance(b, Float8Weight):
        assert isinstance(a, Float8Rows) and isinstance(b, Float8Weight), "it is checked"
        if a.scale.ndim:
            scales = scales._replace(columns=b.scale, rows=a.scale)
        else:
            scales = scales._replace(columns=a.scale * b.scale)
        a, b, shape = a.values, b.values, b.values.shape[::-1]
    else:
        shape = b.shape
    if not config.fits(len(a), shape[1], shape[0], a.dtype):
        raise ValueError(f"config must fit the product of {a.shape} and {shape}, got {config}")
    num_rows = len(a) if num_rows is None else num_rows
    dtype = jnp.dtype(dtype or (a if x is None else x).dtype)
    statics = Statics(epilogue, config, num_rows, dtype, interpret)
    return statics, (a, b, bias, rows, scales, x)


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def launch(
    statics: Statics,
    a: Array,
    b: Array,
    bias: Array,
    rows: Array | None,
    scales: Scales,
    x: Array | None,
) -> Array:
    """Run the kernel on what `prepare` gives.

    Returns:
        The product's output [M, N], or for "add" x after it, in x's place if XLA can spare x.
    """
    a, b, bias, x = undifferentiable("a product", (a, b, bias, x))
    config, cluster = statics.config, statics.config.cluster
    x_ref = None if x is None else jax.new_ref(x)
    m, n = a.shape[0], b.shape[0 if OPERANDS[a.dtype].k_major else 1]
    num_tiles = -(-statics.num_rows // config.tile_m) * (n // (config.tile_n * cluster))
    vectors = [None if statics.epilogue == "none" else bias, rows, scales.columns, scales.rows]
    kernel = hopper.kernel(
        functools.partial(_kernel, statics=statics),
        name=f"matmul_{statics.epilogue}",
        interpret=statics.interpret,
        out_type=jax.ShapeDtypeStruct((m, n), statics.dtype) if x_ref is None else (),
        scratch_types=scratch_types(
            config,
            a.dtype,
            out_dtype=statics.dtype,
            bias_dtype=bias.dtype,
            num_vectors=max(1, sum(vector is not None for vector in vectors)),
            scaled=scales.columns is not None,
        ),
        grid=(min(config.num_programs // cluster, num_tiles),),
        grid_names=("program",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
    )
    out = kernel(a, b, bias, rows, scales, x_ref)
    return out if x_ref is None else jax.freeze(x_ref)
