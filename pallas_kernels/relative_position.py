"""The query side of the position bias as one Mosaic GPU kernel, for the attention kernels.

    rel_h[b, y, x, h, i] = sqrt(D) q[b, y, x, h] . rel_pos_h[y, i]
    rel_w[b, y, x, h, j] = sqrt(D) q[b, y, x, h] . rel_pos_w[x, j]

in the units of q . k, which the softmax scales, for the key rows i and columns j of a window or of
the whole map. The same as `reference.relative_position` (MViTv2, arXiv 2112.01526, Eq. 4) times
sqrt(D), which XLA runs as one product a row and one a column of the map, with q and the result
transposed around each.

Designed to be bound by bandwidth: a program reads a tile of 4 x 4 tokens of four heads after the
other, while the tables of the tile's 4 rows and 4 columns stay in shared memory. A product of the
tensor core takes 64 queries at least, so that it takes all 4 tables, and each query keeps the
columns that its own table gave. More tokens of fewer heads would need more tables, in shared memory
and in the product; and neighbouring heads are neighbours in memory. Half a multiprocessor's shared
memory holds all this for 64 + 64 keys: two programs share a multiprocessor, and one multiplies
while the other selects and writes. Where the heads are no multiple of four, a tile is 8 x 8 tokens
of one head.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import hopper, reference
from pallas_kernels.boxes import (
    as_box,
    launch_over_map,
    map_boxes,
    spans_of,
    split_head_dim,
)
from pallas_kernels.hopper import KERNEL_DTYPES, MULTIPROCESSORS
from pallas_kernels.implementation import undifferentiable
from pallas_kernels.tiles import BLOCK, CHUNK, chosen_images, div_rem

NUM_PROGRAMS = 2 * MULTIPROCESSORS


class Config(NamedTuple):
    """What fits in registers and shared memory.

    Attributes:
        side: Tokens along a side of a tile.
        width: Key coordinates in a chunk, all of one axis.
        num_chunks: Chunks that are multiplied, and then written, at a time.
        num_stages: Tiles of q in shared memory at a time.
    """

    side: int
    width: int
    num_chunks: int
    num_stages: int

    @property
    def heads(self) -> int:
        """Heads of every token of a tile, which has 64 queries."""
        return BLOCK // self.side**2


class Chunk(NamedTuple):
    """Key coordinates from `first` on of one axis: chunk `number` in shared memory."""

    number: int
    axis: int
    first: int


class Statics(NamedTuple):
    """What a launch knows when it is traced; `interpret` as in `plgpu.kernel`."""

    config: Config
    num_heads: int
    num_images: int
    num_programs: int
    interpret: Any

    @property
    def num_items(self) -> int:
        """Groups of heads of all images, of which a program takes one at a time."""
        return self.num_images * self.num_heads // self.config.heads


def scratch_types(
    config: Config,
    head_dim: int,
    num_keys: tuple[int, int],
    dtype: DTypeLike,
    *,
    interpret: Any = False,
) -> dict[str, Any]:
    """Shared memory and barriers of a program."""
    side, width, num_chunks, num_stages = config
    parts, total = split_head_dim(head_dim, dtype), sum(num_keys) // width
    token_copies, table_copies = (side**2, side) if interpret else (1, 1)  # that a box takes
    return dict(
        q_smem=[hopper.buffer(dtype, num_stages, BLOCK, part) for part in parts],
        tables_smem=[hopper.buffer(dtype, total, side * width, part) for part in parts],
        out_smem=hopper.buffer(dtype, 2 * num_chunks, BLOCK, width),
        q_full=plgpu.Barrier(num_barriers=num_stages, num_arrivals=len(parts) * token_copies),
        tables_full=plgpu.Barrier(num_arrivals=total * len(parts) * table_copies),
    )


def fitting_config(
    heads: int, head_dim: int, num_keys: tuple[int, int], dtype: DTypeLike = jnp.bfloat16
) -> Config | None:
    """The best configuration for this many key rows and columns that fits in shared memory.

    Two programs share a multiprocessor if they can; it is None where not even one fits.
    """
    side = 8 if heads % 4 else 4
    # A product has up to 256 columns, which are 128 registers of every thread.
    for programs, columns, num_stages in itertools.product((2, 1), (256, 128), (4, 3, 2)):
        width = math.gcd(columns // side, *num_keys)
        num_chunks = min(columns // side, sum(num_keys)) // width
        config = Config(side, width, num_chunks, num_stages)
        scratch = scratch_types(config, head_dim, num_keys, dtype)
        if hopper.smem_bytes(scratch, reduces=False) <= hopper.smem_limit(programs):
            return config
    return None


def supports(shape: tuple[int, ...], num_keys: tuple[int, int], dtype: DTypeLike) -> bool:
    """Whether the kernel takes a qkv of this shape and dtype and this many key rows and columns."""
    _, height, width, _, heads, head_dim = shape
    whole_chunks = head_dim % 16 == 0 and head_dim <= 128 and all(n % CHUNK == 0 for n in num_keys)
    if dtype not in KERNEL_DTYPES or not whole_chunks:
        return False
    config = fitting_config(heads, head_dim, num_keys, dtype)
    return config is not None and height % config.side == 0 and width % config.side == 0


def given_tables(rel_pos_h: Array | None, rel_pos_w: Array | None) -> tuple[Array, ...]:
    """The tables of a position bias, or none where there is none.

    Raises:
        ValueError: One is given without the other.
    """
    tables = {"rel_pos_h": rel_pos_h, "rel_pos_w": rel_pos_w}
    given = tuple(x for x in tables.values() if x is not None)
    if len(given) == 1:
        missing, other = sorted(tables, key=lambda name: tables[name] is not None)
        raise ValueError(f"{missing} must be given with {other} or both be None, got None")
    return given


def own_columns(product: Any, place: Any) -> Any:
    """Of each row's product with tables, [64, tables * width], that with `place` [64, width]."""
    width = place.shape[1]
    rel = product[:, :width]
    for i in range(1, product.shape[1] // width):
        rel = jnp.where(place == i, product[:, i * width : (i + 1) * width], rel)
    return rel


def _kernel(
    first_gmem, qkv_gmem, tables_gmem, *out_gmem,
    q_smem, tables_smem, out_smem, q_full, tables_full, statics,
):  # fmt: skip
    config, num_heads, interpret = statics.config, statics.num_heads, statics.interpret
    first_image = 0 if first_gmem is None else first_gmem[0]
    side, width = config.side, config.width
    num_chunks, num_stages = config.num_chunks, config.num_stages
    head_dim = qkv_gmem.shape[-1]
    spans = spans_of(split_head_dim(head_dim, qkv_gmem.dtype))
    tile = (lax.axis_index("row") * side, lax.axis_index("col") * side)
    split, num_splits = lax.axis_index("split"), lax.axis_size("split")
    steps = lax.div(statics.num_items - 1 - split, num_splits) + 1
    firsts = [(axis, i) for axis in range(2) for i in range(0, tables_gmem[axis].shape[2], width)]
    chunks = [Chunk(number, *first) for number, first in enumerate(firsts)]
    turns = [chunks[i : i + num_chunks] for i in range(0, len(chunks), num_chunks)]

    def boxes(
        step: Any, gmem: Any, span: Any, smem: Any, slot: Any, first: Any = 0
    ) -> Iterator[tuple[Any, Any]]:
        """The step's tile of a map beside the rows of `smem` that it fills."""
        image, group = div_rem(split + step * num_splits, num_heads // config.heads)
        image += first
        columns = (pl.ds(group * config.heads, config.heads), span)
        if interpret:  # has no reshaped references
            for token in range(side**2):
                y, x = divmod(token, side)
                source = gmem.at[image, tile[0] + y, tile[1] + x, *columns]
                yield source, smem.at[slot, pl.ds(token * config.heads, config.heads)]
        else:
            box = as_box(smem, (slot, pl.ds(0, BLOCK)), (side, side, config.heads))
            yield gmem.at[image, pl.ds(tile[0], side), pl.ds(tile[1], side), *columns], box

    def load(step: Any) -> None:
        slot = lax.rem(step, num_stages)
        for smem, span in zip(q_smem, spans, strict=True):
            for source, target in boxes(step, qkv_gmem, span, smem, slot, first_image):
                plgpu.copy_gmem_to_smem(source, target, q_full.at[slot])

    def multiply(slot: Any, turn: list[Chunk]) -> list[Any]:
        """Every query's products with chunks of all tables of their axis, [64, side * width]."""

        def products(*acc_refs: Any) -> list[Any]:
            for chunk, acc_ref in zip(turn, acc_refs, strict=True):
                for q, tables in zip(q_smem, tables_smem, strict=True):
                    plgpu.wgmma(acc_ref, q.at[slot], tables.at[chunk.number].transpose((1, 0)))
            return [acc_ref[...] for acc_ref in acc_refs]

        acc = hopper.accumulator(qkv_gmem.dtype, BLOCK, side * width)
        return pl.run_scoped(products, *[acc] * len(turn))

    for number, axis, first in chunks:
        corner, box = (0, tile[axis], first), (side, width, interpret)
        for smem, span in zip(tables_smem, spans, strict=True):
            for source, target in map_boxes(tables_gmem[axis], smem, corner, (span,), number, box):
                plgpu.copy_gmem_to_smem(source, target, tables_full)
    pl.loop(0, jnp.minimum(steps, num_stages))(load)
    plgpu.barrier_wait(tables_full)
    row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, width), 0, layout=plgpu.Layout.WGMMA)
    places = div_rem(div_rem(row, config.heads)[0], side)

    @pl.loop(0, steps)
    def _(step: Any) -> None:
        slot = lax.rem(step, num_stages)
        plgpu.barrier_wait(q_full.at[slot])
        for t, turn in enumerate(turns):
            first_out = lax.rem(step * len(turns) + t, 2) * num_chunks
            products = zip(multiply(slot, turn), turn, strict=True)
            rel = [own_columns(product, places[chunk.axis]) for product, chunk in products]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for i, x in enumerate(rel):
                out_smem[first_out + i] = (x * math.sqrt(head_dim)).astype(out_smem.dtype)
            plgpu.commit_smem()  # all threads are through with q too
            if turn is turns[-1]:
                pl.when(step + num_stages < steps)(lambda: load(step + num_stages))
            for i, (_, axis, first) in enumerate(turn):
                span = pl.ds(first, width)
                for target, source in boxes(step, out_gmem[axis], span, out_smem, first_out + i):
                    plgpu.copy_smem_to_gmem(source, target, commit_group=False)
            plgpu.commit_smem_to_gmem_group()

    plgpu.wait_smem_to_gmem(0)


