"""Block layouts against the algorithm's inequalities, for any length, block size and density."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import BlockLayout

densities = st.integers(1, 100).map(lambda percent: percent / 100)
lengths = st.integers(1, 700)
blocks = st.sampled_from([8, 16, 32, 64])


@given(lengths, densities, blocks)
def test_a_shape(seq_len: int, density: float, block: int):
    layout = BlockLayout.a_shape(seq_len, density, block_q=block, block_kv=block)
    count = math.ceil(seq_len / block)
    # In exact decimals: density comes in whole percents.
    bar = round(density * 100) * count // 100
    rows, cols = np.indices((count, count))
    np.testing.assert_array_equal(layout.block_mask, (cols < bar) | (rows == cols))
    assert layout.is_dense == (bar == count)
    assert layout.density == pytest.approx(layout.block_mask.mean())
    if layout.is_dense:
        assert layout == BlockLayout.dense(seq_len, block_q=block, block_kv=block)


@given(lengths, densities, blocks)
def test_bar(seq_len: int, density: float, block: int):
    layout = BlockLayout.bar(seq_len, density, block_q=block, block_kv=block)
    count = math.ceil(seq_len / block)
    kept = min(round(density * 100) * count // 100 + 1, count)
    assert layout.num_bar_blocks == kept
    assert layout.bar_len == min(kept * block, seq_len)
    assert not layout.diagonal


@given(lengths, densities, blocks, blocks)
def test_indices_list_the_mask(seq_len: int, density: float, block_q: int, block_kv: int):
    layout = BlockLayout.a_shape(seq_len, density, block_q=block_q, block_kv=block_kv)
    for row, indices, count in zip(
        layout.block_mask, layout.kv_indices, layout.kv_num_blocks, strict=True
    ):
        np.testing.assert_array_equal(indices[:count], np.flatnonzero(row))
        assert (indices[count:] == -1).all()
    assert layout.block_mask.any(1).all(), "every query needs a key"
    assert layout.block_mask[:, : layout.num_bar_blocks].all()


def test_published_windows_and_grid():
    """14 x 14 windows keep 128 keys at 0.3 and 0.4, 192 from 0.5 to 0.74, all from 0.75."""
    kept = {r: BlockLayout.bar(196, r).bar_len for r in (0.25, 0.3, 0.4, 0.5, 0.74, 0.75, 1)}
    assert kept == {0.25: 128, 0.3: 128, 0.4: 128, 0.5: 192, 0.74: 192, 0.75: 196, 1: 196}
    assert BlockLayout.a_shape(4096, 0.3).num_bar_blocks == 19


def test_hashable_and_immutable():
    layout = BlockLayout.a_shape(256, 0.5)
    assert hash(layout) == hash(BlockLayout.a_shape(256, 0.5))
    assert layout == BlockLayout.a_shape(256, 0.5) != BlockLayout.a_shape(256, 0.25)
    with pytest.raises(ValueError, match="read-only"):
        layout.block_mask[0, 0] = False


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan")])
def test_density_out_of_range(density: float):
    for build in (BlockLayout.a_shape, BlockLayout.bar):
        with pytest.raises(ValueError, match="density must lie in"):
            build(196, density)


def test_impossible_layouts():
    with pytest.raises(ValueError, match="num_bar_blocks must lie in"):
        BlockLayout(seq_len=64, num_bar_blocks=2, diagonal=False)
    with pytest.raises(ValueError, match="a bar block or the diagonal"):
        BlockLayout(seq_len=64, num_bar_blocks=0, diagonal=False)
    with pytest.raises(ValueError, match="multiple"):
        BlockLayout(seq_len=64, num_bar_blocks=1, diagonal=True, block_q=48, block_kv=32)
