"""The query side of the position bias as one Mosaic GPU kernel, for the attention kernels.

    rel_h[b, y, x, h, i] = sqrt(D) q[b, y, x, h] . rel_pos_h[y, i]
    rel_w[b, y, x, h, j] = sqrt(D) q[b, y, x, h] . rel_pos_w[x, j]

in the units of q . k, which the softmax scales. The same as `reference.relative_position` (MViTv2,
arXiv 2112.01526, Eq. 4) times sqrt(D), which XLA runs as one product a row and one a column of the
map, with q and the result transposed around each.

Designed to be bound by bandwidth: a program reads a tile of 8 x 8 tokens of one head after the
other and writes 16 numbers a token and axis, while the tables of the tile's 8 rows and 8 columns
stay in shared memory. A product of the tensor core takes 64 tokens at least, so that it takes all 8
tables, and each token keeps the 16 columns that its own table gave.
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

from pallas_kernels.boxes import buffer, map_boxes, split_head_dim
from pallas_kernels.implementation import no_gradient
from pallas_kernels.tiles import BLOCK, CHUNK, SIDE, div_rem

NUM_STAGES = 4  # tiles of q in shared memory at a time
NUM_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200 (SXM)


class Statics(NamedTuple):
    """What a launch knows when it is traced; `interpret` as in `plgpu.kernel`."""

    num_heads: int
    num_programs: int
    interpret: Any


def supports(grid: tuple[int, int], head_dim: int, dtype: Any) -> bool:
    """Whether the kernel takes a map of this grid, cut into whole tiles, and this q."""
    whole_tiles = all(side % SIDE == 0 for side in grid)
    whole_chunks = head_dim % 16 == 0 and head_dim <= 128
    return whole_tiles and whole_chunks and dtype in (jnp.bfloat16, jnp.float16)


def own_columns(product: Any, place: Any) -> Any:
    """Of each token's product with 8 tables, [64, 8 * 16], that with table `place` [64, 16]."""
    rel = product[:, :CHUNK]
    for i in range(1, SIDE):
        rel = jnp.where(place == i, product[:, i * CHUNK : (i + 1) * CHUNK], rel)
    return rel


