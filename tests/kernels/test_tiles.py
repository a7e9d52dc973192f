"""Which blocks of a sequence are tiles of the map."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.tiles import BLOCK, SIDE, Tiling, find_tiling
from sparsesam_jax.sparsity.orders import GROUP, curve_order

SPARSE = 0.3


def stripes(curve: str, side: int) -> np.ndarray:
    """Token 0 of every group of a curve, then token 1 of every group, and so on."""
    return curve_order(curve, side, side).reshape(-1, GROUP).T.ravel()


def find(sequence: np.ndarray | None, side: int, density: float = SPARSE):
    return find_tiling((side, side), sequence, BlockLayout.a_shape(side**2, density))


def assert_same_blocks(found: tuple[Tiling, np.ndarray] | None, sequence: np.ndarray) -> Tiling:
    """Every block of the sequence has the tokens of the tile that was found for it."""
    assert found is not None
    tiling, tile_of_block = found
    blocks = np.sort(sequence.reshape(-1, BLOCK), axis=1)
    np.testing.assert_array_equal(np.sort(tiling.tokens()[tile_of_block], axis=1), blocks)
    return tiling


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_morton_stripes_are_tiles_of_stride_2(side):
    sequence = stripes("morton", side)
    assert assert_same_blocks(find(sequence, side), sequence) == Tiling(side // 2, side // 2, 2)


@pytest.mark.parametrize("curve", ["morton", "hilbert"])
@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_blocks_of_a_curve_are_tiles_of_stride_1(side, curve):
    sequence = curve_order(curve, side, side)
    assert assert_same_blocks(find(sequence, side), sequence) == Tiling(side, side, 1)


def test_tokens_inside_a_block_come_in_any_order():
    sequence = np.random.default_rng(0).permuted(stripes("morton", 32).reshape(-1, BLOCK), axis=1)
    assert_same_blocks(find(sequence.ravel(), 32), sequence)


def test_other_sequences_are_no_tiles():
    groups = curve_order("morton", 64, 64).reshape(-1, GROUP)
    ranked = np.random.default_rng(0).permutation(groups).T.ravel()
    assert find(ranked, 64) is None
    assert find(stripes("morton", 24), 24) is None  # 24 is no multiple of 16
    assert find(None, 64) is None  # blocks of raster order are rows
    assert find(None, 20) is None


@pytest.mark.parametrize("sequence", [None, np.arange(24 * 24)[::-1]], ids=["raster", "reversed"])
def test_a_dense_layout_takes_any_tiles(sequence):
    tiling, tile_of_block = find(sequence, 24, density=1.0)
    assert tiling == Tiling(24, 24, 1)
    np.testing.assert_array_equal(tile_of_block, np.arange(9))


TILINGS = [Tiling(8, 8, 1), Tiling(16, 24, 1), Tiling(8, 8, 2), Tiling(16, 8, 2), Tiling(32, 32, 2)]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_tiles_share_out_the_tokens(tiling):
    tokens = tiling.tokens()
    assert tokens.shape == (tiling.num_tiles, BLOCK)
    np.testing.assert_array_equal(np.sort(tokens.ravel()), np.arange(tokens.size))


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_places_of_tiles_agree_with_their_tokens(tiling):
    stride = tiling.stride
    height, width = tiling.rows * stride, tiling.cols * stride
    index = np.arange(height * width, dtype=np.float32).reshape(1, height, width, 1, 1)
    view = tiling.view(np.concatenate([index, -index], axis=3))  # two heads
    assert view.shape == (tiling.rows, stride, tiling.cols, 2 * stride, 1)
    by_parity = [tiling.by_parity(size) for size in (height, width)]
    for tile, tokens in enumerate(tiling.tokens()):
        row, row_parity, col, col_parity = map(int, tiling.corner(tile))
        box = view[row : row + SIDE, row_parity, col : col + SIDE, col_parity * 2, 0]
        np.testing.assert_array_equal(box.ravel(), tokens)
        # Coordinates count tiles of the map sorted by parity.
        row, col = (int(x) * SIDE for x in tiling.coordinates(tile))
        rows, cols = by_parity[0][row : row + SIDE], by_parity[1][col : col + SIDE]
        np.testing.assert_array_equal((rows[:, None] * width + cols).ravel(), tokens)
