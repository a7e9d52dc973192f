"""A sparse encoder that computes all and masks what is skipped: one program for all densities.

Compilation is what a sweep waits for. Densities, rows of the MLP and what they are spent on are
arrays here instead of shapes, so that variants which rank alike share a program. The results are
those of the sparse encoder up to rounding (a test compares them); the speed is not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import reference
from sparsesam_jax import Sam
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.methods.group_update import GroupUpdate, Skipped
from sparsesam_jax.methods.sequences import (
    SequenceMethod,
    Sequences,
    State,
    in_chunks,
    position_bias,
    product,
    softmax,
)
from sparsesam_jax.model.blocks import Block
from sparsesam_jax.model.layers import add
from sparsesam_jax.sparsity import orders
from sparsesam_jax.sparsity.plan import (
    Rankings,
    attention_layout,
    encoder_plan,
    num_routed_tokens,
)
from sparsesam_jax.sparsity.work import EncoderWork, encoder_work


def masked(sam: Sam, sparsity: Sparsity, update: GroupUpdate | None = None) -> Sam:
    """The dense model with a sparsity, perhaps with group updates; all that rank alike share it."""
    ranking = dataclasses.replace(
        sparsity,
        density=1.0,
        split="equal",
        attention_density=None,
        mlp_density=None,
        mlp_start=None,
    )
    skipped = None if update is None else update.skipped
    model = Masked(1.0, ranking=ranking, skipped=skipped).apply(sam)
    encoder: Any = model.image_encoder
    grid = (encoder.config.grid_size, encoder.config.grid_size)
    kept = [_kept(encoder.config, sparsity, update, i, grid) for i in range(encoder.config.depth)]
    encoder.kept = nnx.Variable(jnp.array(kept, jnp.int32))
    return model


def _kept(
    config: ImageEncoderConfig,
    sparsity: Sparsity,
    update: GroupUpdate | None,
    index: int,
    grid: tuple[int, int],
) -> tuple[int, int, int]:
    """A block's key blocks of the bar, tokens with an MLP row of their own, groups with one."""
    bar = attention_layout(config, sparsity, index, grid).num_bar_blocks
    if update is not None:
        return bar, *update.groups(config, index, grid)
    routed = num_routed_tokens(config, sparsity, index, grid)
    return bar, grid[0] * grid[1] if routed is None else routed, 0


@dataclasses.dataclass(frozen=True)
class Masked(SequenceMethod):
    """What makes two variants one program; what they keep is the encoder's `kept`, [depth, 3].

    Attributes:
        ranking: The sparsity without its densities.
        skipped: As in `GroupUpdate`; None if skipped tokens receive nothing.
    """

    ranking: Sparsity = dataclasses.field(default_factory=lambda: Sparsity(1.0))
    skipped: Skipped | None = None

    def work(self, config: ImageEncoderConfig) -> EncoderWork:
        """That of the dense encoder, and a little more."""
        return encoder_work(config)

    def block_outputs(self, encoder: Any, x: Float[Array, "B Gh Gw d"]) -> list[Array]:
        """The tokens after every block."""
        plans = encoder_plan(encoder.config, self.ranking, (x.shape[1], x.shape[2]), "xla")
        outputs, state = [], {"rankings": Rankings()}
        for block, plan, kept in zip(encoder.blocks, plans, encoder.kept[...], strict=True):
            state |= {"plan": plan, "kept": kept, "x": x}
            x = add(x, self._attention(block, block.norm1(x), encoder.config, state))
            x = self.mlp(block, x, encoder.config, state)
            outputs.append(x)
        return outputs

    def attend(self, sequences: Sequences, is_global: bool, state: State) -> Array:
        """Attention to the bar's blocks and, on the grid, to the query's own."""
        rankings = state["plan"].rank(state["rankings"], *_keys(sequences, is_global, state))
        state["rankings"] = rankings
        place = orders.inverse(state["plan"].sequence(rankings))
        if not is_global and place.ndim > 1:
            place = place.reshape(-1, *place.shape[2:])
        place = place.reshape(*place.shape[:-1], *(1,) * (3 - place.ndim), place.shape[-1])
        block = place // self.ranking.block_size  # of every token, [S or 1, H or 1, N]
        rank = block
        if rankings.blocks is not None and is_global:
            ranks = orders.inverse(rankings.blocks)[:, None]
            rank = jnp.take_along_axis(
                ranks, jnp.broadcast_to(block, (*ranks.shape[:2], block.shape[-1])), -1
            )
        in_bar = (rank < state["kept"][0])[:, :, None]

        def attend(q: Array, rel_h: Array, rel_w: Array, own: Array) -> Array:
            logits = product("shqd,shkd->shqk", q, sequences.k) * q.shape[-1] ** -0.5
            logits = logits + position_bias(sequences, rel_h, rel_w)
            computed = in_bar | (own[..., None] == block[:, :, None]) if is_global else in_bar
            weights = softmax(jnp.where(computed, logits, -jnp.inf))
            return product("shqk,shkd->shqd", weights.astype(q.dtype), sequences.v)

        out = in_chunks(attend, sequences.q, sequences.rel_h, sequences.rel_w, block)
        return out.astype(sequences.q.dtype)

    def mlp(self, block: Block, x: Array, config: ImageEncoderConfig, state: State) -> Array:
        """The tokens after their own update, their group's, or none."""
        update, order = block.mlp(block.norm2(x)), state["rankings"].tokens
        if order is None:
            return add(x, update)
        _, routed, merged = state["kept"]
        batch, count, d = x.shape[0], x.shape[1] * x.shape[2], x.shape[3]
        rank = orders.inverse(order).reshape(*x.shape[:3], 1)
        update = jnp.where(rank < routed, update, 0)
        if self.skipped is None:
            return add(x, update)
        tokens = x.reshape(batch, count, d)
        tokens = tokens if self.skipped == "mean_input" else block.norm2(tokens)
        groups = jnp.take_along_axis(tokens, order[..., None], axis=1)
        groups = groups.reshape(batch, -1, orders.GROUP, d)
        rows = groups[:, :, 0] if self.skipped == "first" else groups.mean(2)
        shared = block.mlp(block.norm2(rows) if self.skipped == "mean_input" else rows)
        group = rank[..., 0].reshape(batch, count) // orders.GROUP
        shared = jnp.take_along_axis(shared, group[..., None], axis=1).reshape(x.shape)
        end = routed + orders.GROUP * merged
        return add(x, update + jnp.where((rank >= routed) & (rank < end), shared, 0))


def _keys(sequences: Sequences, is_global: bool, state: State) -> tuple[Array, Array, Array]:
    """What is ranked by: keys as a map [B, Gh, Gw, H, D], their bias, and the block's input."""
    x, window = state["x"], state["plan"].block.window_size
    keys = sequences.k.swapaxes(1, 2)
    if is_global:
        keys = keys.reshape(*x.shape[:3], *keys.shape[2:])
    else:
        keys = reference.window_unpartition(keys, window, (x.shape[0], x.shape[1], x.shape[2]))
    return keys, sequences.key_bias[:, 0], x
