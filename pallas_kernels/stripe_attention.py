"""Global attention over a static block layout, with SAM's decomposed position bias.

The public function, which runs as plain XLA (`reference`) or as the Mosaic GPU kernel
(`stripe_kernel`), a group of images after the other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import cudnn_attention, reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.choices import Implementation
from pallas_kernels.float8 import DTYPE, Float8Rows, quantize_static
from pallas_kernels.hopper import KERNEL_DTYPES, dtype_problems
from pallas_kernels.implementation import resolve
from pallas_kernels.relative_position import given_tables
from pallas_kernels.stripe_kernel import launch
from pallas_kernels.stripe_operands import (
    Sequence,
    find_blocks,
    fitting_config,
    image_bytes,
    inverse,
    permute,
    prepare,
)
from pallas_kernels.stripe_schedule import Config, Schedule
from pallas_kernels.tiles import BLOCK

GROUP_BYTES = 144 * 2**20  # that a launch may need beside qkv and its output, if an image can


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

    most = max(1, GROUP_BYTES // max(image_bytes, 1))
    return groups(batch if batch <= most else min(range(1, most + 1), key=cost))


def _problems(
    qkv: Array, sequence: Sequence | None, layout: BlockLayout, has_bias: bool
) -> list[str]:
    """What keeps the kernel from running a call, each as one clause."""
    _, height, width, _, _, head_dim = qkv.shape
    problems = dtype_problems(KERNEL_DTYPES, qkv=qkv.dtype)
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

    tiles = find_blocks((height, width), sequence, layout).sequence is None
    options = dict(tiles=tiles, has_bias=has_bias)
    if fitting_config((height, width), head_dim, qkv.dtype, **options) is None:
        problems.append(
            "head_dim and the sides of the map must fit in shared memory, got "
            f"head_dim {head_dim} and {height} x {width} tokens"
        )
    return problems


def stripe_attention(
    qkv: Float[Array, "B Gh Gw 3 H D"],
    rel_pos_h: Float[Array, "Gh Gh D"] | None = None,
    rel_pos_w: Float[Array, "Gw Gw D"] | None = None,
    sequence: Int[Array | np.ndarray, "*batch N"] | None = None,
    *,
    layout: BlockLayout,
    block_order: Int[Array, "B num_kv_blocks"] | None = None,
    out_scale: Float[Array, ""] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B Gh Gw H D"] | Float8Rows:
    """Attention over a static block layout with SAM's decomposed relative position bias.

    `softmax(q k^T / sqrt(D) + rel_h + rel_w) v` over the layout's keys, where a query at row y and
    column x and a key at row i and column j have `rel_h = q . rel_pos_h[y, i]` and
    `rel_w = q . rel_pos_w[x, j]`. The layout's blocks are those of the sequence, N = Gh Gw tokens.
    Source: Stripe-Sort attention, SparseSAM, arXiv 2605.17633.

    Args:
        qkv: Queries, keys and values as one projection gives them, in raster order.
        rel_pos_h: What every query row adds for every key row, dtype of qkv. None, like rel_pos_w,
            is attention without a position bias.
        rel_pos_w: The same for columns.
        sequence: Raster index of every token in the order that the layout cuts into blocks, int32:
            [N] (numpy: static; the fast path if its blocks are tiles, see `pallas_kernels.tiles`),
            [B, N] or [B, H, N]. None is raster order.
        layout: Which 64 x 64 blocks are computed.
        block_order: Rank -> key block: the bar is the `layout.num_bar_blocks` best-ranked blocks of
            every image. None is the identity.
        out_scale: The result has 8 bits with this scale; None is the dtype of qkv.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        Attention's output in raster order, dtype of qkv or `Float8Rows`.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernel is differentiated; `"xla"` is differentiable.
    """
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must have shape [B, Gh, Gw, 3, H, D], got {qkv.shape}")
    batch, height, width, _, heads, head_dim = qkv.shape
    tables = given_tables(rel_pos_h, rel_pos_w)
    for name, x, side in zip(("rel_pos_h", "rel_pos_w"), tables, (height, width), strict=False):
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
    has_bias = bool(tables)
    problems = [] if implementation == "xla" else _problems(qkv, sequence, layout, has_bias)
    chosen = resolve(implementation, function="stripe_attention", problems=problems)
    program = attend_by_groups if chosen == "mosaic_gpu" else _xla_stripe_attention
    options: dict[str, Any] = dict(layout=layout, block_order=block_order, out_scale=out_scale)
    return program(qkv, rel_pos_h, rel_pos_w, sequence, **options)


def _xla_stripe_attention(
    qkv: Array,
    rel_pos_h: Array | None,
    rel_pos_w: Array | None,
    sequence: Sequence | None,
    *,
    layout: BlockLayout,
    block_order: Array | None,
    out_scale: Array | None,
) -> Array | Float8Rows:
    """Attention of the tokens in the order of the sequence, through cuDNN where that runs."""
    q, k, v = (qkv[:, :, :, i] for i in range(3))
    tables = given_tables(rel_pos_h, rel_pos_w)
    attend, dtype = reference.stripe_attention, jnp.dtype(jnp.float32)
    if cudnn_attention.runs(q.dtype, q.shape[-1]):
        attend, dtype = cudnn_attention.stripe_attention, q.dtype
    rel = reference.relative_position(q, *tables, dtype=dtype) if tables else ()
    shape, width = q.shape, q.shape[2]
    arrays = [x.reshape(shape[0], layout.seq_len, *x.shape[3:]) for x in (q, k, v, *rel)]
    if layout.is_dense:
        sequence, block_order = None, None
    if sequence is not None:
        arrays = [permute(x, sequence) for x in arrays]
    positions = np.arange(layout.seq_len) if sequence is None else sequence
    rows, cols = positions // width, positions % width
    q, k, v, *rel = arrays
    rel_h, rel_w = rel or (None, None)
    out = attend(q, k, v, rel_h, rel_w, rows, cols, layout=layout, block_order=block_order)
    if sequence is not None:
        out = permute(out, inverse(sequence))
    out = out.reshape(shape)
    return out if out_scale is None else quantize_static(out, out_scale)


def attend_by_groups(
    qkv: Array,
    rel_pos_h: Array | None = None,
    rel_pos_w: Array | None = None,
    sequence: Sequence | None = None,
    *,
    layout: BlockLayout,
    block_order: Array | None = None,
    out_scale: Array | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Array | Float8Rows:
    """`prepare` and `launch` for one group of images after the other, for checked arguments.

    Each launch writes to its images' place in the output of the one before, and nothing that a
    group needs is prepared before that output is there: XLA keeps it for one group at a time.
    """
    batch, height, width, _, heads, head_dim = qkv.shape
    sequence = None if layout.is_dense else sequence  # all keys meet all queries in any order
    blocks = find_blocks((height, width), sequence, layout)
    has_bias = bool(given_tables(rel_pos_h, rel_pos_w))
    grid, options = (height, width), dict(tiles=blocks.sequence is None, has_bias=has_bias)
    config = config or fitting_config(grid, head_dim, qkv.dtype, **options)
    assert config is not None, "the public function checks that a configuration fits"
    needed = image_bytes(grid, heads, head_dim, qkv.dtype, **options)
    items = Schedule(layout, config, heads, 1).num_items
    groups = image_groups(batch, items, config.num_programs, needed)
    out, own_sequence, dtype = None, sequence, qkv.dtype if out_scale is None else DTYPE
    if len(groups) > 1:  # the first group writes in place too: groups of a size share a kernel
        out = blocks.tiling.view(lax.empty((batch, height, width, heads, head_dim), dtype))
    for images in groups:
        if images.start:
            qkv, own_sequence, out = _together(qkv, own_sequence, out)
        statics, operands = prepare(
            qkv,
            rel_pos_h,
            rel_pos_w,
            own_sequence,
            layout=layout,
            block_order=block_order,
            out_scale=out_scale,
            images=images,
            config=config,
            interpret=interpret,
        )
        out = launch(statics, *operands, out)
    assert out is not None, "there is an image"
    if blocks.sequence is not None:
        out = permute(out.reshape(batch, -1, heads, head_dim), inverse(blocks.sequence))
    out = out.reshape(qkv[:, :, :, 0].shape)
    return out if out_scale is None else Float8Rows(out, out_scale)


def _together(*arrays: Any) -> list[Any]:
    """The same, none of which XLA uses before all are there; what is not traced stays as it is."""
    traced = iter(lax.optimization_barrier([x for x in arrays if isinstance(x, jax.Array)]))
    return [next(traced) if isinstance(x, jax.Array) else x for x in arrays]