def _kernel(
    qkv_gmem, tables_gmem, *out_gmem,
    q_smem, tables_smem, out_smem, q_full, tables_full, statics,
):  # fmt: skip
    num_heads, _, interpret = statics
    batch, head_dim = qkv_gmem.shape[0], qkv_gmem.shape[-1]
    chunks = split_head_dim(head_dim)
    spans = [pl.ds(sum(chunks[:c]), chunk) for c, chunk in enumerate(chunks)]
    tile = (lax.axis_index("row"), lax.axis_index("col"))
    split, num_splits = lax.axis_index("split"), lax.axis_size("split")
    steps = lax.div(batch * num_heads - 1 - split, num_splits) + 1
    shape = (SIDE, SIDE, interpret)

    def item(step: Any) -> tuple[tuple[Any, Any, Any], Any]:
        """The corner of the step's tile in the map, and the head."""
        image, head = div_rem(split + step * num_splits, num_heads)
        return (image, tile[0] * SIDE, tile[1] * SIDE), head

    def load(step: Any) -> None:
        corner, head = item(step)
        slot = lax.rem(step, NUM_STAGES)
        for smem, span in zip(q_smem, spans, strict=True):
            for source, target in map_boxes(qkv_gmem, smem, corner, (head, span), slot, shape):
                plgpu.copy_gmem_to_smem(source, target, q_full.at[slot])

    def store(step: Any) -> None:
        corner, head = item(step)
        columns, slot = (head, pl.ds(0, CHUNK)), lax.rem(step, 2)
        for gmem, smem in zip(out_gmem, out_smem, strict=True):
            for target, source in map_boxes(gmem, smem, corner, columns, slot, shape):
                plgpu.copy_smem_to_gmem(source, target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    def multiply(slot: Any) -> list[Any]:
        """Every token's product with all 8 tables of each axis, [64, 8 * 16]."""

        def products(*acc_refs: Any) -> list[Any]:
            for axis, acc_ref in enumerate(acc_refs):
                for q, tables in zip(q_smem, tables_smem, strict=True):
                    plgpu.wgmma(acc_ref, q.at[slot], tables.at[axis].transpose((1, 0)))
            return [acc_ref[...] for acc_ref in acc_refs]

        acc = plgpu.WGMMAAccumulatorRef((BLOCK, SIDE * CHUNK), jnp.float32)
        return pl.run_scoped(products, acc, acc)

    for axis, gmem in enumerate(tables_gmem):
        corner, box = (0, tile[axis] * SIDE, 0), (SIDE, CHUNK, interpret)
        for smem, span in zip(tables_smem, spans, strict=True):
            for source, target in map_boxes(gmem, smem, corner, (span,), axis, box):
                plgpu.copy_gmem_to_smem(source, target, tables_full)
    pl.loop(0, jnp.minimum(steps, NUM_STAGES))(load)
    plgpu.barrier_wait(tables_full)
    token = plgpu.broadcasted_iota(jnp.int32, (BLOCK, CHUNK), 0, layout=plgpu.Layout.WGMMA)
    places = div_rem(token, SIDE)

    @pl.loop(0, steps)
    def _(step: Any) -> None:
        slot = lax.rem(step, NUM_STAGES)
        plgpu.barrier_wait(q_full.at[slot])
        rel = [own_columns(*pair) for pair in zip(multiply(slot), places, strict=True)]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        for x, smem in zip(rel, out_smem, strict=True):
            smem[lax.rem(step, 2)] = (x * math.sqrt(head_dim)).astype(smem.dtype)
        plgpu.commit_smem()  # all threads are through with q too
        pl.when(step + NUM_STAGES < steps)(lambda: load(step + NUM_STAGES))
        store(step)

    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _launch(statics: Statics, qkv: Array, tables: tuple[Array, Array]) -> tuple[Array, Array]:
    """Run the kernel.

    Args:
        statics: What is known when the launch is traced.
        qkv: [B, Gh, Gw, 3 H, D], 16-bit floats: q of all heads, then others.
        tables: rel_pos_h and rel_pos_w, [1, Gh, 16, D] and [1, Gw, 16, D]: maps to copy boxes of.

    Returns:
        rel_h and rel_w, [B, Gh, Gw, H, 16].
    """
    num_heads, num_programs, interpret = statics
    batch, height, width, _, head_dim = qkv.shape
    chunks, grid = split_head_dim(head_dim), (height // SIDE, width // SIDE)
    num_splits = min(batch * num_heads, max(num_programs // (grid[0] * grid[1]), 1))
    out_type = jax.ShapeDtypeStruct((batch, height, width, num_heads, CHUNK), qkv.dtype)
    copies = SIDE if interpret else 1  # that a box takes
    kernel = plgpu.kernel(
        functools.partial(_kernel, statics=statics),
        out_type=(out_type, out_type),
        scratch_types=dict(
            q_smem=[buffer(qkv.dtype, NUM_STAGES, BLOCK, chunk) for chunk in chunks],
            tables_smem=[buffer(qkv.dtype, 2, SIDE * CHUNK, chunk) for chunk in chunks],
            out_smem=[buffer(qkv.dtype, 2, BLOCK, CHUNK) for _ in tables],
            q_full=plgpu.Barrier(num_barriers=NUM_STAGES, num_arrivals=len(chunks) * copies),
            tables_full=plgpu.Barrier(num_arrivals=2 * len(chunks) * copies),
        ),
        grid=(*grid, num_splits),
        grid_names=("row", "col", "split"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="relative_position",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(qkv, tables)


_launch.defjvp(no_gradient("window_attention"))


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
launch = jax.jit(_launch, static_argnums=0)


def relative_position(
    qkv: Float[Array, "B Gh Gw 3 H D"],
    rel_pos_h: Float[Array, "Gh 16 D"],
    rel_pos_w: Float[Array, "Gw 16 D"],
    *,
    num_programs: int = NUM_PROGRAMS,
    interpret: Any = False,
) -> tuple[Float[Array, "B Gh Gw H 16"], Float[Array, "B Gh Gw H 16"]]:
    """`sqrt(D) q . rel_pos_h[y, i]` and `sqrt(D) q . rel_pos_w[x, j]`, for what `supports` takes.

    Args:
        qkv: Queries, keys and values in raster order; only the queries are read.
        rel_pos_h: What every row of the map adds for every key row, padded to 16, dtype of qkv.
        rel_pos_w: The same for columns.
        num_programs: Programs at most, or one for each tile of the map where there are more tiles.
        interpret: For tests: parameters of Mosaic GPU's interpret mode.

    Returns:
        rel_h and rel_w, accumulated and scaled in float32 and rounded once to qkv's dtype.
    """
    batch, height, width, _, heads, head_dim = qkv.shape
    flat = qkv.reshape(batch, height, width, 3 * heads, head_dim)
    return launch(Statics(heads, num_programs, interpret), flat, (rel_pos_h[None], rel_pos_w[None]))
