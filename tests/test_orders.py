"""Curves and sequences: permutations with their inverses, on any grid."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsesam_jax import orders
from sparsesam_jax.orders import curve_order, stripe_sequence

sides = st.integers(1, 24)
curves = st.sampled_from(["morton", "hilbert", "raster", "random"])
layouts = st.sampled_from(["interleave", "contiguous"])


def is_permutation(sequence: np.ndarray) -> bool:
    return np.array_equal(np.sort(sequence), np.arange(len(sequence)))


@given(curves, sides, sides)
def test_curves_are_permutations_with_inverses(curve: str, height: int, width: int):
    order = curve_order(curve, height, width)
    assert is_permutation(order)
    inverse = np.asarray(orders.inverse(order))
    np.testing.assert_array_equal(order[inverse], np.arange(height * width))
    np.testing.assert_array_equal(inverse[order], np.arange(height * width))


@given(curves, layouts, sides, sides, st.integers(0, 2**32 - 1))
def test_sequences_are_permutations(curve: str, layout: str, height: int, width: int, seed: int):
    order = curve_order(curve, height, width)
    groups = len(order) // 4
    group_rank = np.random.default_rng(seed).permutation(groups)
    sequence = np.asarray(stripe_sequence(order, group_rank, layout))
    assert is_permutation(sequence)
    if layout == "interleave":  # the first stripe holds member 0 of every group, in rank order
        np.testing.assert_array_equal(sequence[:groups], order[4 * group_rank])


@given(curves, sides, sides, st.sampled_from([4, 16, 64]), st.integers(0, 2**32 - 1))
def test_block_sequences_move_whole_blocks(
    curve: str, height: int, width: int, block: int, seed: int
):
    sequence = curve_order(curve, height, width)
    full = len(sequence) // block
    block_rank = np.random.default_rng(seed).permutation(full)
    moved = np.asarray(orders.block_sequence(sequence, block_rank, block))
    assert is_permutation(moved)
    for place, source in enumerate(block_rank):
        np.testing.assert_array_equal(
            moved[place * block : (place + 1) * block],
            sequence[source * block : (source + 1) * block],
        )
    np.testing.assert_array_equal(moved[full * block :], sequence[full * block :])


@pytest.mark.parametrize("side", [2, 4, 8, 64])
def test_hilbert_steps_to_neighbours(side: int):
    rows, cols = np.divmod(curve_order("hilbert", side, side), side)
    assert (np.abs(np.diff(rows)) + np.abs(np.diff(cols)) == 1).all()


@given(st.integers(1, 16), st.integers(1, 16))
def test_morton_groups_are_squares(rows: int, cols: int):
    height, width = 2 * rows, 2 * cols
    groups = curve_order("morton", height, width).reshape(-1, 4)
    corner = groups[:, :1]
    np.testing.assert_array_equal(groups, corner + np.array([0, 1, width, width + 1]))


def test_unknown_curve():
    with pytest.raises(ValueError, match="curve must be morton"):
        curve_order("peano", 4, 4)
