"""Attention of query blocks to key blocks that they choose: what SpargeAttn and PISA share.

Queries and keys are cut into blocks in raster order; of K key blocks a query block chooses the
`max(1, floor(r K))` with the largest scores. The MLP runs on all tokens.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsesam_jax.config import ImageEncoderConfig
from sparsesam_jax.methods.sequences import (
    Grid,
    SequenceMethod,
    State,
    dense_mlp,
    sequence_work,
)
from sparsesam_jax.model.blocks import Block
from sparsesam_jax.sparsity.work import EncoderWork

BLOCK_KV = 64


@dataclasses.dataclass(frozen=True)
class BlockSelection(SequenceMethod):
    """A way to choose key blocks; `density` is the share of them that a query block chooses."""

    @abc.abstractmethod
    def selection_work(self, length: int, grid: Grid, head_dim: int) -> int:
        """Multiply-accumulates beside the chosen blocks, of one head in one sequence."""

    def kept_blocks(self, length: int) -> int:
        """Key blocks of a sequence that a query block chooses."""
        return max(1, math.floor(self.density * math.ceil(length / BLOCK_KV) + 1e-9))

    def mlp(self, block: Block, x: Array, config: ImageEncoderConfig, state: State) -> Array:
        """All tokens."""
        return dense_mlp(block, x)

    def work(self, config: ImageEncoderConfig) -> EncoderWork:
        """Attention on the chosen blocks, as if a partial last one were never among them."""

        def pairs(length: int) -> int:
            return length * min(length, BLOCK_KV * self.kept_blocks(length))

        def extra(length: int, grid: Grid) -> int:
            return self.selection_work(length, grid, config.head_dim)

        return sequence_work(config, pairs, extra)


def block_means(x: Float[Array, "S H N D"], size: int) -> Float[Array, "S H blocks D"]:
    """Mean of every block of consecutive tokens, the last one as large as it is."""
    length = x.shape[2]
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, -length % size), (0, 0))).astype(jnp.float32)
    sums = padded.reshape(*x.shape[:2], -1, size, x.shape[-1]).sum(3)
    counts = jnp.minimum(size, length - size * jnp.arange(sums.shape[2]))
    return (sums / counts[:, None]).astype(x.dtype)


def selected_blocks(scores: Float[Array, "*batch K"], count: int) -> Bool[Array, "*batch K"]:
    """Whether each score is among the `count` largest of its row; ties go to the first."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count
