"""Token merging, as it is applied to SAM: what ToMe, PiToMe, StructSAM and K-means share.

- Attention: the keys and values of every window, and of the whole grid in global blocks, are
  merged, each head for itself; a merged key is the mean of its tokens, counts as often as it has
  tokens (`log size` is added to its logits, ToMe Eq. 1) and sits where its destination does.
  Queries stay whole. The first block of a kind decides what is merged, by its keys, and the later
  ones of that kind follow, as in the SAM port of SparseSAM's authors.
- MLP: in windowed blocks the tokens of the whole grid are merged, run through the MLP, and every
  token receives the result of what it was merged into. Global blocks run it on all tokens.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsesam_jax.config import ImageEncoderConfig
from sparsesam_jax.methods.sequences import (
    Grid,
    SequenceMethod,
    Sequences,
    State,
    dense_attention,
    dense_mlp,
    in_chunks,
    product,
    sequence_work,
    softmax,
    window_count,
)
from sparsesam_jax.model.blocks import Block
from sparsesam_jax.model.layers import add
from sparsesam_jax.sparsity.macs import mlp_work
from sparsesam_jax.sparsity.work import EncoderWork


class Merged(NamedTuple):
    """Which tokens become one.

    Attributes:
        slot: What each of N tokens becomes part of, one of M.
        destination: The token in whose place each of the M stays.
    """

    slot: Int[Array, "*batch N"]
    destination: Int[Array, "*batch M"]

    @property
    def sizes(self) -> Float[Array, "*batch M"]:
        """Tokens in each, float32."""
        return self._sum(jnp.ones((*self.slot.shape, 1), jnp.float32))[..., 0]

    def merge(self, x: Float[Array, "*batch N C"]) -> Float[Array, "*batch M C"]:
        """The mean of the tokens of each."""
        sums = self._sum(x.astype(jnp.float32))
        return (sums / jnp.maximum(self.sizes, 1)[..., None]).astype(x.dtype)

    def unmerge(self, merged: Float[Array, "*batch M C"]) -> Float[Array, "*batch N C"]:
        """Give every token what it became part of."""
        return jnp.take_along_axis(merged, self.slot[..., None], axis=-2)

    def _sum(self, x: Array) -> Array:
        batch, count = self.slot.shape[:-1], self.destination.shape[-1]
        places = np.indices(batch).reshape(len(batch), *batch, 1)
        sums = jnp.zeros((*batch, count, x.shape[-1]), x.dtype)
        return sums.at[(*places, self.slot)].add(x)


@dataclasses.dataclass(frozen=True)
class TokenMerging(SequenceMethod):
    """A way to merge tokens; `density` is the share of tokens that are left.

    Attributes:
        merges_attention: Whether keys and values are merged too.
        keeps_identity: Whether a token keeps its own value and receives the update only; otherwise
            it is replaced by what it was merged into.
    """

    merges_attention: ClassVar[bool] = True
    keeps_identity: ClassVar[bool] = False

    @abc.abstractmethod
    def count(self, tokens: int, grid: Grid) -> int:
        """Of so many tokens, how many are left."""

    @abc.abstractmethod
    def match(self, features: Float[Array, "*batch N C"], grid: Grid) -> Merged:
        """Merge tokens that are alike, to `count` of them."""

    @abc.abstractmethod
    def match_work(self, tokens: int, grid: Grid, channels: int) -> int:
        """Multiply-accumulates of `match` on one sequence."""

    def attend(self, sequences: Sequences, is_global: bool, state: State) -> Array:
        """All queries' attention to the merged keys."""
        if not self.merges_attention:
            return dense_attention(sequences)
        q, k, v = sequences.q, sequences.k, sequences.v
        key = f"merged {is_global}"
        if key not in state:
            state[key] = self.match(k + sequences.key_bias, sequences.grid)
        merged: Merged = state[key]
        k, v = merged.merge(k), merged.merge(v)
        rows = jnp.asarray(sequences.rows)[merged.destination]
        cols = jnp.asarray(sequences.cols)[merged.destination]
        weight = jnp.log(merged.sizes)[:, :, None]

        def attend(q: Array, rel_h: Array, rel_w: Array) -> Array:
            logits = product("shqd,shkd->shqk", q, k) * q.shape[-1] ** -0.5 + weight
            logits = logits + jnp.take_along_axis(rel_h, rows[:, :, None], axis=-1)
            logits = logits + jnp.take_along_axis(rel_w, cols[:, :, None], axis=-1)
            return product("shqk,shkd->shqd", softmax(logits).astype(v.dtype), v)

        return in_chunks(attend, q, sequences.rel_h, sequences.rel_w).astype(q.dtype)

    def mlp(self, block: Block, x: Array, config: ImageEncoderConfig, state: State) -> Array:
        """Merged tokens in windowed blocks, all in global ones."""
        if block.config.is_global:
            return dense_mlp(block, x)
        batch, height, width, d = x.shape
        tokens = x.reshape(batch, -1, d)
        if self.keeps_identity:
            normed = block.norm2(tokens)
            merged = self.match(normed, (height, width))
            tokens = add(tokens, merged.unmerge(block.mlp(merged.merge(normed))))
        else:
            merged = self.match(tokens, (height, width))
            tokens = merged.unmerge(dense_mlp(block, merged.merge(tokens))).astype(x.dtype)
        return tokens.reshape(x.shape)

    def work(self, config: ImageEncoderConfig) -> EncoderWork:
        """Attention and MLP on what is left, and the matching."""

        def pairs(length: int) -> int:
            grid = (math.isqrt(length), math.isqrt(length))
            return length * (self.count(length, grid) if self.merges_attention else length)

        counted = sequence_work(config, pairs, lambda length, grid: 0)
        side = config.grid_size
        grid, tokens = (side, side), side * side
        first = {config.is_global(i): i for i in reversed(range(config.depth))}
        blocks = []
        for index, block in enumerate(counted.blocks):
            extra, rows = 0, tokens
            if self.merges_attention and index in first.values():
                windows, each = window_count(config, index)
                work = self.match_work(each * each, (each, each), config.head_dim)
                extra += windows * config.num_heads * work
            if not config.is_global(index):
                extra += self.match_work(tokens, grid, config.embed_dim)
                rows = self.count(tokens, grid)
            mlp = mlp_work(config.blocks[index], rows)
            blocks.append(dataclasses.replace(block, mlp=mlp, extra=extra))
        return dataclasses.replace(counted, blocks=tuple(blocks))


