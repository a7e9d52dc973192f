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
from sparsesam_jax.config import ImageEncoderConfig

Grid = tuple[int, int]


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


def attention_work(config: ImageEncoderConfig, index: int, grid: Grid, pairs: int) -> int:
    """Attention of one block, all heads, given the computed pairs of its grid or of one window.

    Args:
        config: Shape of the encoder.
        index: The block.
        grid: Rows and columns of tokens.
        pairs: Pairs of a query and a key that one head computes, in each window if windowed.
    """
    if config.is_global(index):
        windows, queries, sides = 1, grid[0] * grid[1], sum(grid)
    else:
        side = config.window_size
        windows = math.ceil(grid[0] / side) * math.ceil(grid[1] / side)
        queries, sides = side * side, 2 * side
    return windows * config.embed_dim * (2 * pairs + queries * sides)


def projection_work(config: ImageEncoderConfig, tokens: int) -> int:
    """Queries, keys, values and output of one block."""
    return 4 * tokens * config.embed_dim**2


def mlp_work(config: ImageEncoderConfig, tokens: int) -> int:
    """The MLP of one block on so many tokens."""
    return 2 * tokens * config.embed_dim * config.mlp_dim


def fixed_work(config: ImageEncoderConfig, tokens: int) -> int:
    """Patch embedding and neck."""
    pixels, out = 3 * config.patch_size**2, config.out_chans
    return tokens * (pixels * config.embed_dim + config.embed_dim * out + 9 * out * out)


def _block_sizes(count: int, size: int, length: int) -> list[int]:
    return [min(size, length - index * size) for index in range(count)]
