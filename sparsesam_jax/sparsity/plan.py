"""What every block of a forward does, known when it is traced, and the rankings that it passes on.

`encoder_plan` gives each block a `BlockPlan`, static and hashable: blocks with equal plans are
traced once. The first windowed and the first global block rank tokens by importance; the rankings
are a value, `Rankings`, that every block takes and returns.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels import BlockLayout
from pallas_kernels.implementation import Implementation
from pallas_kernels.reference import window_partition
from sparsesam_jax.config import BlockConfig, EncoderConfig, Grid, Sparsity
from sparsesam_jax.sparsity import orders, split
from sparsesam_jax.sparsity.importance import block_importance, group_importance, rank

Sequence = Array | np.ndarray  # static where it is a numpy array


class Rankings(NamedTuple):
    """What is important in the images of a forward, as far as it is ranked.

    None is what no block has ranked, or what is static and so is in the plan.

    Attributes:
        window: Rank -> place in the window, [B, W, w w] or [B, W, H, w w].
        grid: Rank -> raster index, [B, N] or [B, H, N].
        blocks: Rank -> key block of global attention, [B, num_kv_blocks].
        tokens: The routed MLP's order of tokens, rank -> raster index, [B, N].
    """

    window: Int[Array, "B W *heads ww"] | None = None
    grid: Int[Array, "B *heads N"] | None = None
    blocks: Int[Array, "B num_kv_blocks"] | None = None
    tokens: Int[Array, "B N"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """What one block does in a forward.

    Attributes:
        block: The block.
        sparsity: How tokens are ranked; None ranks nothing.
        grid: Rows and columns of tokens.
        frame: Those of the grid that this one is the top left part of, which says the positions.
        layout: Of its attention.
        num_routed: Tokens M that its MLP runs on; None is all.
        ranks: Whether it is the first of its kind, which ranks the tokens.
        implementation: As for `Sam`.
    """

    block: BlockConfig
    sparsity: Sparsity | None
    grid: Grid
    frame: Grid
    layout: BlockLayout
    num_routed: int | None
    ranks: bool
    implementation: Implementation

    def attention_order(self, rankings: Rankings) -> tuple[Sequence | None, Array | None]:
        """The sequence that the layout cuts into blocks and the order of key blocks.

        Both are None for dense attention, which takes tokens in raster order.
        """
        if self.sparsity is None or self.layout.is_dense:
            return None, None
        sequence = self.sequence(rankings)
        if self.sparsity.ranking == "spread":
            assert isinstance(sequence, np.ndarray)
            bar = self.layout.num_bar_blocks
            sequence = orders.spread_sequence(sequence, bar, self.layout.block_kv)
        return sequence, rankings.blocks if self.block.is_global else None

    def sequence(self, rankings: Rankings) -> Sequence:
        """Rank -> raster index in the grid or window, static where nothing is ranked."""
        assert self.sparsity is not None
        ranked = rankings.grid if self.block.is_global else rankings.window
        if ranked is not None:
            return ranked
        side = self.block.window_size
        return _unranked(self.sparsity, self.grid if side is None else (side, side))

    def routed_tokens(self, rankings: Rankings) -> Int[Array, "B M"] | None:
        """Raster indices of the tokens that the MLP runs on; None for all."""
        if self.num_routed is None:
            return None
        assert rankings.tokens is not None, "blocks are routed behind the one that ranks"
        # The set is what counts: in memory order neighbours are read and written together.
        return jnp.sort(rankings.tokens[:, : self.num_routed], axis=1)

    def rank(self, rankings: Rankings, k: Array, key_bias: Array, block_input: Array) -> Rankings:
        """The rankings, with the block's own where it is the first of its kind.

        Args:
            rankings: Those of the blocks before.
            k: Keys without their bias, [B, Gh, Gw, H, D].
            key_bias: [H, D].
            block_input: The residual stream, [B, Gh, Gw, d].
        """
        if not self.ranks or self.sparsity is None:
            return rankings
        rank_kind = self._rank_grid if self.block.is_global else self._rank_windows
        return rankings._replace(**rank_kind(self.sparsity, k, key_bias, block_input))

    def _rank_windows(
        self, sparsity: Sparsity, k: Array, key_bias: Array, block_input: Array
    ) -> dict[str, Array]:
        side = self.block.window_size
        assert side is not None
        if sparsity.ranking in ("spread", "none"):
            return {}
        if sparsity.features == "keys":
            features = window_partition(k, side) + key_bias  # padded tokens have k = b_k
        else:
            features = window_partition(block_input, side)[:, :, None]
        order = orders.curve_order(sparsity.curve, side, side, sparsity.seed)
        scores = _scores(sparsity, features, order, (side, side))  # [B W, H or 1, G]
        scores = scores.reshape(k.shape[0], -1, *scores.shape[1:])
        if sparsity.ranking == "group":
            sequence = orders.stripe_sequence(order, rank(scores), sparsity.layout)
        else:
            unranked = _unranked(sparsity, (side, side))
            blocks = block_importance(scores, order, unranked, sparsity.block_size)
            sequence = orders.block_sequence(unranked, rank(blocks), sparsity.block_size)
        return {"window": sequence if sparsity.per_head else sequence[:, :, 0]}

    def _rank_grid(
        self, sparsity: Sparsity, k: Array, key_bias: Array, block_input: Array
    ) -> dict[str, Array]:
        features = k + key_bias if sparsity.features == "keys" else block_input[..., None, :]
        features = features.reshape(k.shape[0], -1, *features.shape[3:])
        order = orders.curve_order(sparsity.curve, *self.grid, sparsity.seed)
        scores = _scores(sparsity, features, order, self.grid)  # [B, H or 1, G]
        group_rank = rank(scores)
        found = {"tokens": orders.token_order(order, group_rank)}
        if sparsity.ranking == "group":
            sequence = orders.stripe_sequence(order, group_rank, sparsity.layout)
            found["grid"] = sequence if sparsity.per_head else sequence[:, 0]
        elif sparsity.ranking == "block":
            unranked = _unranked(sparsity, self.grid)
            blocks = block_importance(scores.mean(1), order, unranked, sparsity.block_size)
            partial = len(unranked) // sparsity.block_size
            last = np.arange(partial, -(-len(unranked) // sparsity.block_size))
            last = jnp.broadcast_to(last, (blocks.shape[0], len(last)))
            found["blocks"] = jnp.concatenate([rank(blocks), last], axis=-1)
        return found


@functools.lru_cache(maxsize=256)
def encoder_plan(
    config: EncoderConfig,
    sparsity: Sparsity | None,
    grid: Grid,
    implementation: Implementation,
    frame: Grid | None = None,
) -> tuple[BlockPlan, ...]:
    """What every block of an encoder does on a grid of tokens, part of a frame or whole."""
    plans, seen = [], set()
    for index, block in enumerate(config.blocks):
        plans.append(
            BlockPlan(
                block=block,
                sparsity=sparsity,
                grid=grid,
                frame=frame or grid,
                layout=attention_layout(config, sparsity, index, grid),
                num_routed=num_routed_tokens(config, sparsity, index, grid),
                ranks=sparsity is not None and block.is_global not in seen,
                implementation=implementation,
            )
        )
        seen.add(block.is_global)
    return tuple(plans)


def check_sparsity(sparsity: Sparsity, config: EncoderConfig) -> None:
    """Raise ValueError if the sparsity does not fit an encoder of this shape."""
    split.block_densities(config, sparsity)
    first = split.first_global(config)
    if sparsity.mlp_start is not None and sparsity.mlp_start <= first:
        raise ValueError(
            f"mlp_start must lie behind the first global block ({first}), which ranks the tokens; "
            f"got {sparsity.mlp_start}"
        )


def attention_layout(
    config: EncoderConfig, sparsity: Sparsity | None, index: int, grid: Grid
) -> BlockLayout:
    """The block layout of one block's attention on a token grid (of its window, if windowed)."""
    block = config.blocks[index]
    if sparsity is None:
        return split.attention_layout(block, grid, 1.0)
    density = split.block_densities(config, sparsity)[index][0]
    return split.attention_layout(block, grid, density, sparsity.block_size)


