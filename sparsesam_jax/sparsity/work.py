"""Multiply-accumulates of the image encoder at a sparsity, block by block.

What counts is said in `sparsesam_jax.sparsity.macs`.
"""

from __future__ import annotations

import dataclasses

from sparsesam_jax.config import EncoderConfig, Grid, Sparsity
from sparsesam_jax.sparsity.macs import (
    attention_work,
    computed_pairs,
    mlp_work,
    projection_work,
)
from sparsesam_jax.sparsity.plan import attention_layout, num_routed_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockWork:
    """Multiply-accumulates of one transformer block, for one image.

    Attributes:
        projections: Queries, keys, values and output.
        attention: Logits, position bias and weighted values.
        mlp: Both layers of the MLP.
        extra: Whatever else a method adds, such as similarities between tokens.
    """

    projections: int
    attention: int
    mlp: int
    extra: int = 0

    @property
    def total(self) -> int:
        """All of the block."""
        return self.projections + self.attention + self.mlp + self.extra


@dataclasses.dataclass(frozen=True)
class EncoderWork:
    """Multiply-accumulates of a whole encoder, for one image.

    Attributes:
        blocks: One entry a transformer block.
        fixed: All that is outside of the blocks.
    """

    blocks: tuple[BlockWork, ...]
    fixed: int

    @property
    def total(self) -> int:
        """All of the encoder."""
        return self.fixed + sum(block.total for block in self.blocks)


def encoder_work(
    config: EncoderConfig, sparsity: Sparsity | None = None, grid: Grid | None = None
) -> EncoderWork:
    """What one image costs at a sparsity.

    Args:
        config: Shape of the encoder.
        sparsity: What is kept; None is dense.
        grid: Rows and columns of tokens; None is the configuration's.
    """
    grid = grid or (config.grid_size, config.grid_size)
    tokens = grid[0] * grid[1]
    blocks = []
    for index, block in enumerate(config.blocks):
        routed = num_routed_tokens(config, sparsity, index, grid)
        layout = attention_layout(config, sparsity, index, grid)
        blocks.append(
            BlockWork(
                projections=projection_work(block, tokens),
                attention=attention_work(block, grid, computed_pairs(layout)),
                mlp=mlp_work(block, tokens if routed is None else routed),
            )
        )
    return EncoderWork(tuple(blocks), config.other_work(tokens))
