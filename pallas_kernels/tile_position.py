"""The query side of the position bias for tiles of a global map, as one Mosaic GPU kernel.

What `stripe_kernel` reads for tiles (`tiles.Tiling`): for the tile's tokens t at row y, column x,

    rel_h[tile, i, t] = sqrt(D) q[t] . rel_pos_h[y, i]  (float32)
    rel_w[tile, t, j] = sqrt(D) q[t] . rel_pos_w[x, j]  (in chunks of 16 key columns)

with key rows i and key columns j sorted by parity. See `relative_position`, whose scheme gives
rel_w. A row of the tile is 8 tokens, as few as a product of the tensor core has columns: that gives
rel_h, transposed. The tables of the tile's rows and columns fill most of shared memory, so that two
warpgroups share them, each with (image, head) pairs of its own.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.boxes import SMEM_BYTES, as_box, buffer, map_boxes, split_head_dim
from pallas_kernels.implementation import no_gradient
from pallas_kernels.relative_position import own_columns
from pallas_kernels.tiles import BLOCK, CHUNK, SIDE, Tiling, chosen_images, div_rem

WARPGROUPS = 2
NUM_STAGES = 2  # tiles of q in shared memory at a time, for each warpgroup
NUM_PROGRAMS = 132  # one for each multiprocessor of an H100 or H200 (SXM)


class Statics(NamedTuple):
    """What a launch knows when it is traced; `interpret` as in `plgpu.kernel`."""

    tiling: Tiling
    num_heads: int
    num_images: int
    num_programs: int
    interpret: Any


def supports_tiles(grid: tuple[int, int], head_dim: int) -> bool:
    """Whether the kernel takes a map of this grid: 64 key rows, which is a product's height."""
    height, width = grid[0], -(-grid[1] // CHUNK) * CHUNK
    tables = SIDE * (height + width) * head_dim
    tokens = WARPGROUPS * BLOCK * (NUM_STAGES * head_dim + width)
    return height == BLOCK and 2 * (tables + tokens) <= SMEM_BYTES


def _kernel(
    first_gmem, qkv_gmem, tables_gmem, rel_h_gmem, rel_w_gmem,
    q_smem, by_row_smem, by_col_smem, out_smem, q_full, tables_full, statics,
):  # fmt: skip
    tiling, num_heads, num_images, _, interpret = statics
    first_image = 0 if first_gmem is None else first_gmem[0]
    head_dim = qkv_gmem.shape[-1]
    chunks = split_head_dim(head_dim)
    spans = [pl.ds(sum(chunks[:c]), chunk) for c, chunk in enumerate(chunks)]
    key_rows, key_chunks = tables_gmem[0].shape[2], by_col_smem[0].shape[0]
    place, wg = (lax.axis_index("row"), lax.axis_index("col")), lax.axis_index("wg")
    tile = place[0] * lax.axis_size("col") + place[1]
    first, workers = lax.axis_index("split") * WARPGROUPS + wg, lax.axis_size("split") * WARPGROUPS
    steps = lax.div(num_images * num_heads - 1 - first + workers, workers)

    def slot_of(step: Any) -> Any:
        return wg * NUM_STAGES + lax.rem(step, NUM_STAGES)

    def load(step: Any) -> None:
        image, head = div_rem(first + step * workers, num_heads)
        row, row_parity, col, col_parity = tiling.corner(tile)
        row += (first_image + image) * tiling.rows
        head += col_parity * (qkv_gmem.shape[3] // tiling.stride)
        slot = slot_of(step)
        for smem, span in zip(q_smem, spans, strict=True):
            columns = (row_parity, pl.ds(col, SIDE), head, span)
            if interpret:  # has no reshaped references
                for r in range(SIDE):
                    target = smem.at[slot, pl.ds(r * SIDE, SIDE)]
                    plgpu.copy_gmem_to_smem(qkv_gmem.at[row + r, *columns], target, q_full.at[slot])
            else:
                target = as_box(smem, (slot, pl.ds(0, BLOCK)), (SIDE, SIDE))
                source = qkv_gmem.at[pl.ds(row, SIDE), *columns]
                plgpu.copy_gmem_to_smem(source, target, q_full.at[slot])

    def load_tables() -> None:
        corners = (place[0] * SIDE, place[1] * SIDE)
        boxes = []
        for by_row, by_col, span in zip(by_row_smem, by_col_smem, spans, strict=True):
            for y in range(SIDE):
                box = ((0, corners[0] + y, 0), (span,), y, (1, key_rows, interpret))
                boxes.extend(map_boxes(tables_gmem[0], by_row, *box))
            for c in range(key_chunks):
                box = ((0, corners[1], c * CHUNK), (span,), c, (SIDE, CHUNK, interpret))
                boxes.extend(map_boxes(tables_gmem[1], by_col, *box))
        for source, target in boxes:
            plgpu.copy_gmem_to_smem(source, target, tables_full)

    def multiply_rows(slot: Any) -> Any:
        """Every row's 8 tokens with its table, [key rows, 64]."""

        def products(*acc_refs: Any) -> Any:
            for y, acc_ref in enumerate(acc_refs):
                for q, table in zip(q_smem, by_row_smem, strict=True):
                    tokens = q.at[slot, pl.ds(y * SIDE, SIDE)]
                    plgpu.wgmma(acc_ref, table.at[y], tokens.transpose((1, 0)))
            return jnp.concatenate([acc_ref[...] for acc_ref in acc_refs], axis=1)

        accs = [plgpu.WGMMAAccumulatorRef((key_rows, SIDE), jnp.float32)] * SIDE
        return pl.run_scoped(products, *accs)

    def multiply_columns(slot: Any, c: int) -> Any:
        """Every token with a chunk of all 8 tables, [64, 8 * 16]."""

        def products(acc_ref: Any) -> Any:
            for q, table in zip(q_smem, by_col_smem, strict=True):
                plgpu.wgmma(acc_ref, q.at[slot], table.at[c].transpose((1, 0)))
            return acc_ref[...]

        acc = plgpu.WGMMAAccumulatorRef((BLOCK, SIDE * CHUNK), jnp.float32)
        return pl.run_scoped(products, acc)

    pl.when(wg == 0)(load_tables)
    pl.loop(0, jnp.minimum(steps, NUM_STAGES))(load)
    plgpu.barrier_wait(tables_full)
    token = plgpu.broadcasted_iota(jnp.int32, (BLOCK, CHUNK), 0, layout=plgpu.Layout.WGMMA)
    column = div_rem(token, SIDE)[1]
    root = math.sqrt(head_dim)

    @pl.loop(0, steps)
    def _(step: Any) -> None:
        slot = slot_of(step)
        own = (first + step * workers) * tiling.num_tiles + tile
        plgpu.barrier_wait(q_full.at[slot])
        rel_h_gmem[own] = multiply_rows(slot) * root
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for c in range(key_chunks):
            rel_w = own_columns(multiply_columns(slot, c), column) * root
            out_smem[wg, c * BLOCK : (c + 1) * BLOCK] = rel_w.astype(out_smem.dtype)
        plgpu.commit_smem()  # all threads are through with q too
        plgpu.copy_smem_to_gmem(out_smem.at[wg], rel_w_gmem.at[own])
        pl.when(step + NUM_STAGES < steps)(lambda: load(step + NUM_STAGES))

    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _launch(
    statics: Statics, first: Array | None, qkv: Array, tables: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Run the kernel.

    Args:
        statics: What is known when the launch is traced.
        first: The first of its images, int32 [1]; None is the batch's.
        qkv: [B, Gh, Gw, 3 H, D] as `Tiling.view` sees it, 16-bit floats: q of all heads first.
        tables: rel_pos_h and rel_pos_w, all sorted by parity, [1, Gh, key rows, D] and
            [1, Gw, key columns, D]: maps to copy boxes of.

    Returns:
        rel_h [images H tiles, key rows, 64] and rel_w [images H tiles, key columns / 16 * 64, 16].
    """
    tiling, num_heads, num_images, num_programs, interpret = statics
    head_dim, (by_row, by_col) = qkv.shape[-1], tables
    chunks, copies = split_head_dim(head_dim), SIDE if interpret else 1  # that a box takes
    key_rows, key_chunks = by_row.shape[2], by_col.shape[2] // CHUNK
    grid = (tiling.rows * tiling.stride // SIDE, tiling.cols * tiling.stride // SIDE)
    items = num_images * num_heads
    num_splits = max(min(-(-items // WARPGROUPS), num_programs // tiling.num_tiles), 1)
    tiles = items * tiling.num_tiles
    kernel = plgpu.kernel(
        functools.partial(_kernel, statics=statics),
        out_type=(
            jax.ShapeDtypeStruct((tiles, key_rows, BLOCK), jnp.float32),
            jax.ShapeDtypeStruct((tiles, key_chunks * BLOCK, CHUNK), qkv.dtype),
        ),
        scratch_types=dict(
            q_smem=[buffer(qkv.dtype, WARPGROUPS * NUM_STAGES, BLOCK, chunk) for chunk in chunks],
            by_row_smem=[buffer(qkv.dtype, SIDE, key_rows, chunk) for chunk in chunks],
            by_col_smem=[buffer(qkv.dtype, key_chunks, SIDE * CHUNK, chunk) for chunk in chunks],
            out_smem=buffer(qkv.dtype, WARPGROUPS, key_chunks * BLOCK, CHUNK),
            q_full=plgpu.Barrier(
                num_barriers=WARPGROUPS * NUM_STAGES, num_arrivals=len(chunks) * copies
            ),
            tables_full=plgpu.Barrier(num_arrivals=len(chunks) * (SIDE + key_chunks * copies)),
        ),
        grid=(*grid, num_splits),
        grid_names=("row", "col", "split"),
        num_threads=WARPGROUPS,
        thread_name="wg",
        kernel_name="tile_position",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(first, qkv, tables)


_launch.defjvp(no_gradient("stripe_attention"))


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
launch = jax.jit(_launch, static_argnums=0)


def tile_position(
    qkv: Float[Array, "Brows stride cols strideH D"],
    rel_pos_h: Float[Array, "Gh Sh D"],
    rel_pos_w: Float[Array, "Gw Sw D"],
    *,
    tiling: Tiling,
    num_heads: int,
    images: range | None = None,
    num_programs: int = NUM_PROGRAMS,
    interpret: Any = False,
) -> tuple[Float[Array, "tiles Sh 64"], Float[Array, "tiles chunks 64 16"]]:
    """The position bias of every tile, for what `supports_tiles` takes.

    Args:
        qkv: Queries, keys and values as the tiling views them; only the queries are read.
        rel_pos_h: What every row adds for every key row, both sorted by parity, dtype of qkv.
        rel_pos_w: The same for columns, the key columns padded to whole chunks of 16.
        tiling: Which tokens make a tile.
        num_heads: Heads H.
        images: Those of the batch whose bias is asked for; None is all.
        num_programs: Programs at most, or one for each tile of the map where there are more tiles.
        interpret: For tests: parameters of Mosaic GPU's interpret mode.

    Returns:
        rel_h, float32, and rel_w, rounded once to qkv's dtype.
    """
    images, first = chosen_images(images, len(qkv) // tiling.rows)
    statics = Statics(tiling, num_heads, len(images), num_programs, interpret)
    rel_h, rel_w = launch(statics, first, qkv, (rel_pos_h[None], rel_pos_w[None]))
    return rel_h, rel_w.reshape(len(rel_w), -1, BLOCK, CHUNK)
