"""Multiply-accumulates of the encoder's parts, counted from static shapes.

Counted is what the algorithm needs: every product of the layers, the attention's two products over
the computed key blocks and its position bias. Softmax, LayerNorm and sorting are no
multiply-accumulates and do not count. Windows count as they are computed, padding included;
projections run on the real tokens only.
"""

from __future__ import annotations

import functools
import math

from pallas_kernels import BlockLayout
from sparsesam_jax.config import BlockConfig, Grid


@functools.lru_cache(maxsize=256)
def computed_pairs(layout: BlockLayout) -> int:
    """Pairs of a query and a key that a layout computes, partial blocks as large as they are."""
    queries = _block_sizes(layout.num_q_blocks, layout.block_q, layout.seq_len)
    keys = _block_sizes(layout.num_kv_blocks, layout.block_kv, layout.seq_len)
    return sum(
        query * key
        for query, row in zip(queries, layout.block_mask, strict=True)
        for key, computed in zip(keys, row, strict=True)
        if computed
    )


def attention_work(block: BlockConfig, grid: Grid, pairs: int) -> int:
    """Attention of one block, all heads, given the computed pairs of its grid or of one window.

    Args:
        block: The block.
        grid: Rows and columns of tokens.
        pairs: Pairs of a query and a key that one head computes, in each window if windowed.
    """
    side = block.window_size
    windows, queries, sides = 1, grid[0] * grid[1], sum(grid)
    if side is not None:
        windows = math.ceil(grid[0] / side) * math.ceil(grid[1] / side)
        queries, sides = side * side, 2 * side
    bias = 0 if block.rel_pos_size is None else queries * sides
    return windows * block.embed_dim * (2 * pairs + bias)


def projection_work(block: BlockConfig, tokens: int) -> int:
    """Queries, keys, values and output of one block."""
    return 4 * tokens * block.embed_dim**2


def mlp_work(block: BlockConfig, tokens: int) -> int:
    """The MLP of one block on so many tokens."""
    return 2 * tokens * block.embed_dim * block.mlp_dim


def _block_sizes(count: int, size: int, length: int) -> list[int]:
    return [min(size, length - index * size) for index in range(count)]
