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

from sparsesam_jax.methods.selection import BLOCK_KV, BlockSelection, block_means, selected_blocks
from sparsesam_jax.methods.sequences import (
    Grid,
    Sequences,
    State,
    in_chunks,
    position_bias,
    product,
)

BLOCK_Q = 64
_EPSILON = 1e-5  # as in the paper's routing


@dataclasses.dataclass(frozen=True)
class PiecewiseAttention(BlockSelection):
    """PISA; `density` is the share of key blocks that are computed exactly."""

    def attend(self, sequences: Sequences, is_global: bool, state: State) -> Array:
        """Attention to the chosen blocks' keys and the other blocks' means."""
        q, k, v = sequences.q, sequences.k, sequences.v
        length, scale = k.shape[2], q.shape[-1] ** -0.5
        means = block_means(k, BLOCK_KV)
        blocks = means.shape[2]
        block_of = np.arange(length) // BLOCK_KV
        counts = np.bincount(block_of).astype(np.float32)
        members = (np.arange(blocks)[:, None] == block_of).astype(np.float32)  # [K, N]
        first_order = product(
            "jn,shnd,shne->shjde", jnp.asarray(members), k - means[:, :, block_of], v
        )
        spread = first_order - first_order.mean(2, keepdims=True)
        weight = jnp.log(jnp.sqrt((spread**2).sum((-2, -1))) + _EPSILON)
        scores = product("shid,shjd->shij", block_means(q, BLOCK_Q), means) * scale
        chosen = selected_blocks(scores + weight[:, :, None], self.kept_blocks(length))
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

        of_query = jnp.repeat(chosen, BLOCK_Q, axis=2)[:, :, : q.shape[2]]
        out = in_chunks(attend, q, sequences.rel_h, sequences.rel_w, of_query)
        return out.astype(q.dtype)

    def selection_work(self, length: int, grid: Grid, head_dim: int) -> int:
        """Means, slopes and the choice."""
        queries, keys = math.ceil(length / BLOCK_Q), math.ceil(length / BLOCK_KV)
        others = keys - self.kept_blocks(length)
        if others == 0:
            return 0
        means = length * others * (2 * head_dim + sum(grid))
        slopes = 2 * length * head_dim**2  # H_j, and its product with the queries
        return means + slopes + queries * keys * head_dim
