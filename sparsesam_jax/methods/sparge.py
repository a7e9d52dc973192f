"""SpargeAttn's block selection by pooled similarity, applied to attention only.

Queries and keys are cut into blocks of 128 and 64 in raster order; a query block attends to the
`max(1, floor(r K))` of the K key blocks whose mean key is most similar to its mean query. Position
bias takes no part in the choice and is added to the logits. This is the released code's selection
of a fixed share (`topk`): at its default threshold no block counts as too mixed to be pooled.

Source: SpargeAttn, arXiv 2502.18137, and github thu-ml/SpargeAttn.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array

from sparsesam_jax.methods.selection import BLOCK_KV, BlockSelection, block_means, selected_blocks
from sparsesam_jax.methods.sequences import (
    Grid,
    Sequences,
    State,
    in_chunks,
    position_bias,
    product,
    softmax,
)

BLOCK_Q = 128


@dataclasses.dataclass(frozen=True)
class SpargeAttention(BlockSelection):
    """SpargeAttn; `density` is the share of key blocks that a query block attends to."""

    def attend(self, sequences: Sequences, is_global: bool, state: State) -> Array:
        """Attention to the chosen key blocks."""
        q, k = sequences.q, sequences.k
        chosen = selected_blocks(
            product("shqd,shkd->shqk", block_means(q, BLOCK_Q), block_means(k, BLOCK_KV)),
            self.kept_blocks(k.shape[2]),
        )
        mask = jnp.repeat(chosen, BLOCK_Q, axis=2)[:, :, : q.shape[2]]

        def attend(q: Array, rel_h: Array, rel_w: Array, mask: Array) -> Array:
            logits = product("shqd,shkd->shqk", q, k) * q.shape[-1] ** -0.5
            logits = logits + position_bias(sequences, rel_h, rel_w)
            mask = jnp.repeat(mask, BLOCK_KV, axis=3)[..., : k.shape[2]]
            # Chunks are filled up with queries of no block, which may see all.
            mask = mask | ~mask.any(-1, keepdims=True)
            weights = softmax(jnp.where(mask, logits, -jnp.inf))
            return product("shqk,shkd->shqd", weights.astype(q.dtype), sequences.v)

        out = in_chunks(attend, q, sequences.rel_h, sequences.rel_w, mask)
        return out.astype(q.dtype)

    def selection_work(self, length: int, grid: Grid, head_dim: int) -> int:
        """The products of the pooled blocks."""
        return math.ceil(length / BLOCK_Q) * math.ceil(length / BLOCK_KV) * head_dim
