"""The encoder's blocks as sequences of tokens, for methods that change attention or the MLP.

Windowed and global attention become one: the tokens of every window, or of the whole grid, are a
sequence in raster order with its own position bias. Keys and values come without their bias, as
`blocks.Attention` explains; a padded token of a window has k = 0 and v = 0.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import reference
from sparsesam_jax.config import ImageEncoderConfig
from sparsesam_jax.methods.base import BlockMethod
from sparsesam_jax.model import float8
from sparsesam_jax.model.blocks import Block, relative_table
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.layers import add
from sparsesam_jax.sparsity.macs import attention_work
from sparsesam_jax.sparsity.work import EncoderWork, encoder_work

Grid = tuple[int, int]
State = dict[str, Any]  # what a forward's blocks share

_QUERY_CHUNK = 256  # queries whose logits exist at a time


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Attention's operands, head-major; S is the number of images times windows.

    Attributes:
        q: Queries, [S, H, N, D].
        k: Keys without bias, [S, H, N, D].
        v: Values without bias, [S, H, N, D].
        rel_h: The query side of the position bias over key rows, [S, H, N, rows].
        rel_w: Likewise over key columns, [S, H, N, columns].
        key_bias: [H, 1, D].
        grid: Rows and columns of a sequence's tokens.
    """

    q: Array
    k: Array
    v: Array
    rel_h: Array
    rel_w: Array
    key_bias: Array
    grid: Grid

    @property
    def rows(self) -> np.ndarray:
        """Row of every token, [N]."""
        return np.arange(self.grid[0] * self.grid[1]) // self.grid[1]

    @property
    def cols(self) -> np.ndarray:
        """Column of every token, [N]."""
        return np.arange(self.grid[0] * self.grid[1]) % self.grid[1]


class SequenceMethod(BlockMethod):
    """A method that says how sequences attend and how the MLP is applied."""

    @abc.abstractmethod
    def attend(self, sequences: Sequences, is_global: bool, state: State) -> Array:
        """Attention of every sequence, [S, H, N, D], without the values' bias."""

    @abc.abstractmethod
    def mlp(self, block: Block, x: Array, config: ImageEncoderConfig, state: State) -> Array:
        """The tokens [B, Gh, Gw, d] after the block's MLP, its residual included."""

    def block_outputs(self, encoder: ImageEncoder, x: Float[Array, "B Gh Gw d"]) -> list[Array]:
        """The tokens after every block."""
        outputs, state = [], {}
        for block in encoder.blocks:
            x = add(x, self._attention(block, block.norm1(x), encoder.config, state))
            x = self.mlp(block, x, encoder.config, state)
            outputs.append(x)
        return outputs

    def _attention(self, block: Block, x: Array, config: ImageEncoderConfig, state: State) -> Array:
        window = block.config.window_size
        sequences, value_bias = block_sequences(block, x, config.num_heads, window)
        out = self.attend(sequences, window is None, state).swapaxes(1, 2)
        if window:
            out = reference.window_unpartition(out, window, (x.shape[0], x.shape[1], x.shape[2]))
        out = out.reshape(*x.shape[:3], config.num_heads, -1) + value_bias
        return block.attn.proj(out.reshape(x.shape))


def sequence_work(
    config: ImageEncoderConfig,
    pairs: Callable[[int], int],
    extra: Callable[[int, Grid], int],
) -> EncoderWork:
    """Work of dense blocks whose attention computes other pairs.

    Args:
        config: Shape of the encoder.
        pairs: Pairs of a query and a key that one head computes in a sequence of so many tokens.
        extra: What the method adds for one head in such a sequence on such a grid.
    """
    dense = encoder_work(config)
    blocks = []
    for index, block in enumerate(dense.blocks):
        windows, side = window_count(config, index)
        added = windows * config.num_heads * extra(side * side, (side, side))
        grid = (config.grid_size, config.grid_size)
        attention = attention_work(config.blocks[index], grid, pairs(side * side))
        blocks.append(dataclasses.replace(block, attention=attention, extra=added))
    return dataclasses.replace(dense, blocks=tuple(blocks))


