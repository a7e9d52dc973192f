"""The key side of the decomposed position bias, as the stripe attention kernel reads it.

A step of the kernel computes the bias of its keys as a sum of products over chunks of 16
coordinates

    bias[q, k] = sum over chunks c of rel[q, 16 c : 16 c + 16] @ onehot[c][:, k],

where `rel` is `rel_h` and `rel_w` side by side. Keys that form a spatial tile touch few chunks.
Here are, for each step, the chunks that its keys touch and their one-hots: worked out once, with
numpy, where coordinates are static, else one-hots over all chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.block_layout import BlockLayout

BLOCK = 64  # queries and keys in a block of the layout, and the rows of one wgmma
CHUNK = 16  # coordinates in one product of the bias: the contraction of one wgmma


class KeySide(NamedTuple):
    """What the kernel reads about the keys besides k and v.

    Attributes:
        table: int32 [1 or B, steps, columns], the bar's steps first, then every query block's
            diagonal. A row holds the blocks where the step's copies start, whether its diagonal
            block is in the bar, then, unless streamed, the chunks of its products and the pattern
            of each of its copies.
        onehot: bool; patterns [P, C, keys of a copy, 16], or, streamed, [1 or B or B H, C, N, 16].
        num_blocks: Copies a step: one, or one a block where a rank decides which blocks meet.
        streamed: Whether the coordinates are only known at run time.
    """

    table: Array
    onehot: Array
    num_blocks: int
    streamed: bool


def key_side(
    labels: Array | np.ndarray,
    num_chunks: int,
    layout: BlockLayout,
    *,
    block_kv: int,
    block_order: Array | None,
) -> KeySide:
    """The key side of one attention call.

    Args:
        labels: Row of every key, and its column counted on after the rows' chunks: numpy [2, N] if
            known when the function is traced, else a jax array [2, 1 or B or B H, N].
        num_chunks: Chunks of rows and columns together.
        layout: The block layout.
        block_kv: Keys in a step.
        block_order: Rank -> block, int32 [B, blocks], or None for the identity.

    Returns:
        The table and the one-hots.
    """
    per_step = block_kv // BLOCK
    num_bar, num_blocks = layout.num_bar_blocks, layout.num_kv_blocks
    own = np.arange(num_blocks if layout.diagonal else 0)
    if block_order is None:
        bar = np.arange(0, num_bar, per_step)
        blocks = np.concatenate([bar, own])[None, :, None]
        in_bar = own[None] < num_bar
        sizes = np.minimum(block_kv, (num_bar - bar) * BLOCK).tolist() + [BLOCK] * len(own)
        runs = list(zip(blocks.ravel().tolist(), sizes, strict=True))
    else:
        bar = jnp.pad(block_order[:, :num_bar], ((0, 0), (0, -num_bar % per_step)), mode="edge")
        repeated = jnp.tile(own.repeat(per_step), (len(bar), 1))
        blocks = jnp.concatenate([bar, repeated], axis=1).reshape(len(bar), -1, per_step)
        in_bar = jnp.argsort(block_order, axis=-1)[:, : len(own)] < num_bar
        runs = [(block, BLOCK) for block in range(num_blocks)]
    in_bar = jnp.pad(in_bar, ((0, 0), (blocks.shape[1] - len(own), 0)))[..., None]
    columns = [blocks, in_bar]
    if streamed := not isinstance(labels, np.ndarray):
        coordinates = jnp.arange(num_chunks * CHUNK).reshape(num_chunks, 1, CHUNK)
        onehot = (labels[:, :, None, :, None] == coordinates).any(0)
    else:
        keys = [np.asarray(labels)[:, block * BLOCK :][:, :size] for block, size in runs]
        size = block_kv if block_order is None else BLOCK
        chunks, patterns, onehot = _patterns(keys, size)
        if block_order is None:
            columns += [chunks[None], patterns[None, :, None]]
        else:
            # Which blocks meet is only known at run time: each brings products of its own, in
            # which the other block's keys are zero.
            columns.append(jnp.asarray(chunks)[blocks].reshape(*blocks.shape[:2], -1))
            columns.append(jnp.asarray(patterns)[blocks] + np.arange(per_step) * len(onehot))
            own_products = np.eye(per_step, dtype=bool)[:, None, :, None, None, None]
            shape = (per_step * len(onehot), -1, BLOCK, CHUNK)
            onehot = (own_products & onehot[:, None]).reshape(shape)
    table = jnp.concatenate([jnp.asarray(x, jnp.int32) for x in columns], axis=-1)
    return KeySide(table, jnp.asarray(onehot), blocks.shape[-1], streamed)


def _patterns(keys: list[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chunks that runs of keys touch and the distinct one-hots of the keys in them.

    Args:
        keys: Labels [2, n <= size] of every run.
        size: Keys that a one-hot is padded to.

    Returns:
        Chunks [runs, C], index of the one-hots [runs], and one-hots [P, C, size, 16].
    """
    touched = [np.unique(run // CHUNK) for run in keys]
    num_chunks = max(map(len, touched))
    chunks = np.zeros((len(keys), num_chunks), np.int32)
    indices = np.zeros(len(keys), np.int32)
    patterns: dict[bytes, int] = {}
    for i, (run, ids) in enumerate(zip(keys, touched, strict=True)):
        chunks[i, : len(ids)] = ids
        onehot = np.zeros((num_chunks, size, CHUNK), bool)
        coordinates = ids[:, None, None] * CHUNK + np.arange(CHUNK)  # [C, 1, 16]
        onehot[: len(ids), : run.shape[1]] = (run[:, None, :, None] == coordinates).any(0)
        indices[i] = patterns.setdefault(onehot.tobytes(), len(patterns))
    shape = (len(patterns), num_chunks, size, CHUNK)
    return chunks, indices, np.frombuffer(b"".join(patterns), bool).reshape(shape)
