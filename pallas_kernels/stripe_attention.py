"""Global attention over a static block layout, with SAM's decomposed position bias.

The public function, which runs as plain XLA (`reference`) or as the Mosaic GPU kernel
(`stripe_kernel`), and what the kernel needs prepared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.implementation import Implementation, resolve
from pallas_kernels.relative_position import relative_position, xla_relative_position
from pallas_kernels.stripe_kernel import Config, Operands, Statics, launch
from pallas_kernels.tile_position import supports_tiles, tile_position
from pallas_kernels.tiles import BLOCK, CHUNK, SIDE, Tiling, chosen_images, find_tiling, step_table
from pallas_kernels.tuning import tuned

Sequence = Array | np.ndarray  # static where it is a numpy array
TileBias = Callable[[Array, Array, Array, Tiling, range], tuple[Array, Array]]
MapBias = Callable[[Array, Array, Array, range], tuple[Array, Array]]

GROUP_BYTES = 144 * 2**20  # that a launch may need beside qkv and its output, if an image can


class _Blocks(NamedTuple):
    """What the layout cuts into blocks: tiles or a sequence.

    Attributes:
        tiling: Which tokens make a block.
        tile_of_block: Tile of every block of the layout.
        sequence: The order that tokens are gathered in; None for tiles, which are read in place.
    """

    tiling: Tiling
    tile_of_block: np.ndarray
    sequence: Sequence | None


def fitting_config(grid: tuple[int, int], head_dim: int, *, tiles: bool) -> Config | None:
    """The first configuration that fits in registers and shared memory, for tiles or a sequence."""
    bias = _bias_bytes(grid, tiles)
    if tiles:
        configs, key_bias = tuned().tiles, 0
    else:
        configs, key_bias = tuned().sequences, bias
    return next((c for c in configs if c.fits(head_dim, BLOCK * bias, key_bias)), None)


def _bias_bytes(grid: tuple[int, int], tiles: bool) -> int:
    """The position bias of one query and head."""
    rows, cols = (-(-side // CHUNK) * CHUNK for side in grid)
    return 4 * grid[0] + 2 * cols if tiles else 2 * (rows + cols)


def image_bytes(grid: tuple[int, int], num_heads: int, head_dim: int, *, tiles: bool) -> int:
    """What a launch needs for an image: the position bias, and a sequence's q, k and v."""
    gathered = 0 if tiles else 3 * 2 * head_dim
    return math.prod(grid) * num_heads * (_bias_bytes(grid, tiles) + gathered)


