"""Curves and sequences: permutations with their inverses, on any grid."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsesam_jax.sparsity import orders
from sparsesam_jax.sparsity.orders import curve_order, stripe_sequence

sides = st.integers(1, 24)
# What runs in JAX compiles once a shape: fewer than a group, prime, narrow and square grids.
grids = st.sampled_from([(1, 1), (1, 3), (5, 1), (3, 7), (6, 4), (8, 8), (13, 24)])
curves = st.sampled_from(["morton", "hilbert", "raster", "random"])
layouts = st.sampled_from(["interleave", "contiguous"])


def is_permutation(sequence: np.ndarray) -> bool:
    return np.array_equal(np.sort(sequence), np.arange(len(sequence)))


@given(curves, sides, sides)
def test_curves_are_permutations(curve: str, height: int, width: int):
    assert is_permutation(curve_order(curve, height, width))


@given(curves, grids)
def test_curves_have_inverses(curve: str, grid: tuple[int, int]):
    order = curve_order(curve, *grid)
    inverse = np.asarray(orders.inverse(order))
    np.testing.assert_array_equal(order[inverse], np.arange(len(order)))
    np.testing.assert_array_equal(inverse[order], np.arange(len(order)))


@given(curves, layouts, grids, st.integers(0, 2**32 - 1))
def test_sequences_are_permutations(curve: str, layout: str, grid: tuple[int, int], seed: int):
    order = curve_order(curve, *grid)
    groups = len(order) // 4
    group_rank = np.random.default_rng(seed).permutation(groups)
    sequence = np.asarray(stripe_sequence(order, group_rank, layout))
    assert is_permutation(sequence)
    if layout == "interleave":  # the first stripe holds member 0 of every group, in rank order
        np.testing.assert_array_equal(sequence[:groups], order[4 * group_rank])


@given(curves, grids, st.sampled_from([4, 16, 64]), st.integers(0, 2**32 - 1))
def test_block_sequences_move_whole_blocks(
    curve: str, grid: tuple[int, int], block: int, seed: int
):
    sequence = curve_order(curve, *grid)
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


@pytest.mark.parametrize("bar", [0, 5, 10, 16, 25, 64])
def test_spread_sequence_is_a_prefix_of_blocks_over_the_whole_image(bar: int):
    order = orders.curve_order("morton", 64, 64)
    unranked = np.asarray(orders.stripe_sequence(order, np.arange(1024), "interleave"))
    sequence = orders.spread_sequence(unranked, bar, 64)
    assert sorted(sequence) == list(range(4096))
    blocks = {tuple(block) for block in unranked.reshape(64, 64)}
    assert {tuple(block) for block in sequence.reshape(64, 64)} == blocks
    rows = sequence[: bar * 64] // 64
    # Every quarter of the rows has its share, to one block of 64 tokens a stripe.
    shares = np.histogram(rows, bins=4, range=(0, 64))[0]
    assert np.ptp(shares) <= 128


def test_spread_sequence_keeps_a_partial_last_block():
    order = orders.curve_order("morton", 14, 14)
    unranked = np.asarray(orders.stripe_sequence(order, np.arange(49), "interleave"))
    sequence = orders.spread_sequence(unranked, 2, 64)
    assert sorted(sequence) == list(range(196))
    np.testing.assert_array_equal(sequence[192:], unranked[192:])
