"""A block's matrix products: one persistent kernel with the rest of the layer in its epilogue.

    bias:  out[m] = a[m] @ b + bias
    gelu:  out[m] = GELU(a[m] @ b + bias),  GELU(x) = x Phi(x) = x (1 + erf(x / sqrt(2))) / 2
    add:   x[rows[m]] += a[m] @ b + bias,   in place; other rows of x are neither read nor written

A program is a block of threads that stays on its multiprocessor and works through every
`num_programs`-th output tile. One warpgroup streams tiles of a and b through a ring in shared
memory with the tensor memory accelerator (TMA), two multiply. They take tiles in turns, one in its
epilogue while the other has the tensor core to itself ("ping-pong"), or share a tile by rows.
Blocks of a cluster of two take neighbouring columns and load half of a's rows each, for both.

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
from jaxtyping import Array

# What an epilogue does; the first serves to measure what the others cost.
Epilogue = Literal["none", "bias", "gelu", "add"]

COLUMNS = 64  # of a tile in shared memory: rows of 128 bytes, the TMA's widest swizzle
WARPGROUPS = 2  # that multiply
# Shared memory of one block on Hopper, less the vectors, the barriers and Mosaic's scratch.
SMEM_BYTES = 232448 - 6144

# log2 Phi(-t) on t >= 0 by a weighted minimax fit on [0, 6]; beyond, it only falls. GELU's absolute
# error is below 3e-7, most of it float32's.
_LOG2_PHI = (
    -0.9999988675117493,
    -1.1511237621307373,
    -0.4591129720211029,
    -0.052719928324222565,
    0.007340434473007917,
    -0.00032822086359374225,
    -0.00011256838479312137,
    2.470000254106708e-05,
    -1.659081704019627e-06,
)


def gelu(x: Array) -> Array:
    """The exact GELU in float32, `max(x, 0) - |x| Phi(-|x|)`: one exponential, no division."""
    t = jnp.abs(x)
    log2_phi = jnp.full_like(x, _LOG2_PHI[-1])
    for coefficient in _LOG2_PHI[-2::-1]:
        log2_phi = log2_phi * t + coefficient
    return jnp.maximum(x, 0.0) - t * jnp.exp2(log2_phi)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the kernel.

    Attributes:
        tile_m: Rows of an output tile.
        tile_n: Columns of an output tile.
        tile_k: Depth of a step.
        num_stages: Steps in flight between TMA and the warpgroups.
        num_slots: Chunks of 64 columns of the output in flight from a warpgroup to memory.
        take_turns: Whether the warpgroups take tiles in turns; else they share each by its rows.
        group_m: Tiles follow one another down a group of this many rows of tiles, which keeps the
            operands of the tiles in flight in the L2 cache.
        cluster: Blocks that share a's tiles, 1 or 2.
        num_programs: Programs at most. The default is the number of multiprocessors of an H100 or
            H200 (SXM).
    """

    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 64
    num_stages: int = 4
    num_slots: int = 2
    take_turns: bool = True
    group_m: int = 16
    cluster: int = 1
    num_programs: int = 132

    @property
    def warpgroup_rows(self) -> int:
        """Rows of a tile that one warpgroup multiplies."""
        return self.tile_m if self.take_turns else self.tile_m // WARPGROUPS

    def fits(self, m: int, n: int, k: int) -> bool:
        """Whether the tiles divide the shapes and fit in registers and shared memory."""
        if m % self.tile_m or n % (self.tile_n * self.cluster) or k % self.tile_k:
            return False
        if self.warpgroup_rows * self.tile_n > 128 * 128:  # accumulators
            return False
        ring = self.num_stages * (self.tile_m + self.tile_n) * self.tile_k
        output = WARPGROUPS * self.num_slots * self.warpgroup_rows * COLUMNS
        return 2 * (ring + output) <= SMEM_BYTES


