"""What the stripe attention kernel reads, prepared from the arguments of the public function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import stripe_memory
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.implementation import Resolved
from pallas_kernels.relative_position import (
    given_tables,
    relative_position,
    xla_relative_position,
)
from pallas_kernels.stripe_memory import Operands, Statics
from pallas_kernels.stripe_schedule import Config, step_table
from pallas_kernels.tile_position import tile_position, xla_tile_position
from pallas_kernels.tiles import BLOCK, CHUNK, SIDE, Tiling, chosen_images, find_tiling
from pallas_kernels.tuning import tuned

Sequence = Array | np.ndarray  # static where it is a numpy array


class Blocks(NamedTuple):
    """What the layout cuts into blocks: tiles or a sequence.

    Attributes:
        tiling: Which tokens make a block.
        tile_of_block: Tile of every block of the layout.
        sequence: The order that tokens are gathered in; None for tiles, which are read in place.
    """

    tiling: Tiling
    tile_of_block: np.ndarray
    sequence: Sequence | None


def _bias_shapes(grid: tuple[int, int], dtype: DTypeLike, tiles: bool) -> Operands:
    """The position bias of one query block and head, and for sequences of one key block."""
    height, chunks = grid[0], [-(-side // CHUNK) for side in grid]
    if tiles:
        shapes = (1, height, BLOCK), (1, chunks[1], BLOCK, CHUNK)
        dtypes = jnp.float32, dtype
    else:
        shapes = *((1, 1, SIDE, SIDE, c * CHUNK) for c in chunks), (1, sum(chunks), BLOCK, CHUNK)
        dtypes = dtype, dtype, dtype
    return Operands(*map(jax.ShapeDtypeStruct, shapes, dtypes))


def fitting_config(
    grid: tuple[int, int],
    head_dim: int,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    tiles: bool,
    has_bias: bool = True,
) -> Config | None:
    """The first configuration that fits in registers and shared memory, for tiles or a sequence.

    A sequence without a position bias takes what tiles take.
    """
    bias = _bias_shapes(grid, dtype, tiles) if has_bias else Operands()
    configs = tuned().tiles if tiles or not has_bias else tuned().sequences
    fits = (c for c in configs if stripe_memory.fits(c, head_dim, dtype, bias))
    return next(fits, None)


def image_bytes(
    grid: tuple[int, int],
    num_heads: int,
    head_dim: int,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    tiles: bool,
    has_bias: bool = True,
) -> int:
    """What a launch needs for an image: the position bias, and a sequence's q, k and v."""
    itemsize = jnp.dtype(dtype).itemsize
    bias = _bias_shapes(grid, dtype, tiles).rel if has_bias else []
    block = sum(x.size * x.dtype.itemsize for x in bias)
    gathered = 0 if tiles else 3 * itemsize * head_dim
    return math.prod(grid) * num_heads * (block // BLOCK + gathered)


def find_blocks(grid: tuple[int, int], sequence: Sequence | None, layout: BlockLayout) -> Blocks:
    """The blocks of a call: tiles wherever they are."""
    found = None
    if sequence is None or layout.is_dense:  # all keys meet all queries in any order
        found = find_tiling(grid, None, layout)
        sequence = np.arange(layout.seq_len, dtype=np.int32)
    elif isinstance(sequence, np.ndarray) and sequence.ndim == 1:
        found = find_tiling(grid, sequence, layout)
    if found is not None:
        return Blocks(*found, None)
    tiling = Tiling(layout.seq_len // SIDE, SIDE, 1)
    return Blocks(tiling, np.arange(tiling.num_tiles, dtype=np.int32), sequence)


def _tile_operands(
    qkv: Array,
    tables: tuple[Array, ...],
    tiling: Tiling,
    images: range,
    tile_bias: Callable[..., tuple[Array, Array]],
) -> tuple[Array, Operands]:
    """The map as the tiling views it, and some images' bias, by `tile_position` or its XLA twin."""
    batch, height, width, _, heads, head_dim = qkv.shape
    rel = ()
    if tables:
        by_row, by_col = tables
        by_row = by_row[:, tiling.by_parity(height)]
        by_col = _whole_chunks(by_col[:, tiling.by_parity(width)])
        rel = tile_bias(qkv, by_row, by_col, tiling=tiling, images=images)
    flat = tiling.view(qkv.reshape(batch, height, width, 3 * heads, head_dim))
    return flat, Operands(*rel)


def _sequence_operands(
    qkv: Array,
    tables: tuple[Array, ...],
    blocks: Blocks,
    images: range,
    map_bias: Callable[..., tuple[Array, Array]],
) -> tuple[Array, Operands]:
    """Some images' qkv in the order of the sequence, and its bias, by `relative_position`."""
    _, height, width, _, heads, _ = qkv.shape
    seq_len, own = height * width, slice(images.start, images.stop)
    tiling, sequence = blocks.tiling, blocks.sequence
    assert sequence is not None, "tiles are not gathered"
    sequence = sequence if sequence.ndim == 1 else sequence[own]

    def view(x: Array) -> Array:
        x = permute(x.reshape(len(x), seq_len, heads, -1), sequence)
        return x.reshape(len(x), -1, SIDE, heads, x.shape[-1])

    rel, onehot = (), None
    if tables:
        rel = map_bias(qkv, *map(_whole_chunks, tables), images)
        num_rows, num_cols = (x.shape[-1] for x in rel)
        labels = jnp.stack([sequence // width, sequence % width + num_rows])
        coordinates = jnp.arange(num_rows + num_cols).reshape(-1, 1, CHUNK)
        labels = labels.reshape(2, -1, 1, seq_len, 1)
        onehot = (labels == coordinates).any(0).astype(qkv.dtype)  # [1 or B or B H, chunks, N, 16]
    flat = jnp.concatenate([view(qkv[own, :, :, i]) for i in range(3)], axis=3)
    operands = Operands(*(tiling.view(view(x)) for x in rel), onehot=onehot)
    return tiling.view(flat), operands


def _whole_chunks(rel_pos: Array) -> Array:
    """A table with its key coordinates padded to whole chunks."""
    return jnp.pad(rel_pos, ((0, 0), (0, -rel_pos.shape[1] % CHUNK), (0, 0)))


def permute(x: Float[Array, "B N H C"], sequence: Sequence) -> Float[Array, "B N H C"]:
    """The tokens of x in the order of a sequence [N], [B, N] or [B, H, N]."""
    if isinstance(sequence, np.ndarray) and sequence.ndim == 1:
        return x[:, sequence]
    index = sequence[:, :, None, None] if sequence.ndim == 2 else sequence.swapaxes(1, 2)[..., None]
    return jnp.take_along_axis(x, index, axis=1, mode="clip")  # XLA would fill what is outside


def inverse(sequence: Sequence) -> Sequence:
    """The order that brings tokens of a sequence back to the raster."""
    numpy = np if isinstance(sequence, np.ndarray) else jnp
    return numpy.argsort(sequence, axis=-1)


def prepare(
    qkv: Array,
    rel_pos_h: Array | None = None,
    rel_pos_w: Array | None = None,
    sequence: Sequence | None = None,
    *,
    layout: BlockLayout,
    block_order: Array | None = None,
    out_scale: Array | None = None,
    images: range | None = None,
    config: Config | None = None,
    position_bias: Resolved = "mosaic_gpu",
    interpret: Any = False,
) -> tuple[Statics, tuple[Any, Array, Operands, Array]]:
    """What one `launch` takes, for checked arguments of `stripe_attention` and some images.

    `launch(statics, *operands)` gives attention's output as the kernel writes it, in the order of
    the sequence; given the output of another launch besides, it writes to this one's images alone.

    Args:
        qkv: See `stripe_attention`, like the next six.
        rel_pos_h: None is no position bias.
        rel_pos_w: Likewise.
        sequence: None is raster order.
        layout: Which blocks are computed.
        block_order: None is the identity.
        out_scale: None is a result of qkv's dtype.
        images: Those of the batch that the launch attends to; None is all.
        config: How the kernel runs; None is the tuned one.
        position_bias: What computes it, `"mosaic_gpu"` being kernels of its own where these fit.
        interpret: For tests: parameters of Mosaic GPU's interpret mode.
    """
    batch, height, width, _, heads, head_dim = qkv.shape
    tables = given_tables(rel_pos_h, rel_pos_w)
    blocks = find_blocks((height, width), sequence, layout)
    gathered = blocks.sequence is not None
    options = dict(tiles=not gathered, has_bias=bool(tables))
    config = config or fitting_config((height, width), head_dim, qkv.dtype, **options)
    assert config is not None, "the public function checks that a configuration fits"
    images, first = chosen_images(images, batch)
    if position_bias == "xla":
        tile_bias, map_bias = xla_tile_position, xla_relative_position
    else:
        tile_bias = functools.partial(tile_position, interpret=interpret)
        map_bias = functools.partial(relative_position, interpret=interpret)
    if blocks.sequence is None:
        flat, operands = _tile_operands(qkv, tables, blocks.tiling, images, tile_bias)
    else:
        flat, operands = _sequence_operands(qkv, tables, blocks, images, map_bias)
    if out_scale is not None:
        operands = operands._replace(inverse_out=1 / out_scale.reshape(1))
    own_order = None if block_order is None else block_order[images.start : images.stop]
    table = step_table(blocks.tile_of_block, layout, own_order, config.block_kv)
    sizes = heads, len(images), batch
    statics = Statics(layout, config, blocks.tiling, gathered, *sizes, interpret)
    return statics, (first, flat, operands, table)
