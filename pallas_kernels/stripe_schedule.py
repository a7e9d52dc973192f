"""Who computes what, and when, in the stripe attention kernel: arithmetic of indices, no Pallas.

A query block is 64 queries of one head. An *item* of work is as many of them, of one head, as a
program has warpgroups; a program takes every `num_programs`-th item. The *steps* of an item are the
keys that it computes: first those of the bar, in steps of `block_kv` keys that all its warpgroups
share, then, where the layout has a diagonal, one step for every warpgroup: its own 64 keys. Steps
go through the program's stages in shared memory in turns, over the ends of items.

What a program looks up is a table (`step_table`), with a row for all images or one an image:

    the bar's tiles, whole steps of them | every block's own tile | whether a block is in the bar
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.hopper import MULTIPROCESSORS
from pallas_kernels.tiles import BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel runs; `stripe_memory.fits` says where it can.

    Attributes:
        num_warpgroups: Query blocks in a program, one a warpgroup; at most `num_stages`.
        block_kv: Keys in a step, 64 or 128.
        num_stages: Steps in flight between TMA and the warpgroups.
        num_programs: Programs at most.
    """

    num_warpgroups: int
    block_kv: int
    num_stages: int
    num_programs: int = MULTIPROCESSORS


class Place(NamedTuple):
    """An item of work: image and head, and the first of its query blocks."""

    image: Any
    head: Any
    first_block: Any


class Schedule(NamedTuple):
    """The items of a launch, their steps, and the columns of the table.

    Indices may be traced or plain integers.

    Attributes:
        layout: The block layout.
        config: How the kernel runs.
        num_heads: Heads H.
        num_images: Images that the launch attends to.
    """

    layout: BlockLayout
    config: Config
    num_heads: int
    num_images: int

    @property
    def tiles_per_step(self) -> int:
        """Tiles of 64 keys in a step of the bar."""
        return self.config.block_kv // BLOCK

    @property
    def num_full_steps(self) -> int:
        """Steps of the bar whose tiles are all its own."""
        return self.layout.num_bar_blocks // self.tiles_per_step

    @property
    def has_tail(self) -> bool:
        """Whether the bar ends with a step of one tile."""
        return self.layout.num_bar_blocks % self.tiles_per_step > 0

    @property
    def num_shared_steps(self) -> int:
        """Steps of an item that all warpgroups compute."""
        return self.num_full_steps + self.has_tail

    @property
    def num_diagonal_steps(self) -> int:
        """Steps of an item that one warpgroup computes each."""
        return self.config.num_warpgroups if self.layout.diagonal else 0

    @property
    def num_steps(self) -> int:
        """Steps of an item."""
        return self.num_shared_steps + self.num_diagonal_steps

    @property
    def num_whole_items(self) -> int:
        """Items of a head with a query block for every warpgroup."""
        return self.layout.num_q_blocks // self.config.num_warpgroups

    @property
    def has_rest(self) -> bool:
        """Whether the last item of a head leaves warpgroups without a query block."""
        return self.layout.num_q_blocks % self.config.num_warpgroups > 0

    @property
    def items_of_image(self) -> int:
        """Items of one image, of which every program takes one at a time."""
        return (self.num_whole_items + self.has_rest) * self.num_heads

    @property
    def num_items(self) -> int:
        """Items of the launch."""
        return self.items_of_image * self.num_images

    @property
    def num_programs(self) -> int:
        """Programs of the launch."""
        return min(self.config.num_programs, self.num_items)

    def num_own_items(self, program: Any) -> Any:
        """Items of one program."""
        return lax.div(self.num_items - 1 - program, self.num_programs) + 1

    def place(self, program: Any, count: Any) -> Place:
        """A program's item `count`.

        Items with warpgroups left over come last: they fill the end of the launch.
        """
        item = program + count * self.num_programs
        num_whole, per_head = self.num_heads * self.num_images, max(self.num_whole_items, 1)
        num_whole *= self.num_whole_items
        is_rest = item >= num_whole
        head = jnp.where(is_rest, item - num_whole, lax.div(item, per_head))
        index = jnp.where(is_rest, self.num_whole_items, lax.rem(item, per_head))
        image, head = lax.div(head, self.num_heads), lax.rem(head, self.num_heads)
        return Place(image, head, index * self.config.num_warpgroups)

    def block(self, place: Place, warpgroup: Any) -> Any:
        """A warpgroup's query block, or the head's last where there is none for it."""
        return jnp.minimum(place.first_block + warpgroup, self.layout.num_q_blocks - 1)

    def has_block(self, place: Place, warpgroup: Any) -> Any:
        """Whether there is a query block for the warpgroup."""
        return place.first_block + warpgroup < self.layout.num_q_blocks

    def stage(self, step: Any) -> Any:
        """The stage of a program's step, which counts over its items."""
        return lax.rem(step, self.config.num_stages)

    def bar_column(self, step: Any, part: int) -> Any:
        """Where the table has a tile of a step of the bar."""
        return step * self.tiles_per_step + part

    def own_column(self, block: Any) -> Any:
        """Where the table has a block's own tile."""
        return self.num_shared_steps * self.tiles_per_step + block

    def in_bar_column(self, block: Any) -> Any:
        """Where the table has 1 for a block of the bar, else 0."""
        first = self.num_shared_steps * self.tiles_per_step
        return first + self.layout.num_q_blocks + block


def step_table(
    tile_of_block: np.ndarray, layout: BlockLayout, block_order: Array | None, block_kv: int
) -> Int[Array, "tables columns"]:
    """What the kernel looks up: the bar's tiles, every block's own tile, and who is in the bar.

    The bar is padded to whole steps by its last tile. With a `block_order` [B, blocks], rank ->
    block, the bar differs by image.
    """
    num_bar = layout.num_bar_blocks
    blocks = np.arange(len(tile_of_block), dtype=np.int32)
    order = jnp.asarray(blocks[None] if block_order is None else block_order, jnp.int32)
    rank = blocks[None] if block_order is None else jnp.argsort(block_order, axis=-1)
    padding = -num_bar % (block_kv // BLOCK)
    bar = jnp.pad(jnp.asarray(tile_of_block)[order[:, :num_bar]], ((0, 0), (0, padding)), "edge")
    own = jnp.broadcast_to(tile_of_block, (len(order), len(tile_of_block)))
    in_bar = jnp.asarray(rank < num_bar, jnp.int32)
    return jnp.concatenate([bar, own, in_bar], axis=-1)