def prepare(
    qkv: Float[Array, "B Gh Gw 3 H D"],
    rel_pos_h: Float[Array, "Gh Sh D"],
    rel_pos_w: Float[Array, "Gw Sw D"],
    images: range | None = None,
    *,
    num_programs: int = NUM_PROGRAMS,
    interpret: Any = False,
) -> tuple[Statics, tuple[Any, Array, tuple[Array, Array]]]:
    """What `launch` takes, for arguments of `relative_position` that the kernel `supports`."""
    batch, height, width, _, heads, head_dim = qkv.shape
    config = fitting_config(heads, head_dim, (rel_pos_h.shape[1], rel_pos_w.shape[1]), qkv.dtype)
    assert config is not None, "supports checks that a configuration fits"
    flat = qkv.reshape(batch, height, width, 3 * heads, head_dim)
    images, first = chosen_images(images, batch)
    statics = Statics(config, heads, len(images), num_programs, interpret)
    return statics, (first, flat, (rel_pos_h[None], rel_pos_w[None]))


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def launch(
    statics: Statics, first: Array | None, qkv: Array, tables: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Run the kernel on what `prepare` gives.

    Args:
        statics: What is known when the launch is traced.
        first: The first of its images, int32 [1]; None is the batch's.
        qkv: [B, Gh, Gw, 3 H, D], 16-bit floats: q of all heads, then others.
        tables: rel_pos_h and rel_pos_w, [1, Gh, Sh, D] and [1, Gw, Sw, D]: maps to copy boxes of.

    Returns:
        rel_h and rel_w of the launch's images, [images, Gh, Gw, H, Sh] and [images, Gh, Gw, H, Sw].
    """
    qkv, tables = undifferentiable("attention", (qkv, tables))
    side, interpret = statics.config.side, statics.interpret
    _, height, width, _, head_dim = qkv.shape
    by_row, by_col = tables
    num_keys, shape = (by_row.shape[2], by_col.shape[2]), (statics.num_images, height, width)
    return launch_over_map(
        functools.partial(_kernel, statics=statics),
        (first, qkv, tables),
        tiles=(height // side, width // side),
        num_items=statics.num_items,
        num_programs=statics.num_programs,
        name="relative_position",
        interpret=interpret,
        out_type=tuple(
            jax.ShapeDtypeStruct((*shape, statics.num_heads, keys), qkv.dtype) for keys in num_keys
        ),
        scratch_types=scratch_types(
            statics.config, head_dim, num_keys, qkv.dtype, interpret=interpret
        ),
        num_threads=1,
        thread_name="warpgroup",
    )


def xla_relative_position(
    qkv: Float[Array, "B Gh Gw 3 H D"],
    rel_pos_h: Float[Array, "Gh Sh D"],
    rel_pos_w: Float[Array, "Gw Sw D"],
    images: range | None = None,
) -> tuple[Float[Array, "images Gh Gw H Sh"], Float[Array, "images Gh Gw H Sw"]]:
    """What `relative_position` computes, as plain XLA and for any shapes."""
    images = images or range(len(qkv))
    q = qkv[images.start : images.stop, :, :, 0]
    rel_h, rel_w = reference.relative_position(q, rel_pos_h, rel_pos_w)
    root = math.sqrt(qkv.shape[-1])
    return (rel_h * root).astype(qkv.dtype), (rel_w * root).astype(qkv.dtype)


def relative_position(
    qkv: Float[Array, "B Gh Gw 3 H D"],
    rel_pos_h: Float[Array, "Gh Sh D"],
    rel_pos_w: Float[Array, "Gw Sw D"],
    images: range | None = None,
    *,
    num_programs: int = NUM_PROGRAMS,
    interpret: Any = False,
) -> tuple[Float[Array, "images Gh Gw H Sh"], Float[Array, "images Gh Gw H Sw"]]:
    """`sqrt(D) q . rel_pos_h[y, i]` and `sqrt(D) q . rel_pos_w[x, j]`, as a kernel.

    Where `supports` says that the kernel does not fit, XLA runs it.

    Args:
        qkv: Queries, keys and values in raster order; only the queries are read.
        rel_pos_h: What every row of the map adds for every key row, dtype of qkv. The kernel takes
            whole chunks of 16 key rows, so that they should be padded to these.
        rel_pos_w: The same for columns.
        images: Those of the batch whose bias is asked for; None is all.
        num_programs: Programs at most, or one for each tile of the map where there are more tiles.
        interpret: For tests: parameters of Mosaic GPU's interpret mode.

    Returns:
        rel_h and rel_w, accumulated and scaled in float32 and rounded once to qkv's dtype.
    """
    num_keys = rel_pos_h.shape[1], rel_pos_w.shape[1]
    if not supports(qkv.shape, num_keys, qkv.dtype):
        return xla_relative_position(qkv, rel_pos_h, rel_pos_w, images)
    options = dict(num_programs=num_programs, interpret=interpret)
    statics, operands = prepare(qkv, rel_pos_h, rel_pos_w, images, **options)
    return launch(statics, *operands)
