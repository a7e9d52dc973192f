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
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.boxes import (
    as_box,
    launch_over_map,
    map_boxes,
    spans_of,
    split_head_dim,
)
from pallas_kernels.hopper import MULTIPROCESSORS
from pallas_kernels.implementation import undifferentiable
from pallas_kernels.relative_position import own_columns
from pallas_kernels.tiles import BLOCK, CHUNK, SIDE, Tiling, chosen_images, div_rem

WARPGROUPS = 2
NUM_STAGES = 2  # tiles of q in shared memory at a time, for each warpgroup


class Statics(NamedTuple):
    """What a launch knows when it is traced; `interpret` as in `plgpu.kernel`."""

    tiling: Tiling
    num_heads: int
    num_images: int
    num_programs: int
    interpret: Any

    @property
    def num_items(self) -> int:
        """Heads of all images, of which a warpgroup takes one at a time."""
        return self.num_images * self.num_heads


def scratch_types(
    head_dim: int,
    num_keys: tuple[int, int],
    dtype: DTypeLike,
    *,
    interpret: Any = False,
) -> dict[str, Any]:
    """Shared memory and barriers of a program."""
    parts, copies = split_head_dim(head_dim, dtype), SIDE if interpret else 1  # that a box takes
    key_rows, key_chunks = num_keys[0], num_keys[1] // CHUNK
    num_tiles = WARPGROUPS * NUM_STAGES
    return dict(
        q_smem=[hopper.buffer(dtype, num_tiles, BLOCK, part) for part in parts],
        by_row_smem=[hopper.buffer(dtype, SIDE, key_rows, part) for part in parts],
        by_col_smem=[hopper.buffer(dtype, key_chunks, SIDE * CHUNK, part) for part in parts],
        out_smem=hopper.buffer(dtype, WARPGROUPS, key_chunks * BLOCK, CHUNK),
        q_full=plgpu.Barrier(num_barriers=num_tiles, num_arrivals=len(parts) * copies),
        tables_full=plgpu.Barrier(num_arrivals=len(parts) * (SIDE + key_chunks * copies)),
    )


