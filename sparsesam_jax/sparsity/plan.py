"""What one forward of the encoder keeps: static block layouts, and rankings as they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import BlockLayout
from pallas_kernels.implementation import Implementation
from pallas_kernels.reference import window_partition
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.sparsity import orders, split
from sparsesam_jax.sparsity.importance import block_importance, group_importance, rank
from sparsesam_jax.sparsity.macs import Grid


class AttentionTables(NamedTuple):
    """What a block's attention derives from its weights alone, in the compute dtype.

    Attributes:
        qkv_bias: The projection's bias of the queries; keys and values have none.
        proj_bias: The output's bias and, passed through the output's kernel, that of the values.
        rel_pos_h: What every query row adds for every key row of the grid, or of the window, which
            is padded as `window_attention` likes it.
        rel_pos_w: The same for columns.
    """

    qkv_bias: Float[Array, " 3*d"]
    proj_bias: Float[Array, " d"]
    rel_pos_h: Float[Array, "Gh side D"]
    rel_pos_w: Float[Array, "Gw side D"]


def check_sparsity(sparsity: Sparsity, config: ImageEncoderConfig) -> None:
    """Raise ValueError if the sparsity does not fit an encoder of this shape."""
    split.block_densities(config, sparsity)
    first = split.first_global(config)
    if sparsity.mlp_start is not None and sparsity.mlp_start <= first:
        raise ValueError(
            f"mlp_start must lie behind the first global block ({first}), which ranks the tokens; "
            f"got {sparsity.mlp_start}"
        )


def attention_layout(
    config: ImageEncoderConfig, sparsity: Sparsity | None, index: int, grid: Grid
) -> BlockLayout:
    """The block layout of one block's attention on a token grid (of its window, if windowed)."""
    if sparsity is None:
        return split.attention_layout(config, index, grid, 1.0)
    density = split.block_densities(config, sparsity)[index][0]
    return split.attention_layout(config, index, grid, density, sparsity.block_size)


def num_routed_tokens(
    config: ImageEncoderConfig, sparsity: Sparsity | None, index: int, grid: Grid
) -> int | None:
    """Tokens M that a block's MLP runs on, or None where it runs on all: `max(1, round(r N))`."""
    if sparsity is None or not split.is_routed(config, sparsity, index):
        return None
    density = split.block_densities(config, sparsity)[index][1]
    return None if density == 1 else max(1, round(density * grid[0] * grid[1]))