def num_routed_tokens(
    config: EncoderConfig, sparsity: Sparsity | None, index: int, grid: Grid
) -> int | None:
    """Tokens M that a block's MLP runs on, or None where it runs on all: `max(1, round(r N))`."""
    if sparsity is None or not split.is_routed(config, sparsity, index):
        return None
    density = split.block_densities(config, sparsity)[index][1]
    return None if density == 1 else max(1, round(density * grid[0] * grid[1]))


def _scores(sparsity: Sparsity, features: Array, order: np.ndarray, grid: Grid) -> Array:
    """Group scores [B, H or 1, G] of features [B, N, H, C]; heads that share are one."""
    if not sparsity.per_head:
        features = features.reshape(*features.shape[:2], 1, -1)
    return group_importance(
        features.swapaxes(1, 2),
        order,
        grid=grid,
        importance=sparsity.importance,
        seed=sparsity.seed,
    )


def _unranked(sparsity: Sparsity, grid: Grid) -> np.ndarray:
    """The static sequence of the groups in the curve's own order."""
    order = orders.curve_order(sparsity.curve, *grid, sparsity.seed)
    groups = np.arange(len(order) // orders.GROUP)
    with jax.ensure_compile_time_eval():
        return np.asarray(orders.stripe_sequence(order, groups, sparsity.layout))