class Statics(NamedTuple):
    """What a launch knows when it is traced; `interpret` as in `plgpu.kernel`."""

    epilogue: Epilogue
    config: Config
    num_rows: int  # of a that count: those behind are padding
    interpret: Any


def _kernel(
    a_gmem, b_gmem, bias_gmem, rows_gmem, x_gmem, out_gmem=None,
    *, a_smem, b_smem, out_smem, bias_smem, rows_smem, full, empty, turn, vectors_ready,
    statics: Statics,
):  # fmt: skip
    out_gmem = x_gmem if out_gmem is None else out_gmem
    epilogue, config, num_rows, interpret = statics
    tile_m, tile_n, tile_k = config.tile_m, config.tile_n, config.tile_k
    num_stages, cluster = config.num_stages, config.cluster
    num_m, num_n = -(-num_rows // tile_m), b_gmem.shape[1] // (tile_n * cluster)
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
        plgpu.set_max_registers(232, action="increase")
        wg_rows = config.warpgroup_rows
        first_wg_row = 0 if config.take_turns else wg * wg_rows

        def load_vectors(row, column):
            ready = vectors_ready.at[wg]
            if epilogue != "none":
                own_bias = bias_gmem.at[pl.ds(column, tile_n)]
                plgpu.copy_gmem_to_smem(own_bias, bias_smem.at[wg], ready)
            if rows_gmem is not None:
                own_rows = rows_gmem.at[pl.ds(row + first_wg_row, wg_rows)]
                plgpu.copy_gmem_to_smem(own_rows, rows_smem.at[wg], ready)

        def multiply(count):
            first_step = count * num_steps

            def product(acc_ref, step):
                slot = lax.rem(step, num_stages)
                plgpu.barrier_wait(full.at[barrier(step)])
                own_a = a_smem.at[slot, pl.ds(first_wg_row, wg_rows)]
                plgpu.wgmma(acc_ref, own_a, b_smem.at[slot])

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

            shape = (wg_rows, tile_n)
            acc = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
            plgpu.barrier_arrive(empty.at[barrier(first_step + num_steps - 1)])
            return acc

        def finish(acc, chunk):
            """A chunk of the tile's columns, as it is stored."""
            out = acc[:, chunk * COLUMNS : (chunk + 1) * COLUMNS]
            if epilogue != "none":
                own_bias = bias_smem.at[wg, pl.ds(chunk * COLUMNS, COLUMNS)]
                by_column = plgpu.Layout.WGMMA.reduce(0)
                # pyright reads jax 0.10, where an index had to be given.
                bias = plgpu.load(own_bias, layout=by_column, optimized=False)  # pyright: ignore
                out = out + lax.broadcast_in_dim(bias.astype(jnp.float32), out.shape, [1])
            if epilogue == "gelu":
                out = gelu(out)
            return out.astype(out_smem.dtype)

        def store(slot, row, columns):
            target = out_gmem.at[pl.ds(row, wg_rows), columns]
            if epilogue == "add" and interpret:  # has no reduction
                target[...] = target[...] + out_smem[wg, slot]
                return
            reduction = "add" if epilogue == "add" else None
            plgpu.copy_smem_to_gmem(out_smem.at[wg, slot], target, reduction_op=reduction)

        def scatter(slot, row, columns):
            plain = out_smem
            if not interpret:  # has no reshaped references
                # A tile is as wide as its array, so its rows lie behind each other like plain rows.
                unswizzle, _ = out_smem.transforms
                plain = dataclasses.replace(out_smem, transforms=(unswizzle,))
                plain = plain.reshape(*out_smem.shape)

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

            acc = multiply(count)
            if epilogue != "none":
                plgpu.barrier_wait(vectors_ready.at[wg])
            for chunk in range(tile_n // COLUMNS):
                slot = chunk % config.num_slots
                plgpu.wait_smem_to_gmem(config.num_slots - 1, wait_read_only=True)
                out_smem[wg, slot] = finish(acc, chunk)
                plgpu.commit_smem()
                columns = pl.ds(column + chunk * COLUMNS, COLUMNS)
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
        plgpu.set_max_registers(40, action="decrease")
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
                b_tile = b_gmem.at[depth, pl.ds(column, tile_n)]
                plgpu.copy_gmem_to_smem(b_tile, b_smem.at[slot], ready)

        # Every completion is seen, also the last: a block must outlive its neighbour's arrivals.
        total = num_own_tiles * num_steps

        @pl.loop(jnp.maximum(total - num_stages, 0), total)
        def _finish(step):
            plgpu.barrier_wait(empty.at[barrier(step)])


def launch(
    statics: Statics,
    a: Array,
    b: Array,
    bias: Array,
    *,
    rows: Array | None = None,
    x: Array | None = None,
) -> Array:
    """Run the kernel.

    Args:
        statics: What is known when the launch is traced.
        a: Left operand [M, K], 16-bit floats, M a multiple of the tile.
        b: Right operand [K, N], a's dtype.
        bias: [N], float32 or a's dtype.
        rows: For "add", rows of x, int32 [M]; None is row m for row m of a.
        x: For "add", what is added to, [any, N], 16-bit floats.

    Returns:
        The product's output [M, N], or for "add" x after it, in x's place if XLA can spare x.
    """
    epilogue, config, num_rows, interpret = statics
    num_stages, cluster, wg_rows = config.num_stages, config.cluster, config.warpgroup_rows
    tile_m, tile_n, tile_k = config.tile_m, config.tile_n, config.tile_k
    (m, k), n = a.shape, b.shape[1]
    if not config.fits(m, n, k):
        raise ValueError(f"config must fit the product of {a.shape} and {b.shape}, got {config}")

    def buffer(*shape: int, dtype: Any = a.dtype) -> Any:
        tiling = plgpu.TilingTransform((8, COLUMNS))  # pyright: ignore[reportAbstractUsage]
        transforms = (tiling, plgpu.SwizzleTransform(2 * COLUMNS))  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    num_barriers = num_stages * (WARPGROUPS if config.take_turns else 1)
    num_readers = 1 if config.take_turns else WARPGROUPS
    if cluster > 1:
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_barriers=num_barriers, num_arrivals=num_readers
        )
    else:
        empty = plgpu.Barrier(num_barriers=num_barriers, num_arrivals=num_readers)
    out_dtype, x_ref = (a.dtype, None) if x is None else (x.dtype, jax.new_ref(x))
    num_tiles = -(-num_rows // tile_m) * (n // (tile_n * cluster))
    kernel = plgpu.kernel(
        functools.partial(_kernel, statics=statics),
        out_type=jax.ShapeDtypeStruct((m, n), out_dtype) if x_ref is None else (),
        scratch_types=dict(
            a_smem=buffer(num_stages, tile_m, tile_k),
            b_smem=buffer(num_stages, tile_k, tile_n),
            out_smem=buffer(WARPGROUPS, config.num_slots, wg_rows, COLUMNS, dtype=out_dtype),
            bias_smem=plgpu.SMEM((WARPGROUPS, tile_n), bias.dtype),
            rows_smem=plgpu.SMEM((WARPGROUPS, wg_rows), jnp.int32),
            full=plgpu.Barrier(num_barriers=num_barriers, num_arrivals=2),
            empty=empty,
            turn=plgpu.Barrier(num_barriers=WARPGROUPS),
            vectors_ready=plgpu.Barrier(
                num_barriers=WARPGROUPS, num_arrivals=1 + (rows is not None)
            ),
        ),
        grid=(min(config.num_programs // cluster, num_tiles),),
        grid_names=("program",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name=f"matmul_{epilogue}",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    out = kernel(a, b, bias, rows, x_ref)
    return out if x_ref is None else jax.freeze(x_ref)