def matched(
    sources: Int[Array, "*batch A"],
    destinations: Int[Array, "*batch B"],
    similarity: Float[Array, "*batch A B"],
    removed: int,
    others: Int[Array, "*batch C"] | None = None,
) -> Merged:
    """Bipartite soft matching (ToMe): the most similar sources merge into their best destination.

    Args:
        sources: Tokens that may merge.
        destinations: Tokens that others may merge into.
        similarity: Of every source to every destination.
        removed: Sources that merge.
        others: Tokens that take no part and stay.
    """
    best = similarity.argmax(-1)
    ranked = jnp.argsort(-similarity.max(-1), axis=-1, stable=True)
    sources, best = (jnp.take_along_axis(x, ranked, axis=-1) for x in (sources, best))
    kept = [destinations, sources[..., removed:]]
    kept += [] if others is None else [others]
    destination = jnp.concatenate(kept, axis=-1)
    places = jnp.broadcast_to(jnp.arange(destination.shape[-1]), destination.shape)
    tokens = jnp.concatenate([destination, sources[..., :removed]], axis=-1)
    slots = jnp.concatenate([places, best[..., :removed]], axis=-1)
    order = jnp.argsort(tokens, axis=-1)
    return Merged(jnp.take_along_axis(slots, order, axis=-1), destination)


def unit(x: Float[Array, "*batch N C"]) -> Float[Array, "*batch N C"]:
    """Vectors of length one, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def taken(x: Float[Array, "*batch N C"], index: Int[Array, "*batch M"]) -> Array:
    """Some of the tokens."""
    return jnp.take_along_axis(x, index[..., None], axis=-2)
