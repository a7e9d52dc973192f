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
from jaxtyping import Array, Float

from sparsesam_jax.config import ImageEncoderConfig
from sparsesam_jax.image_encoder import Block
from sparsesam_jax.methods.sequences import (
    Grid,
    SequenceMethod,
    Sequences,
    State,
    dense_mlp,
    in_chunks,
    position_bias,
    product,
    sequence_work,
    softmax,
)
from sparsesam_jax.work import EncoderWork

BLOCK_Q, BLOCK_KV = 128, 64


@dataclasses.dataclass(frozen=True)
class SpargeAttention(SequenceMethod):
    """SpargeAttn; `density` is the share of key blocks that a query block attends to."""

    def attend(self, sequences: Sequences, is_global: bool, state: State) -> Array:
        """Attention to the chosen key blocks."""
        q, k = sequences.q, sequences.k
        chosen = selected_blocks(
            product("shqd,shkd->shqk", block_means(q, BLOCK_Q), block_means(k, BLOCK_KV)),
            kept_blocks(k.shape[2], BLOCK_KV, self.density),
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

    def mlp(self, block: Block, x: Array, config: ImageEncoderConfig, state: State) -> Array:
        """All tokens."""
        return dense_mlp(block, x)

    def work(self, config: ImageEncoderConfig) -> EncoderWork:
        """Attention on the chosen blocks, and the products of the pooled ones."""

        def pairs(length: int) -> int:
            return length * kept_keys(length, BLOCK_KV, self.density)

        def extra(length: int, grid: Grid) -> int:
            blocks = math.ceil(length / BLOCK_Q) * math.ceil(length / BLOCK_KV)
            return blocks * config.head_dim

        return sequence_work(config, pairs, extra)


def block_means(x: Float[Array, "S H N D"], size: int) -> Float[Array, "S H blocks D"]:
    """Mean of every block of consecutive tokens, the last one as large as it is."""
    length = x.shape[2]
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, -length % size), (0, 0))).astype(jnp.float32)
    sums = padded.reshape(*x.shape[:2], -1, size, x.shape[-1]).sum(3)
    counts = jnp.minimum(size, length - size * jnp.arange(sums.shape[2]))
    return (sums / counts[:, None]).astype(x.dtype)


def kept_blocks(length: int, size: int, density: float) -> int:
    """Blocks of a sequence that are kept at a density."""
    return max(1, math.floor(density * math.ceil(length / size) + 1e-9))


def kept_keys(length: int, size: int, density: float) -> int:
    """Keys of so many blocks, as if a partial last one were never chosen."""
    return min(length, size * kept_blocks(length, size, density))


def selected_blocks(scores: Float[Array, "*batch K"], count: int) -> Array:
    """Whether each score is among the `count` largest of its row; ties go to the first."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count
