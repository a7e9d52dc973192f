"""Who computes what, and when, in the stripe attention kernel: in plain integers."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.stripe_schedule import Config, Place, Schedule, step_table
from pallas_kernels.tiles import BLOCK

# Query blocks, density, warpgroups, keys of a step, programs, heads, images.
SCHEDULES = [
    (4, 0.5, 2, 64, 132, 1, 1),
    (4, 0.75, 3, 128, 5, 2, 3),  # three of four blocks a step of 128 and a tail; one block is left
    (5, 0.1, 3, 128, 2, 1, 2),  # the diagonal alone
    (2, 1.0, 3, 128, 132, 3, 1),  # fewer blocks than warpgroups
    (64, 0.3, 3, 128, 132, 16, 8),  # ViT-L
    (64, 1.0, 2, 128, 132, 16, 2),
]


def make_schedule(blocks, density, num_warpgroups, block_kv, num_programs, heads, images):
    layout = BlockLayout.a_shape(blocks * BLOCK, density)
    shape = dict(num_warpgroups=num_warpgroups, block_kv=block_kv, num_programs=num_programs)
    return Schedule(layout, Config(**shape, num_stages=3), heads, images)


def places(schedule: Schedule) -> list[tuple[int, ...]]:
    """Image, head and first block of every item, a program's after the other's."""
    return [
        tuple(map(int, schedule.place(program, count)))
        for program in range(schedule.num_programs)
        for count in range(int(schedule.num_own_items(program)))
    ]


@pytest.mark.parametrize("shape", SCHEDULES, ids=str)
def test_programs_share_out_every_query_block(shape):
    schedule = make_schedule(*shape)
    num_blocks, num_wgs = shape[0], shape[2]
    done = collections.Counter(
        (image, head, first + wg)
        for image, head, first in places(schedule)
        for wg in range(num_wgs)
        if schedule.has_block(Place(image, head, first), wg)
    )
    every = np.ndindex(shape[6], shape[5], num_blocks)
    assert done == collections.Counter(every)
    assert schedule.num_items == len(places(schedule)) == schedule.items_of_image * shape[6]


@pytest.mark.parametrize("shape", SCHEDULES, ids=str)
def test_items_that_leave_warpgroups_over_come_last(shape):
    schedule = make_schedule(*shape)
    firsts = {
        program + count * schedule.num_programs: int(schedule.place(program, count).first_block)
        for program in range(schedule.num_programs)
        for count in range(int(schedule.num_own_items(program)))
    }
    assert sorted(firsts) == list(range(schedule.num_items))
    whole = [firsts[item] + shape[2] <= shape[0] for item in sorted(firsts)]
    assert whole == sorted(whole, reverse=True)


def test_steps_of_an_item():
    schedule = make_schedule(4, 0.75, 3, 128, 5, 2, 3)  # a bar of three blocks
    assert (schedule.num_full_steps, schedule.has_tail) == (1, True)
    assert (schedule.num_shared_steps, schedule.num_diagonal_steps, schedule.num_steps) == (2, 3, 5)
    dense = make_schedule(4, 1.0, 3, 128, 5, 2, 3)
    assert (dense.num_full_steps, dense.has_tail, dense.num_steps) == (2, False, 2)


@pytest.mark.parametrize("shape", SCHEDULES, ids=str)
def test_steps_take_the_stages_in_turns(shape):
    schedule = make_schedule(*shape)
    stages = [int(schedule.stage(step)) for step in range(3 * schedule.num_steps)]
    assert stages == [step % 3 for step in range(len(stages))]


@pytest.mark.parametrize("shape", SCHEDULES, ids=str)
def test_columns_of_the_table(shape):
    """The bar's tiles, then own tiles, then who is in the bar: none between, none twice."""
    schedule, num_blocks = make_schedule(*shape), shape[0]
    tile_of_block = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    (table,) = np.asarray(step_table(tile_of_block, schedule.layout, None, shape[3]))
    parts = range(schedule.tiles_per_step)
    bar = [schedule.bar_column(i, p) for i in range(schedule.num_shared_steps) for p in parts]
    own = [schedule.own_column(block) for block in range(num_blocks)]
    in_bar = [schedule.in_bar_column(block) for block in range(num_blocks)]
    assert [*bar, *own, *in_bar] == list(range(len(table)))
    np.testing.assert_array_equal(table[own], tile_of_block)
    np.testing.assert_array_equal(
        table[in_bar], np.arange(num_blocks) < schedule.layout.num_bar_blocks
    )


TILE_OF_BLOCK = np.array([3, 1, 0, 2], np.int32)


def test_step_table_of_a_static_bar():
    layout = BlockLayout.a_shape(4 * BLOCK, 0.75)
    table = step_table(TILE_OF_BLOCK, layout, None, block_kv=2 * BLOCK)
    bar, own, in_bar = [3, 1, 0, 0], [3, 1, 0, 2], [1, 1, 1, 0]  # the bar's last step is padded
    np.testing.assert_array_equal(table, [[*bar, *own, *in_bar]])
    assert table.dtype == np.int32


def test_step_table_of_ranked_blocks():
    layout = BlockLayout.a_shape(4 * BLOCK, 0.5)
    block_order = np.array([[2, 0, 1, 3], [3, 2, 1, 0]])
    table = step_table(TILE_OF_BLOCK, layout, block_order, block_kv=BLOCK)
    own = [3, 1, 0, 2]
    expected = [[0, 3, *own, 1, 0, 1, 0], [2, 0, *own, 0, 0, 1, 1]]
    np.testing.assert_array_equal(table, expected)


def test_step_table_without_a_bar():
    layout = BlockLayout.a_shape(4 * BLOCK, 0.1)
    table = step_table(TILE_OF_BLOCK, layout, None, block_kv=2 * BLOCK)
    np.testing.assert_array_equal(table, [[3, 1, 0, 2, 0, 0, 0, 0]])
