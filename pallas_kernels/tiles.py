"""Which tokens of a feature map make the blocks of an attention layout.

A block of 64 tokens that is a tile, 8 x 8 tokens with stride 1 or 2 in both directions, is one box
for the tensor memory accelerator, and its tokens share 8 rows and 8 columns. Blocks of a Morton (or
Hilbert) curve are tiles of stride 1, blocks of its stripes are tiles of stride 2, wherever the
grid's sides are multiples of 8 times the stride. The order of tokens inside a block means nothing
to attention.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.block_layout import BlockLayout

SIDE = 8  # tokens along a side of a tile
BLOCK = SIDE * SIDE  # queries and keys in a block of the layout, and the rows of one wgmma
CHUNK = 16  # coordinates in one product of a one-hot bias: the contraction of one wgmma


class Tiling(NamedTuple):
    """Tiles of a map of tokens, numbered in raster order with rows and columns sorted by parity.

    Attributes:
        rows: Rows of the map over `stride`.
        cols: Columns of the map over `stride`.
        stride: Between neighbouring tokens of a tile.
    """

    rows: int
    cols: int
    stride: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the map."""
        return self.rows * self.cols * self.stride**2 // BLOCK

    def view(self, x: Array) -> Array:
        """A map [B, Gh, Gw, H, C] as [B rows, stride, cols, stride H, C]: no more than 5 axes."""
        return x.reshape(-1, self.stride, self.cols, self.stride * x.shape[3], x.shape[4])

    def coordinates(self, tile: Any) -> tuple[Any, Any]:
        """A tile's row and column among the tiles of the map sorted by parity."""
        return div_rem(tile, self.cols * self.stride // SIDE)

    def corner(self, tile: Any) -> tuple[Any, Any, Any, Any]:
        """A tile's first row, row parity, first column and column parity, in the view's units."""
        row, col = self.coordinates(tile)
        row_parity, row = div_rem(row, self.rows // SIDE)
        col_parity, col = div_rem(col, self.cols // SIDE)
        return row * SIDE, row_parity, col * SIDE, col_parity

    def by_parity(self, size: int) -> np.ndarray:
        """Coordinates 0 to `size` - 1 sorted by parity."""
        return np.arange(size).reshape(-1, self.stride).T.ravel()

    def tokens(self) -> np.ndarray:
        """Raster indices of every tile's tokens, [tiles, 64]."""
        rows, cols = (self.by_parity(x * self.stride) for x in (self.rows, self.cols))
        index = rows[:, None] * len(cols) + cols
        index = index.reshape(len(rows) // SIDE, SIDE, len(cols) // SIDE, SIDE)
        return index.swapaxes(1, 2).reshape(-1, BLOCK)


def div_rem(x: Any, y: int) -> tuple[Any, Any]:
    """Quotient and remainder of a traced index."""
    return (x, 0) if y == 1 else (lax.div(x, jnp.int32(y)), lax.rem(x, jnp.int32(y)))


def chosen_images(
    images: range | None, batch: int
) -> tuple[range, Int[Array | np.ndarray, " 1"] | None]:
    """The images of a launch, and the number of the first for the kernel to read; None is 0.

    Read and not known when traced: launches for as many images share a kernel.
    """
    if images is None or images == range(batch):
        return range(batch), None
    return images, np.array([images.start], np.int32)


@functools.lru_cache(maxsize=64)
def _tile_of_block(sequence: bytes, tiling: Tiling) -> np.ndarray | None:
    blocks = np.sort(np.frombuffer(sequence, np.int32).reshape(-1, BLOCK), axis=1)
    tiles = np.sort(tiling.tokens(), axis=1)
    by_first = {tokens[0]: tile for tile, tokens in enumerate(tiles)}
    found = np.array([by_first.get(block[0], 0) for block in blocks], np.int32)
    return found if np.array_equal(tiles[found], blocks) else None


def find_tiling(
    grid: tuple[int, int], sequence: np.ndarray | None, layout: BlockLayout
) -> tuple[Tiling, np.ndarray] | None:
    """The tiling whose tiles are the blocks of a static sequence, and the tile of every block.

    Args:
        grid: Rows and columns of the feature map.
        sequence: Raster index of every token in the order of attention; None is raster order.
        layout: A dense layout takes any tiling, as all keys meet all queries.

    Returns:
        None if there is no such tiling.
    """
    for stride in (1, 2):
        if any(side % (SIDE * stride) for side in grid):
            continue
        tiling = Tiling(grid[0] // stride, grid[1] // stride, stride)
        if layout.is_dense:
            return tiling, np.arange(tiling.num_tiles, dtype=np.int32)
        if sequence is None:
            sequence = np.arange(grid[0] * grid[1])
        tiles = _tile_of_block(np.asarray(sequence, np.int32).tobytes(), tiling)
        if tiles is not None:
            return tiling, tiles
    return None
