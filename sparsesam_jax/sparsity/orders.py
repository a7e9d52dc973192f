"""Space-filling curves over a token grid, and the sequences that Stripe-Sort lays out from them.

A *group* is 4 consecutive tokens of a curve: on an even grid and the Morton curve, a 2 x 2
neighbourhood. Curves are static numpy arrays; rankings are traced, one per image (and head).
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sparsesam_jax.config import Layout

GROUP = 4


@functools.lru_cache(maxsize=64)
def curve_order(curve: str, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Raster index of the i-th token along a curve, int32, [height * width].

    The Morton code of (row, col) interleaves their bits, the row's bit above the column's. On a
    grid that is no power of two, Morton and Hilbert are those of the enclosing square power of
    two, present cells only (SparseSAM, "Morton order").

    Args:
        curve: `morton`, `hilbert`, `raster` or `random`.
        height: Rows of the grid.
        width: Columns of the grid.
        seed: Seed of the `random` permutation.

    Raises:
        ValueError: The curve is unknown.
    """
    rows, cols = np.indices((height, width)).reshape(2, -1)
    bits = max(height - 1, width - 1).bit_length()
    if curve == "morton":
        order = np.argsort(_morton_code(rows, cols, bits), kind="stable")
    elif curve == "hilbert":
        order = np.argsort(_hilbert_code(rows, cols, bits), kind="stable")
    elif curve == "raster":
        order = np.arange(height * width)
    elif curve == "random":
        order = np.random.default_rng(seed).permutation(height * width)
    else:
        raise ValueError(f"curve must be morton, hilbert, raster or random; got {curve!r}")
    order = order.astype(np.int32)
    order.setflags(write=False)
    return order


def _morton_code(rows: np.ndarray, cols: np.ndarray, bits: int) -> np.ndarray:
    code = np.zeros_like(rows)
    for bit in range(bits):
        code |= ((rows >> bit & 1) << 1 | cols >> bit & 1) << 2 * bit
    return code


def _hilbert_code(rows: np.ndarray, cols: np.ndarray, bits: int) -> np.ndarray:
    rows, cols, code = rows.copy(), cols.copy(), np.zeros_like(rows)
    for bit in reversed(range(bits)):
        row_bit, col_bit = rows >> bit & 1, cols >> bit & 1
        code = code << 2 | (3 * col_bit) ^ row_bit
        # Each quadrant's curve is the whole curve turned; undo the turn before the next bit.
        flip = (row_bit == 0) & (col_bit == 1)
        rows, cols = (
            np.where(flip, (1 << bit) - 1 - (x & (1 << bit) - 1), x) for x in (rows, cols)
        )
        swap = row_bit == 0
        rows, cols = np.where(swap, cols, rows), np.where(swap, rows, cols)
    return code


def stripe_sequence(
    order: Int[np.ndarray, " N"], group_rank: Int[Array | np.ndarray, "*batch G"], layout: Layout
) -> Int[Array, "*batch N"]:
    """The sequence in which attention runs: raster index of each of its tokens.

    `interleave`: member 0 of every group in rank order, then member 1 of every group, and so on;
    each quarter is a stripe, the image at half resolution. `contiguous`: group after group.
    Tokens left over when N is no multiple of 4 form a short group that is always ranked last.

    Args:
        order: A curve, as `curve_order` gives it.
        group_rank: Groups of the curve, most important first; G = N // 4.
        layout: `interleave` or `contiguous`.
    """
    groups, leftover = _groups(order)
    ranked = jnp.asarray(groups)[group_rank]  # [*batch, G, 4]
    batch = ranked.shape[:-2]
    if layout == "contiguous":
        tail = jnp.broadcast_to(leftover, (*batch, len(leftover)))
        return jnp.concatenate([ranked.reshape(*batch, -1), tail], axis=-1)
    stripes = []
    for member in range(GROUP):
        extra = leftover[member : member + 1]
        stripes += [ranked[..., member], jnp.broadcast_to(extra, (*batch, len(extra)))]
    return jnp.concatenate(stripes, axis=-1)


def block_sequence(
    sequence: Int[np.ndarray, " N"],
    block_rank: Int[Array | np.ndarray, "*batch K"],
    block_size: int,
) -> Int[Array, "*batch N"]:
    """A sequence with its full blocks in rank order; a partial last block stays last.

    Args:
        sequence: An unranked sequence.
        block_rank: Full blocks, most important first; K = N // block_size.
        block_size: Tokens in a block.
    """
    full = sequence[: len(sequence) // block_size * block_size].reshape(-1, block_size)
    ranked = jnp.asarray(full)[block_rank]
    ranked = ranked.reshape(*ranked.shape[:-2], -1)
    tail = sequence[full.size :]
    tail = jnp.broadcast_to(tail, (*ranked.shape[:-1], len(tail)))
    return jnp.concatenate([ranked, tail], axis=-1)


def spread_sequence(
    sequence: Int[np.ndarray, " N"], num_bar_blocks: int, block_size: int
) -> Int[np.ndarray, " N"]:
    """A static sequence whose leading blocks, a layout's bar, are spread over the image.

    Whole stripes stay first, as many as the bar holds; of the next one the bar takes blocks at even
    distances. All other blocks follow in their order, a partial last block stays last.

    Args:
        sequence: An unranked sequence in stripes.
        num_bar_blocks: Blocks in the bar.
        block_size: Tokens in a block.
    """
    full = len(sequence) // block_size
    stripe = max(1, full // GROUP)
    whole = num_bar_blocks // stripe * stripe
    rest = num_bar_blocks - whole
    chosen = np.concatenate([np.arange(whole), whole + np.arange(rest) * stripe // max(rest, 1)])
    chosen = chosen[chosen < full]
    others = np.setdiff1d(np.arange(full), chosen)
    blocks = sequence[: full * block_size].reshape(full, block_size)
    spread = blocks[np.concatenate([chosen, others])].ravel()
    return np.concatenate([spread, sequence[full * block_size :]])


def token_order(
    order: Int[np.ndarray, " N"], group_rank: Int[Array, "*batch H G"]
) -> Int[Array, "*batch N"]:
    """Tokens by importance, as the routed MLP takes them: whole groups, the best first.

    With rankings of several heads a group's place is the mean over the heads of its position in
    their rankings; ties go by the curve.
    """
    place = jnp.argsort(group_rank, axis=-1).sum(-2)
    return stripe_sequence(order, jnp.argsort(place, axis=-1, stable=True), "contiguous")


def inverse(permutation: Int[Array | np.ndarray, "*batch N"]) -> Int[Array, "*batch N"]:
    """The inverse of each permutation along the last axis."""
    return jnp.argsort(permutation, axis=-1)


def _groups(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve's full groups [G, 4] and the tokens left over."""
    full = len(order) // GROUP * GROUP
    return order[:full].reshape(-1, GROUP), order[full:]