def window_count(config: ImageEncoderConfig, index: int) -> tuple[int, int]:
    """Sequences of a block's attention on one image, and the side of each."""
    if config.is_global(index):
        return 1, config.grid_size
    return math.ceil(config.grid_size / config.window_size) ** 2, config.window_size


def dense_mlp(block: Block, x: Array) -> Array:
    """The block's MLP on all tokens, with its residual."""
    return add(x, block.mlp(block.norm2(x)))


def dense_attention(sequences: Sequences) -> Array:
    """Attention of every query to every key, [S, H, N, D]."""

    def attend(q: Array, rel_h: Array, rel_w: Array) -> Array:
        logits = product("shqd,shkd->shqk", q, sequences.k) * q.shape[-1] ** -0.5
        weights = softmax(logits + position_bias(sequences, rel_h, rel_w))
        return product("shqk,shkd->shqd", weights.astype(q.dtype), sequences.v)

    out = in_chunks(attend, sequences.q, sequences.rel_h, sequences.rel_w)
    return out.astype(sequences.q.dtype)


def position_bias(sequences: Sequences, rel_h: Array, rel_w: Array) -> Array:
    """The bias of a chunk's queries to all keys in raster order, [S, H, Q, N]."""
    bias = rel_h[..., :, None] + rel_w[..., None, :]
    return bias.reshape(*rel_h.shape[:-1], len(sequences.rows))


def softmax(logits: Array) -> Array:
    """Softmax in float32 over the last axis."""
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def product(subscripts: str, *operands: Array) -> Array:
    """An einsum in full precision with a float32 result."""
    precision = reference.matmul_precision(operands[0].dtype)
    return jnp.einsum(
        subscripts, *operands, precision=precision, preferred_element_type=jnp.float32
    )


def in_chunks(attend: Callable[..., Array], *arrays: Array, size: int = _QUERY_CHUNK) -> Array:
    """`attend` on chunks of queries, one after another; all arrays are [S, H, N, ...].

    The last chunk is filled up with zeros, which are cut off again.
    """
    length = arrays[0].shape[2]
    padding = -length % size

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

    out = jax.lax.map(lambda chunk: attend(*chunk), tuple(cut(x) for x in arrays))
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :length]


def block_sequences(
    block: Block, x: Float[Array, "B Gh Gw d"], num_heads: int, window: int | None
) -> tuple[Sequences, Array]:
    """The operands of a block's attention, and the values' bias [H, D].

    Args:
        block: The block.
        x: The tokens after its first LayerNorm.
        num_heads: Attention heads.
        window: Side of its windows; None for global attention.
    """
    attn = block.attn
    assert attn.qkv.bias is not None
    bias = attn.qkv.bias[...].astype(x.dtype)
    qkv = float8.product(attn.qkv, x, jnp.zeros_like(bias), implementation="xla")
    qkv = qkv.reshape(*x.shape[:3], 3, num_heads, -1)
    bias = bias.reshape(3, num_heads, -1)
    q, k, v = qkv[..., 0, :, :] + bias[0], qkv[..., 1, :, :], qkv[..., 2, :, :]
    tables = (
        relative_table(table[...], side, window).astype(q.dtype)
        for table, side in zip((attn.rel_pos_h, attn.rel_pos_w), x.shape[1:3], strict=True)
    )
    rel_h, rel_w = reference.relative_position(q, *tables)

    def sequence(array: Array) -> Array:
        if window:
            array = reference.window_partition(array, window)
        else:
            array = array.reshape(array.shape[0], -1, *array.shape[3:])
        return array.swapaxes(1, 2)

    operands = (sequence(array) for array in (q, k, v, rel_h, rel_w))
    grid = (window, window) if window else (x.shape[1], x.shape[2])
    return Sequences(*operands, key_bias=bias[1][:, None], grid=grid), bias[2]