def image_groups(batch: int, items: int, num_programs: int, image_bytes: int) -> list[range]:
    """The images that the kernel attends to at once, one group after the other.

    Programs take an item each, in waves, and a launch costs about a third of one. So a group is as
    large as it takes for the fewest waves, and among these for the fewest launches, that
    `GROUP_BYTES` allows.

    Args:
        batch: Images.
        items: Items of work of an image.
        num_programs: Programs of a launch.
        image_bytes: What a launch needs for an image.
    """

    def groups(size: int) -> list[range]:
        return [range(i, min(i + size, batch)) for i in range(0, batch, size)]

    def cost(size: int) -> tuple[int, int]:
        waves = (-(-len(images) * items // num_programs) for images in groups(size))
        return sum(waves), len(groups(size))

    most = max(1, GROUP_BYTES // image_bytes)
    return groups(batch if batch <= most else min(range(1, most + 1), key=cost))


def _find_blocks(grid: tuple[int, int], sequence: Sequence | None, layout: BlockLayout) -> _Blocks:
    """The blocks of a call: tiles wherever they are."""
    found = None
    if sequence is None or layout.is_dense:  # all keys meet all queries in any order
        found = find_tiling(grid, None, layout)
        sequence = np.arange(layout.seq_len, dtype=np.int32)
    elif isinstance(sequence, np.ndarray) and sequence.ndim == 1:
        found = find_tiling(grid, sequence, layout)
    if found is not None:
        return _Blocks(*found, None)
    tiling = Tiling(layout.seq_len // SIDE, SIDE, 1)
    return _Blocks(tiling, np.arange(tiling.num_tiles, dtype=np.int32), sequence)


def _xla_tile_bias(
    qkv: Array, by_row: Array, by_col: Array, tiling: Tiling, images: range
) -> tuple[Array, Array]:
    """`Operands.rel_h` and `rel_w` of tiles, from tables with key coordinates sorted by parity."""
    _, height, _, _, heads, head_dim = qkv.shape
    stride, tile_rows, tile_cols = tiling.stride, tiling.rows // SIDE, tiling.cols // SIDE
    q = qkv[images.start : images.stop, :, :, 0]
    q = q.reshape(len(q), tile_rows, SIDE, stride, tile_cols, SIDE, stride, heads, head_dim)
    by_row = by_row.reshape(tile_rows, SIDE, stride, height, head_dim)
    by_col = by_col.reshape(tile_cols, SIDE, stride, -1, CHUNK, head_dim)
    # r, c: tile; p, w: parity of its rows and columns; y, x: token in it; i: key row; k, j: chunk
    # of key columns and column in it.
    options = {"preferred_element_type": jnp.float32}
    rel_h = jnp.einsum("brypcxwhd,rypid->bhprwciyx", q, by_row, **options)
    rel_w = jnp.einsum("brypcxwhd,cxwkjd->bhprwckyxj", q, by_col, **options)
    root = math.sqrt(head_dim)  # in the units of q . k, which the softmax scales
    rel_h = (rel_h * root).reshape(-1, height, BLOCK)
    rel_w = (rel_w * root).astype(qkv.dtype).reshape(-1, by_col.shape[3], BLOCK, CHUNK)
    return rel_h, rel_w


def _mosaic_tile_bias(
    qkv: Array, by_row: Array, by_col: Array, tiling: Tiling, images: range, **options: Any
) -> tuple[Array, Array]:
    """The same, as a kernel where it fits in shared memory; `options` are those of the kernel."""
    batch, height, width, _, heads, head_dim = qkv.shape
    if not supports_tiles((height, width), head_dim):
        return _xla_tile_bias(qkv, by_row, by_col, tiling, images)
    tables = by_row[tiling.by_parity(height)], by_col[tiling.by_parity(width)]
    view = tiling.view(qkv.reshape(batch, height, width, 3 * heads, head_dim))
    options |= dict(tiling=tiling, num_heads=heads, images=images)
    return tile_position(view, *tables, **options)


def _prepare(
    qkv: Array,
    rel_pos_h: Array,
    rel_pos_w: Array,
    blocks: _Blocks,
    images: range,
    tile_bias: TileBias = _xla_tile_bias,
    map_bias: MapBias = xla_relative_position,
) -> tuple[Array, Operands]:
    """What the kernel reads for some images: qkv as the tiling views it, and the bias."""
    if blocks.sequence is None:
        return _prepare_tiles(qkv, rel_pos_h, rel_pos_w, blocks.tiling, images, tile_bias)
    return _prepare_sequence(qkv, rel_pos_h, rel_pos_w, blocks, images, map_bias)


def _prepare_tiles(
    qkv: Array,
    rel_pos_h: Array,
    rel_pos_w: Array,
    tiling: Tiling,
    images: range,
    tile_bias: TileBias,
) -> tuple[Array, Operands]:
    batch, height, width, _, heads, head_dim = qkv.shape
    by_row = rel_pos_h[:, tiling.by_parity(height)]
    by_col = _whole_chunks(rel_pos_w[:, tiling.by_parity(width)])
    rel_h, rel_w = tile_bias(qkv, by_row, by_col, tiling, images)
    flat = tiling.view(qkv.reshape(batch, height, width, 3 * heads, head_dim))
    return flat, Operands(rel_h, rel_w)


def _prepare_sequence(
    qkv: Array,
    rel_pos_h: Array,
    rel_pos_w: Array,
    blocks: _Blocks,
    images: range,
    map_bias: MapBias,
) -> tuple[Array, Operands]:
    _, height, width, _, heads, _ = qkv.shape
    seq_len, own = height * width, slice(images.start, images.stop)
    tiling, _, sequence = blocks
    assert sequence is not None, "tiles are not gathered"
    sequence = sequence if sequence.ndim == 1 else sequence[own]

    def view(x: Array) -> Array:
        x = permute(x.reshape(len(x), seq_len, heads, -1), sequence)
        return x.reshape(len(x), -1, SIDE, heads, x.shape[-1])

    rel_h, rel_w = map_bias(qkv, _whole_chunks(rel_pos_h), _whole_chunks(rel_pos_w), images)
    labels = jnp.stack([sequence // width, sequence % width + rel_h.shape[-1]])
    coordinates = jnp.arange(rel_h.shape[-1] + rel_w.shape[-1]).reshape(-1, 1, CHUNK)
    labels = labels.reshape(2, -1, 1, seq_len, 1)
    onehot = (labels == coordinates).any(0).astype(qkv.dtype)  # [1 or B or B H, chunks, N, 16]
    flat = jnp.concatenate([view(qkv[own, :, :, i]) for i in range(3)], axis=3)
    operands = Operands(tiling.view(view(rel_h)), tiling.view(view(rel_w)), onehot)
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


def _inverse(sequence: Sequence) -> Sequence:
    numpy = np if isinstance(sequence, np.ndarray) else jnp
    return numpy.argsort(sequence, axis=-1)


def _problems(qkv: Array, sequence: Sequence | None, layout: BlockLayout) -> list[str]:
    """What keeps the kernel from running a call, each as one clause."""
    _, height, width, _, _, head_dim = qkv.shape
    problems = []
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        problems.append(f"qkv must be bfloat16 or float16, got {qkv.dtype}")
    if head_dim % 16 or not 16 <= head_dim <= 128:
        problems.append(f"head_dim must be a multiple of 16 up to 128, got {head_dim}")
    if height * width % BLOCK:
        problems.append(f"Gh * Gw must be a multiple of {BLOCK}, got {height} x {width}")
    if max(height, width) > 128:
        problems.append(f"Gh and Gw must be at most 128, got {height} x {width}")
    if (layout.block_q, layout.block_kv) != (BLOCK, BLOCK):
        got = f"{layout.block_q} x {layout.block_kv}"
        problems.append(f"layout must have blocks of {BLOCK} x {BLOCK}, got {got}")
    if problems:
        return problems

    tiles = _find_blocks((height, width), sequence, layout).sequence is None
    if fitting_config((height, width), head_dim, tiles=tiles) is None:
        problems.append(
            "head_dim and the sides of the map must fit in shared memory, got "
            f"head_dim {head_dim} and {height} x {width} tokens"
        )
    return problems


def stripe_attention(
    qkv: Float[Array, "B Gh Gw 3 H D"],
    rel_pos_h: Float[Array, "Gh Gh D"],
    rel_pos_w: Float[Array, "Gw Gw D"],
    sequence: Int[Array | np.ndarray, "*batch N"] | None = None,
    *,
    layout: BlockLayout,
    block_order: Int[Array, "B num_kv_blocks"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B Gh Gw H D"]:
    """Attention over a static block layout with SAM's decomposed relative position bias.

    `softmax(q k^T / sqrt(D) + rel_h + rel_w) v` over the layout's keys, where a query at row y and
    column x and a key at row i and column j have `rel_h = q . rel_pos_h[y, i]` and
    `rel_w = q . rel_pos_w[x, j]`. The layout's blocks are those of the sequence, N = Gh Gw tokens.
    Source: Stripe-Sort attention, SparseSAM, arXiv 2605.17633.

    Args:
        qkv: Queries, keys and values as one projection gives them, in raster order.
        rel_pos_h: What every query row adds for every key row, dtype of qkv.
        rel_pos_w: The same for columns.
        sequence: Raster index of every token in the order that the layout cuts into blocks, int32:
            [N] (numpy: static; the fast path if its blocks are tiles, see `pallas_kernels.tiles`),
            [B, N] or [B, H, N]. None is raster order.
        layout: Which 64 x 64 blocks are computed.
        block_order: Rank -> key block: the bar is the `layout.num_bar_blocks` best-ranked blocks of
            every image. None is the identity.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        Attention's output in raster order, dtype of qkv.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernel is differentiated; `"xla"` is differentiable.
    """
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must have shape [B, Gh, Gw, 3, H, D], got {qkv.shape}")
    batch, height, width, _, heads, head_dim = qkv.shape
    for name, x, side in (("rel_pos_h", rel_pos_h, height), ("rel_pos_w", rel_pos_w, width)):
        if x.shape != (side, side, head_dim) or x.dtype != qkv.dtype:
            expected = f"shape {(side, side, head_dim)} and dtype {qkv.dtype}"
            raise ValueError(f"{name} must have {expected}, got {x.shape} and {x.dtype}")
    seq_len = height * width
    shapes = ((seq_len,), (batch, seq_len), (batch, heads, seq_len))
    if sequence is not None and sequence.shape not in shapes:
        raise ValueError(f"sequence must have one of the shapes {shapes}, got {sequence.shape}")
    if layout.seq_len != seq_len:
        raise ValueError(f"layout must have seq_len {seq_len}, got {layout.seq_len}")
    if block_order is not None and block_order.shape != (batch, layout.num_kv_blocks):
        expected = (batch, layout.num_kv_blocks)
        raise ValueError(f"block_order must have shape {expected}, got {block_order.shape}")
    problems = [] if implementation == "xla" else _problems(qkv, sequence, layout)
    chosen = resolve(implementation, function="stripe_attention", problems=problems)
    program = mosaic_stripe_attention if chosen == "mosaic_gpu" else _xla_stripe_attention
    options = {"layout": layout, "block_order": block_order}
    return program(qkv, rel_pos_h, rel_pos_w, sequence, **options)


def _xla_stripe_attention(
    qkv: Array,
    rel_pos_h: Array,
    rel_pos_w: Array,
    sequence: Sequence | None,
    *,
    layout: BlockLayout,
    block_order: Array | None,
) -> Array:
    """`reference.stripe_attention` of the tokens in the order of the sequence."""
    q, k, v = (qkv[:, :, :, i] for i in range(3))
    rel_h, rel_w = reference.relative_position(q, rel_pos_h, rel_pos_w)
    shape, width = q.shape, q.shape[2]
    arrays = [x.reshape(shape[0], layout.seq_len, *x.shape[3:]) for x in (q, k, v, rel_h, rel_w)]
    if layout.is_dense:
        sequence, block_order = None, None
    if sequence is not None:
        arrays = [permute(x, sequence) for x in arrays]
    positions = np.arange(layout.seq_len) if sequence is None else sequence
    rows, cols = positions // width, positions % width
    q, k, v, rel_h, rel_w = arrays
    attend = functools.partial(reference.stripe_attention, layout=layout, block_order=block_order)
    out = attend(q, k, v, rel_h, rel_w, rows, cols)
    if sequence is not None:
        out = permute(out, _inverse(sequence))
    return out.reshape(shape)


def mosaic_stripe_attention(
    qkv: Array,
    rel_pos_h: Array,
    rel_pos_w: Array,
    sequence: Sequence | None = None,
    *,
    layout: BlockLayout,
    block_order: Array | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Array:
    """The kernel on checked arguments; `config` and `interpret` are for tests and tuning."""
    biases = [
        functools.partial(f, interpret=interpret) for f in (_mosaic_tile_bias, relative_position)
    ]
    batch, height, width, _, heads, head_dim = qkv.shape
    blocks = _find_blocks((height, width), sequence, layout)
    streamed = blocks.sequence is not None
    config = config or fitting_config((height, width), head_dim, tiles=not streamed)
    assert config is not None, "the public function checks that a configuration fits"
    needed = image_bytes((height, width), heads, head_dim, tiles=not streamed)
    items = config.items(layout, heads)
    out, gathered = None, blocks
    for images in image_groups(batch, items, config.num_programs, needed):
        if out is not None:  # or XLA could prepare all groups first, and keep all that they need
            qkv, order, out = _together(qkv, gathered.sequence, out)
            gathered = blocks._replace(sequence=order)
        prepared = _prepare(qkv, rel_pos_h, rel_pos_w, gathered, images, *biases)
        own_order = None if block_order is None else block_order[images.start : images.stop]
        table = step_table(blocks.tile_of_block, layout, own_order, config.block_kv)
        own = (len(images), batch, interpret)
        statics = Statics(layout, config, blocks.tiling, streamed, heads, *own)
        out = launch(statics, chosen_images(images, batch)[1], *prepared, table, out)
    assert out is not None, "there is an image"
    if blocks.sequence is not None:
        out = permute(out.reshape(batch, -1, heads, head_dim), _inverse(blocks.sequence))
    return out.reshape(batch, height, width, heads, head_dim)


def _together(*arrays: Any) -> list[Any]:
    """The same, none of which XLA uses before all are there; what is not traced stays as it is."""
    traced = iter(lax.optimization_barrier([x for x in arrays if isinstance(x, jax.Array)]))
    return [next(traced) if isinstance(x, jax.Array) else x for x in arrays]
