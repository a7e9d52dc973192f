"""Cases of stripe attention, and an oracle of theirs: all N x N logits in float32."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from sparsesam_jax.sparsity.orders import GROUP, curve_order


def frobenius_error(got: jax.Array, want: jax.Array) -> float:
    """Relative error |got - want| / |want| in float32."""
    got = got.astype(jnp.float32)
    return float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    `order` is tiles (Morton stripes), blocks (those, ranked by image), groups (tokens ranked by
    image) or heads (tokens ranked by image and head).
    """

    batch: int = 8
    side: int = 64
    num_heads: int = 16
    head_dim: int = 64
    density: float = 1.0
    order: str = "tiles"
    dtype: str = "bfloat16"
    bias: float = 1.0

    def __str__(self) -> str:
        sizes = f"B{self.batch} S{self.side} H{self.num_heads} D{self.head_dim} r{self.density}"
        return f"{sizes} {self.order} {self.dtype}"

    @property
    def layout(self) -> BlockLayout:
        """The case's block layout."""
        return BlockLayout.a_shape(self.side**2, self.density)


class Arguments(NamedTuple):
    """Arguments of `stripe_attention`; those that may be None, or static numpy, last."""

    qkv: Any
    rel_pos_h: Any
    rel_pos_w: Any
    sequence: Any
    block_order: Any


def stripes(side: int) -> np.ndarray:
    """Token 0 of every group of the Morton curve, then token 1 of every group, and so on."""
    return curve_order("morton", side, side).reshape(-1, GROUP).T.ravel()


def inputs(case: Case, seed: int) -> Arguments:
    """Random arguments."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (case.batch, case.side, case.side, 3, case.num_heads, case.head_dim)
    qkv = jax.random.normal(keys[0], shape, case.dtype)
    # q . table is then a bias of variance `bias`^2.
    scale = case.bias * case.head_dim**-0.5
    shape = (2, case.side, case.side, case.head_dim)
    by_row, by_col = (jax.random.normal(keys[1], shape) * scale).astype(case.dtype)
    sequence = stripes(case.side)
    blocks = None
    if case.order == "blocks":
        blocks = _ranks((case.batch,), case.layout.num_kv_blocks, keys[2])
    elif case.order != "tiles":
        lead = (case.batch, case.num_heads)[: 2 if case.order == "heads" else 1]
        sequence = jnp.asarray(sequence)[_ranks(lead, len(sequence), keys[3])]
    return Arguments(qkv, by_row, by_col, sequence, blocks)


def _ranks(lead: tuple[int, ...], size: int, key: jax.Array) -> jax.Array:
    return jnp.argsort(jax.random.uniform(key, (*lead, size)), axis=-1).astype(jnp.int32)


def masked_attention(case: Case, arguments: Arguments, image: int, heads: list[int]) -> jax.Array:
    """Some heads of an image's attention [Gh, Gw, heads, D] from all N x N logits, in float32."""
    qkv, rel_pos_h, rel_pos_w, sequence, block_order = arguments
    if sequence.ndim > 1:
        sequence = sequence[image]
    if sequence.ndim > 1:
        sequence = sequence[np.array(heads)]
    sequence = jnp.broadcast_to(sequence, (len(heads), case.layout.seq_len))
    blocks = np.arange(case.layout.num_kv_blocks)
    blocks = blocks if block_order is None else block_order[image]
    qkv = qkv[image][:, :, :, np.array(heads)]
    return _masked_attention(qkv, rel_pos_h, rel_pos_w, sequence, blocks, case.layout)


@functools.partial(jax.jit, static_argnames="layout")
def _masked_attention(qkv, rel_pos_h, rel_pos_w, sequence, block_order, layout: BlockLayout):
    block = jnp.argsort(sequence, axis=-1) // layout.block_kv  # of every token of the raster
    in_bar = jnp.argsort(block_order)[block] < layout.num_bar_blocks
    mask = in_bar[:, None] | (layout.diagonal & (block[:, :, None] == block[:, None]))
    q, k, v = (qkv[:, :, i].astype(jnp.float32) for i in range(3))
    tables = (x.astype(jnp.float32) for x in (rel_pos_h, rel_pos_w))
    rel_h, rel_w = reference.relative_position(q[None], *tables)
    bias = (rel_h[0, ..., :, None] + rel_w[0, ..., None, :]).swapaxes(1, 2).swapaxes(0, 1)
    q, k, v = (x.reshape(layout.seq_len, *x.shape[2:]).swapaxes(0, 1) for x in (q, k, v))
    einsum = functools.partial(jnp.einsum, precision="highest")
    logits = einsum("hqd,hkd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, logits + bias.reshape(logits.shape), -jnp.inf))
    return einsum("hqk,hkd->qhd", weights, v).reshape(qkv[:, :, 0].shape)


def relative_error(case: Case, out: jax.Array, arguments: Arguments) -> float:
    """Frobenius error of the last image's first and last head against float32."""
    heads = sorted({0, case.num_heads - 1})
    want = masked_attention(case, arguments, case.batch - 1, heads)
    return frobenius_error(out[-1][:, :, np.array(heads)], want)
