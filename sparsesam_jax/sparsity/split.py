"""How a density's computed work is split between attention and MLP.

A density r buys what the method computes with r in every block, windows, global attention and MLP
alike (`split="equal"`, as in the authors' released code). `split="balanced"` spends the same work
elsewhere: windows are dense, since dropping keys from them saves little, global attention has
density `r ** 1.5`, and the routed MLP gets all that is left. docs/quality.md has the measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from pallas_kernels import BlockLayout
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.sparsity.macs import Grid, attention_work, computed_pairs, mlp_work

Densities = tuple[float, float]  # of a block's attention and of its MLP

_GLOBAL_EXPONENT = 1.5  # of the density of global attention


@functools.lru_cache(maxsize=256)
def block_densities(config: ImageEncoderConfig, sparsity: Sparsity) -> tuple[Densities, ...]:
    """The densities of attention and MLP in every block.

    Densities that the sparsity names for attention, for the MLP or block by block are taken as they
    are.

    Raises:
        ValueError: A density is given per block, but not for as many blocks as the encoder has.
    """
    equal = tuple(sparsity.block_density(index, config.depth) for index in range(config.depth))
    r = sparsity.density
    if sparsity.split == "equal" or isinstance(r, tuple) or r == 1:
        return equal
    if (sparsity.attention_density, sparsity.mlp_density) != (None, None):
        return equal
    routed = [index for index in range(config.depth) if is_routed(config, sparsity, index)]
    if not routed:
        return equal
    grid = (config.grid_size, config.grid_size)
    tokens = grid[0] * grid[1]
    whole = len(routed) * mlp_work(config, tokens)  # of the MLPs that may be routed

    def attention(global_density: float) -> list[float]:
        return [global_density if config.is_global(i) else 1.0 for i in range(config.depth)]

    def left(global_density: float) -> float:
        """What the budget leaves to the routed MLPs."""
        kept = (densities[0] for densities in equal)
        spent = _attention_work(config, sparsity, grid, attention(global_density))
        return _attention_work(config, sparsity, grid, kept) + r * whole - spent

    global_density = r**_GLOBAL_EXPONENT
    if left(global_density) > whole:  # more than all MLPs need: back to global attention
        num_blocks = BlockLayout.dense(tokens, block_kv=sparsity.block_size).num_kv_blocks
        steps = (step / num_blocks for step in range(num_blocks, 0, -1))
        global_density = next((a for a in steps if left(a) >= whole), global_density)
    mlp_density = min(1.0, max(1 / tokens, left(global_density) / whole))
    return tuple((a, mlp_density) for a in attention(global_density))


def attention_layout(
    config: ImageEncoderConfig, index: int, grid: Grid, density: float, block_size: int = 64
) -> BlockLayout:
    """The block layout of one block's attention on a token grid (of its window, if windowed)."""
    size = {"block_q": block_size, "block_kv": block_size}
    if config.is_global(index):
        return BlockLayout.a_shape(grid[0] * grid[1], density, **size)
    return BlockLayout.bar(config.window_size**2, density, **size)


def is_routed(config: ImageEncoderConfig, sparsity: Sparsity, index: int) -> bool:
    """Whether a block's MLP may skip tokens: it is windowed, and the tokens are ranked by then."""
    start = sparsity.mlp_start
    if start is None:
        start = first_global(config) + 1
    return index >= start and not config.is_global(index)


def first_global(config: ImageEncoderConfig) -> int:
    """The first global block; the depth if there is none, so that nothing lies behind it."""
    return min(config.global_attn_indexes, default=config.depth)


def _attention_work(
    config: ImageEncoderConfig, sparsity: Sparsity, grid: Grid, densities: Iterable[float]
) -> int:
    """Of all blocks, each with a density of its own."""
    work = 0
    for index, density in enumerate(densities):
        layout = attention_layout(config, index, grid, density, sparsity.block_size)
        work += attention_work(config, index, grid, computed_pairs(layout))
    return work