def supports_tiles(grid: tuple[int, int], head_dim: int, dtype: DTypeLike = jnp.bfloat16) -> bool:
    """Whether the kernel takes a map of this grid: 64 key rows, which is a product's height."""
    num_keys = grid[0], -(-grid[1] // CHUNK) * CHUNK
    if num_keys[0] != hopper.WGMMA_ROWS:
        return False
    scratch = scratch_types(head_dim, num_keys, dtype)
    return hopper.smem_bytes(scratch, reduces=False) <= hopper.smem_limit()


def _kernel(
    first_gmem, qkv_gmem, tables_gmem, rel_h_gmem, rel_w_gmem,
    q_smem, by_row_smem, by_col_smem, out_smem, q_full, tables_full, statics,
):  # fmt: skip
    tiling, num_heads, interpret = statics.tiling, statics.num_heads, statics.interpret
    first_image = 0 if first_gmem is None else first_gmem[0]
    head_dim = qkv_gmem.shape[-1]
    spans = spans_of(split_head_dim(head_dim, qkv_gmem.dtype))
    key_rows, key_chunks = tables_gmem[0].shape[2], by_col_smem[0].shape[0]
    place, wg = (lax.axis_index("row"), lax.axis_index("col")), lax.axis_index("wg")
    tile = place[0] * lax.axis_size("col") + place[1]
    first, workers = lax.axis_index("split") * WARPGROUPS + wg, lax.axis_size("split") * WARPGROUPS
    steps = lax.div(statics.num_items - 1 - first + workers, workers)

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

        accs = [hopper.accumulator(qkv_gmem.dtype, key_rows, SIDE)] * SIDE
        return pl.run_scoped(products, *accs)

    def multiply_columns(slot: Any, c: int) -> Any:
        """Every token with a chunk of all 8 tables, [64, 8 * 16]."""

        def products(acc_ref: Any) -> Any:
            for q, table in zip(q_smem, by_col_smem, strict=True):
                plgpu.wgmma(acc_ref, q.at[slot], table.at[c].transpose((1, 0)))
            return acc_ref[...]

        acc = hopper.accumulator(qkv_gmem.dtype, BLOCK, SIDE * CHUNK)
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


def prepare(
    qkv: Float[Array, "B Gh Gw 3 H D"],
    rel_pos_h: Float[Array, "Gh Sh D"],
    rel_pos_w: Float[Array, "Gw Sw D"],
    *,
    tiling: Tiling,
    images: range | None = None,
    num_programs: int = MULTIPROCESSORS,
    interpret: Any = False,
) -> tuple[Statics, tuple[Any, Array, tuple[Array, Array]]]:
    """What `launch` takes, for arguments of `tile_position` that `supports_tiles` takes."""
    batch, height, width, _, heads, head_dim = qkv.shape
    by_row, by_col = rel_pos_h[tiling.by_parity(height)], rel_pos_w[tiling.by_parity(width)]
    view = tiling.view(qkv.reshape(batch, height, width, 3 * heads, head_dim))
    images, first = chosen_images(images, batch)
    statics = Statics(tiling, heads, len(images), num_programs, interpret)
    return statics, (first, view, (by_row[None], by_col[None]))


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def launch(
    statics: Statics, first: Array | None, qkv: Array, tables: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Run the kernel on what `prepare` gives.

    Args:
        statics: What is known when the launch is traced.
        first: The first of its images, int32 [1]; None is the batch's.
        qkv: [B, Gh, Gw, 3 H, D] as `Tiling.view` sees it, 16-bit floats: q of all heads first.
        tables: rel_pos_h and rel_pos_w, all sorted by parity, [1, Gh, key rows, D] and
            [1, Gw, key columns, D]: maps to copy boxes of.

    Returns:
        rel_h [images H tiles, key rows, 64], float32, and rel_w [images H tiles, key columns / 16,
        64, 16], rounded once to qkv's dtype.
    """
    qkv, tables = undifferentiable("stripe_attention", (qkv, tables))
    tiling, interpret = statics.tiling, statics.interpret
    by_row, by_col = tables
    key_rows, key_chunks = by_row.shape[2], by_col.shape[2] // CHUNK
    num_tiles = statics.num_items * tiling.num_tiles
    rel_h, rel_w = launch_over_map(
        functools.partial(_kernel, statics=statics),
        (first, qkv, tables),
        tiles=(tiling.rows * tiling.stride // SIDE, tiling.cols * tiling.stride // SIDE),
        num_items=-(-statics.num_items // WARPGROUPS),
        num_programs=statics.num_programs,
        name="tile_position",
        interpret=interpret,
        out_type=(
            jax.ShapeDtypeStruct((num_tiles, key_rows, BLOCK), jnp.float32),
            jax.ShapeDtypeStruct((num_tiles, key_chunks * BLOCK, CHUNK), qkv.dtype),
        ),
        scratch_types=scratch_types(
            qkv.shape[-1], (key_rows, by_col.shape[2]), qkv.dtype, interpret=interpret
        ),
        num_threads=WARPGROUPS,
        thread_name="wg",
    )
    return rel_h, rel_w.reshape(num_tiles, key_chunks, BLOCK, CHUNK)


def xla_tile_position(
    qkv: Float[Array, "B Gh Gw 3 H D"],
    rel_pos_h: Float[Array, "Gh Sh D"],
    rel_pos_w: Float[Array, "Gw Sw D"],
    *,
    tiling: Tiling,
    images: range | None = None,
) -> tuple[Float[Array, "tiles Sh 64"], Float[Array, "tiles chunks 64 16"]]:
    """What `tile_position` computes, as plain XLA and for any grid."""
    batch, height, _, _, heads, head_dim = qkv.shape
    images = images or range(batch)
    stride, tile_rows, tile_cols = tiling.stride, tiling.rows // SIDE, tiling.cols // SIDE
    q = qkv[images.start : images.stop, :, :, 0]
    q = q.reshape(len(q), tile_rows, SIDE, stride, tile_cols, SIDE, stride, heads, head_dim)
    by_row = rel_pos_h.reshape(tile_rows, SIDE, stride, height, head_dim)
    by_col = rel_pos_w.reshape(tile_cols, SIDE, stride, -1, CHUNK, head_dim)
    # r, c: tile; p, w: parity of its rows and columns; y, x: token in it; i: key row; k, j: chunk
    # of key columns and column in it.
    options = {"preferred_element_type": jnp.float32}
    rel_h = jnp.einsum("brypcxwhd,rypid->bhprwciyx", q, by_row, **options)
    rel_w = jnp.einsum("brypcxwhd,cxwkjd->bhprwckyxj", q, by_col, **options)
    root = math.sqrt(head_dim)  # in the units of q . k, which the softmax scales
    rel_h = (rel_h * root).reshape(-1, height, BLOCK)
    rel_w = (rel_w * root).astype(qkv.dtype).reshape(-1, by_col.shape[3], BLOCK, CHUNK)
    return rel_h, rel_w


def tile_position(
    qkv: Float[Array, "B Gh Gw 3 H D"],
    rel_pos_h: Float[Array, "Gh Sh D"],
    rel_pos_w: Float[Array, "Gw Sw D"],
    *,
    tiling: Tiling,
    images: range | None = None,
    num_programs: int = MULTIPROCESSORS,
    interpret: Any = False,
) -> tuple[Float[Array, "tiles Sh 64"], Float[Array, "tiles chunks 64 16"]]:
    """The position bias of every tile, as a kernel.

    Where `supports_tiles` says that the kernel does not fit, XLA runs it.

    Args:
        qkv: Queries, keys and values in raster order; only the queries are read.
        rel_pos_h: What every row of the map adds for every key row, dtype of qkv. Key rows are
            sorted by parity (`Tiling.by_parity`).
        rel_pos_w: The same for columns, the key columns padded to whole chunks of 16.
        tiling: Which tokens make a tile.
        images: Those of the batch whose bias is asked for; None is all.
        num_programs: Programs at most, or one for each tile of the map where there are more tiles.
        interpret: For tests: parameters of Mosaic GPU's interpret mode.

    Returns:
        rel_h, float32, and rel_w, rounded once to qkv's dtype.
    """
    _, height, width, _, _, head_dim = qkv.shape
    if not supports_tiles((height, width), head_dim, qkv.dtype):
        return xla_tile_position(qkv, rel_pos_h, rel_pos_w, tiling=tiling, images=images)
    options = dict(num_programs=num_programs, interpret=interpret)
    statics, operands = prepare(qkv, rel_pos_h, rel_pos_w, tiling=tiling, images=images, **options)
    return launch(statics, *operands)