@dataclasses.dataclass
class Plan:
    """What the blocks of one forward share: static layouts, and the rankings once they are made."""

    config: ImageEncoderConfig
    sparsity: Sparsity | None
    grid: Grid
    implementation: Implementation
    tables: Sequence[AttentionTables] = ()  # empty: every block makes its own
    window_order: Array | np.ndarray | None = None  # rank -> place in the window
    grid_sequence: Array | np.ndarray | None = None  # rank -> raster index
    block_order: Array | None = None  # [B, num_kv_blocks], rank -> key block
    token_order: Array | None = None  # [B, N], the routed MLP's order

    def layout(self, index: int) -> BlockLayout:
        """The block layout of one block's attention."""
        return attention_layout(self.config, self.sparsity, index, self.grid)

    def window_layout(self, index: int) -> tuple[BlockLayout | None, Array | np.ndarray | None]:
        """Layout and order of windowed attention; None for dense."""
        layout = self.layout(index)
        if layout.is_dense:
            return None, None
        return layout, self._spread(self.window_order, layout)

    def grid_layout(
        self, index: int
    ) -> tuple[BlockLayout, Array | np.ndarray | None, Array | None]:
        """Layout, token sequence and block order of global attention; dense stays in raster."""
        layout = self.layout(index)
        if layout.is_dense:
            return layout, None, None
        return layout, self._spread(self.grid_sequence, layout), self.block_order

    def _spread(
        self, sequence: Array | np.ndarray | None, layout: BlockLayout
    ) -> Array | np.ndarray | None:
        """The sequence that gives the layout's bar its blocks."""
        if self.sparsity is None or self.sparsity.ranking != "spread":
            return sequence
        assert isinstance(sequence, np.ndarray)
        return orders.spread_sequence(sequence, layout.num_bar_blocks, layout.block_kv)

    def routed_tokens(self, index: int) -> Int[Array, "B M"] | None:
        """Raster indices of the tokens that the block's MLP runs on; None for all."""
        count = num_routed_tokens(self.config, self.sparsity, index, self.grid)
        if count is None:
            return None
        assert self.token_order is not None
        # The set is what counts: in memory order neighbours are read and written together.
        return jnp.sort(self.token_order[:, :count], axis=1)

    def rank_windows(self, k: Array, key_bias: Array, block_input: Array) -> None:
        """At the first windowed block: the order of the tokens in each window."""
        sparsity = self.sparsity
        if sparsity is None or self.window_order is not None:
            return
        side = self.config.window_size
        order = orders.curve_order(sparsity.curve, side, side, sparsity.seed)
        if sparsity.ranking in ("spread", "none"):
            self.window_order = _unranked(order, sparsity)
            return
        if sparsity.features == "keys":
            features = window_partition(k, side) + key_bias  # padded tokens have k = b_k
        else:
            features = window_partition(block_input, side)[:, :, None]
        scores = self._scores(features, order, (side, side))  # [B W, H or 1, G]
        scores = scores.reshape(k.shape[0], -1, *scores.shape[1:])
        if sparsity.ranking == "group":
            sequence = orders.stripe_sequence(order, rank(scores), sparsity.layout)
        else:
            unranked = _unranked(order, sparsity)
            blocks = block_importance(scores, order, unranked, sparsity.block_size)
            sequence = orders.block_sequence(unranked, rank(blocks), sparsity.block_size)
        self.window_order = sequence if sparsity.per_head else sequence[:, :, 0]

    def rank_grid(self, k: Array, key_bias: Array, block_input: Array) -> None:
        """At the first global block: the sequence of global attention and the MLP's token order."""
        sparsity = self.sparsity
        if sparsity is None or self.token_order is not None:
            return
        order = orders.curve_order(sparsity.curve, *self.grid, sparsity.seed)
        features = k + key_bias if sparsity.features == "keys" else block_input[..., None, :]
        features = features.reshape(k.shape[0], -1, *features.shape[3:])
        scores = self._scores(features, order, self.grid)  # [B, H or 1, G]
        group_rank = rank(scores)
        self.token_order = orders.token_order(order, group_rank)
        if sparsity.ranking == "group":
            sequence = orders.stripe_sequence(order, group_rank, sparsity.layout)
            self.grid_sequence = sequence if sparsity.per_head else sequence[:, 0]
            return
        self.grid_sequence = unranked = _unranked(order, sparsity)
        if sparsity.ranking == "block":
            blocks = block_importance(scores.mean(1), order, unranked, sparsity.block_size)
            partial = len(unranked) // sparsity.block_size
            last = np.arange(partial, -(-len(unranked) // sparsity.block_size))
            last = jnp.broadcast_to(last, (blocks.shape[0], len(last)))
            self.block_order = jnp.concatenate([rank(blocks), last], axis=-1)

    def _scores(self, features: Array, order: np.ndarray, grid: Grid) -> Array:
        """Group scores [B, H or 1, G] of features [B, N, H, C]; heads that share are one."""
        assert self.sparsity is not None
        if not self.sparsity.per_head:
            features = features.reshape(*features.shape[:2], 1, -1)
        return group_importance(
            features.swapaxes(1, 2),
            order,
            grid=grid,
            importance=self.sparsity.importance,
            seed=self.sparsity.seed,
        )


def _unranked(order: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """The static sequence of the groups in the curve's own order."""
    groups = np.arange(len(order) // orders.GROUP)
    with jax.ensure_compile_time_eval():
        return np.asarray(orders.stripe_sequence(order, groups, sparsity.layout))
