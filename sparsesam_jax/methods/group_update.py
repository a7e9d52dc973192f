"""SparseSAM whose skipped tokens receive their group's mean update instead of nothing.

SparseSAM's routed MLP leaves a token that it skips unchanged. Here the same number M of MLP rows is
spent as: all four members of the F most important groups, and one row for each of the others, the
mean of its members after LayerNorm, whose update all of them receive:

    x_i + MLP(LN(x_i))               for the members i of the F best groups
    x_i + MLP(mean_{j in g} LN(x_j)) for the members i of any other group g

with `4 F + (G - F) = M`. Where M < G the M best groups have one row each and the rest none.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.methods.base import BlockMethod
from sparsesam_jax.methods.sequences import dense_mlp
from sparsesam_jax.model.blocks import Block
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.layers import add
from sparsesam_jax.sparsity import orders
from sparsesam_jax.sparsity.macs import mlp_work
from sparsesam_jax.sparsity.plan import Rankings, encoder_plan
from sparsesam_jax.sparsity.split import block_densities
from sparsesam_jax.sparsity.work import EncoderWork, encoder_work

Skipped = Literal["mean", "mean_input", "first"]


@dataclasses.dataclass(frozen=True)
class GroupUpdate(BlockMethod):
    """SparseSAM with group updates.

    Attributes:
        sparsity: What is kept; the `density` of this method is not used.
        skipped: A less important group's row: the `mean` of its members after LayerNorm, the
            LayerNorm of their mean (`mean_input`), or its `first` member.
        global_blocks: Whether blocks with global attention are routed too.
    """

    sparsity: Sparsity = dataclasses.field(default_factory=lambda: Sparsity(1.0))
    skipped: Skipped = "mean"
    global_blocks: bool = False

    def block_outputs(self, encoder: ImageEncoder, x: Float[Array, "B Gh Gw d"]) -> list[Array]:
        """The tokens after every block."""
        grid = (x.shape[1], x.shape[2])
        plans = encoder_plan(encoder.config, self.sparsity, grid, encoder.implementation)
        rankings, outputs = Rankings(), []
        for index, (block, plan) in enumerate(zip(encoder.blocks, plans, strict=True)):
            attended, rankings = block.attn(block.norm1(x), x, plan, rankings)
            x = add(x, attended)
            rows = self.rows(encoder.config, index, grid)
            if rows is None:
                x = dense_mlp(block, x)
            else:
                groups = self.groups(encoder.config, index, grid)
                x = add(x, self._mlp(block, x, rankings, *groups))
            outputs.append(x)
        return outputs

    def rows(self, config: ImageEncoderConfig, index: int, grid: tuple[int, int]) -> int | None:
        """Rows that a block's MLP computes; None for all tokens."""
        first = min(config.global_attn_indexes)
        start = first + 1 if self.sparsity.mlp_start is None else self.sparsity.mlp_start
        density = block_densities(config, self.sparsity)[index][1]
        if index < start or density == 1 or (config.is_global(index) and not self.global_blocks):
            return None
        return max(1, round(density * grid[0] * grid[1]))

    def groups(
        self, config: ImageEncoderConfig, index: int, grid: tuple[int, int]
    ) -> tuple[int, int]:
        """Tokens with a row of their own, and groups that share one."""
        tokens = grid[0] * grid[1]
        rows = self.rows(config, index, grid)
        if rows is None:
            return tokens, 0
        groups = tokens // orders.GROUP
        full = max(0, (rows - groups) // (orders.GROUP - 1))
        return orders.GROUP * full, min(groups, rows) - full

    def work(self, config: ImageEncoderConfig) -> EncoderWork:
        """SparseSAM's own, but for routed global blocks."""
        grid = (config.grid_size, config.grid_size)
        counted = encoder_work(config, self.sparsity)
        blocks = []
        for index, block in enumerate(counted.blocks):
            rows = self.rows(config, index, grid)
            rows = grid[0] * grid[1] if rows is None else rows
            mlp = mlp_work(config.blocks[index], rows)
            blocks.append(dataclasses.replace(block, mlp=mlp))
        return dataclasses.replace(counted, blocks=tuple(blocks))

    def _mlp(self, block: Block, x: Array, rankings: Rankings, routed: int, merged: int) -> Array:
        batch, height, width, d = x.shape
        count = height * width
        order = rankings.tokens
        assert order is not None
        tokens = x.reshape(batch, count, d)
        if self.skipped != "mean_input":
            tokens = block.norm2(tokens)
        tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
        head, tail = tokens[:, :routed], tokens[:, routed : routed + orders.GROUP * merged]
        tail = tail.reshape(batch, merged, orders.GROUP, d)
        tail = tail[:, :, 0] if self.skipped == "first" else tail.mean(2)
        kept = jnp.concatenate([head, tail], axis=1)
        update = block.mlp(block.norm2(kept) if self.skipped == "mean_input" else kept)
        head, tail = update[:, : head.shape[1]], update[:, head.shape[1] :]
        update = jnp.concatenate([head, jnp.repeat(tail, orders.GROUP, axis=1)], axis=1)
        update = jnp.pad(update, ((0, 0), (0, count - update.shape[1]), (0, 0)))
        update = jnp.take_along_axis(update, orders.inverse(order)[..., None], axis=1)
        return update.reshape(x.shape)
