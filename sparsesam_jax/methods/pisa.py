"""Piecewise sparse attention: chosen key blocks exactly, all others through their means.

Blocks of 64 queries and 64 keys in raster order. With `kbar_j` the mean key of block j, `b_j` the
mean position bias, `n_j` its tokens and `H_j = sum_n (k_n - kbar_j)^T v_n`, a block that is not
chosen adds `exp(q kbar_j / sqrt(D) + b_j) sum_n v_n` to the numerator and `n_j exp(...)` to the
denominator, and all of them together the first-order term `q Hbar / sqrt(D)` times their share of
the denominator, `Hbar = sum_j H_j / N`. A query block chooses the `max(1, floor(r K))` blocks with
the largest `qbar kbar_j / sqrt(D) + log(||H_j - Hbar_j||)`, `Hbar_j` the mean of `H_j`.

Source: PISA, arXiv 2602.01077; position bias is not part of it and enters as above.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

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
)
from sparsesam_jax.methods.sparge import block_means, kept_blocks, kept_keys, selected_blocks
from sparsesam_jax.work import EncoderWork

BLOCK = 64
_EPSILON = 1e-5  # as in the paper's routing


@dataclasses.dataclass(frozen=True)
class PiecewiseAttention(SequenceMethod):
    """PISA; `density` is the share of key blocks that are computed exactly."""

    def attend(self, sequences: Sequences, is_global: bool, state: State) -> Array:
        """Attention to the chosen blocks' keys and the other blocks' means."""
        q, k, v = sequences.q, sequences.k, sequences.v
        length, scale = k.shape[2], q.shape[-1] ** -0.5
        means = block_means(k, BLOCK)
        blocks = means.shape[2]
        block_of = np.arange(length) // BLOCK
        counts = np.bincount(block_of).astype(np.float32)
        members = (np.arange(blocks)[:, None] == block_of).astype(np.float32)  # [K, N]
        first_order = product(
            "jn,shnd,shne->shjde", jnp.asarray(members), k - means[:, :, block_of], v
        )
        spread = first_order - first_order.mean(2, keepdims=True)
        weight = jnp.log(jnp.sqrt((spread**2).sum((-2, -1))) + _EPSILON)
        scores = product("shid,shjd->shij", block_means(q, BLOCK), means) * scale
        count = kept_blocks(length, BLOCK, self.density)
        chosen = selected_blocks(scores + weight[:, :, None], count)
        slope = first_order.sum(2) * scale / length
        sums = product("jn,shnd->shjd", jnp.asarray(members), v)
        rows, cols = (
            jnp.asarray(members @ np.eye(side, dtype=np.float32)[place] / counts[:, None])
            for side, place in zip(sequences.grid, (sequences.rows, sequences.cols), strict=True)
        )  # share of a block's tokens in every row and column

        def attend(q: Array, rel_h: Array, rel_w: Array, chosen: Array) -> Array:
            exact = product("shqd,shkd->shqk", q, k) * scale
            exact = exact + position_bias(sequences, rel_h, rel_w)
            exact = jnp.where(chosen[..., block_of], exact, -jnp.inf)
            mean = product("shqd,shjd->shqj", q, means) * scale
            mean = mean + product("shqr,jr->shqj", rel_h, rows)
            mean = mean + product("shqc,jc->shqj", rel_w, cols)
            mean = jnp.where(chosen, -jnp.inf, mean)
            top = jnp.maximum(exact.max(-1), mean.max(-1))[..., None]
            exact, mean = jnp.exp(exact - top), jnp.exp(mean - top)
            tail = (mean * counts).sum(-1, keepdims=True)
            out = product("shqk,shkd->shqd", exact, v.astype(jnp.float32))
            out = out + product("shqj,shjd->shqd", mean, sums)
            out = out + tail * product("shqd,shde->shqe", q.astype(jnp.float32), slope)
            return out / (exact.sum(-1, keepdims=True) + tail)

        of_query = jnp.repeat(chosen, BLOCK, axis=2)[:, :, : q.shape[2]]
        out = in_chunks(attend, q, sequences.rel_h, sequences.rel_w, of_query)
        return out.astype(q.dtype)

    def mlp(self, block: Block, x: Array, config: ImageEncoderConfig, state: State) -> Array:
        """All tokens."""
        return dense_mlp(block, x)

    def work(self, config: ImageEncoderConfig) -> EncoderWork:
        """Attention on the chosen blocks; means, slopes and the choice are extra."""

        def pairs(length: int) -> int:
            return length * kept_keys(length, BLOCK, self.density)

        def extra(length: int, grid: Grid) -> int:
            blocks = math.ceil(length / BLOCK)
            others = blocks - kept_blocks(length, BLOCK, self.density)
            if others == 0:
                return 0
            means = length * others * (2 * config.head_dim + sum(grid))
            slopes = 2 * length * config.head_dim**2  # H_j, and its product with the queries
            return means + slopes + blocks**2 * config.head_dim

        return sequence_work(config, pairs, extra)
