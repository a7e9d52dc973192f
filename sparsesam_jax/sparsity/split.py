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
from sparsesam_jax.config import BlockConfig, EncoderConfig, Grid, Sparsity
from sparsesam_jax.sparsity.macs import attention_work, computed_pairs, mlp_work

Densities = tuple[float, float]  # of a block's attention and of its MLP

_GLOBAL_EXPONENT = 1.5  # of the density of global attention


@functools.lru_cache(maxsize=256)
def block_densities(config: EncoderConfig, sparsity: Sparsity) -> tuple[Densities, ...]:
    """The densities of attention and MLP in every block.

    Densities that the sparsity names for attention, for the MLP or block by block are taken as they
    are.

    Raises:
        ValueError: A density is given per block, but not for as many blocks as the encoder has.
    """
    blocks = config.blocks
    equal = tuple(sparsity.block_density(index, len(blocks)) for index in range(len(blocks)))
    r = sparsity.density
    if sparsity.split == "equal" or isinstance(r, tuple) or r == 1:
        return equal
    if (sparsity.attention_density, sparsity.mlp_density) != (None, None):
        return equal
    routed = [block for i, block in enumerate(blocks) if is_routed(config, sparsity, i)]
    if not routed:
        return equal
    grid = (config.grid_size, config.grid_size)
    tokens = grid[0] * grid[1]
    whole = sum(mlp_work(block, tokens) for block in routed)  # of the MLPs that may be routed

    def attention(global_density: float) -> list[float]:
        return [global_density if block.is_global else 1.0 for block in blocks]

    def left(global_density: float) -> float:
        """What the budget leaves to the routed MLPs."""
        kept = (densities[0] for densities in equal)
        spent = _attention_work(blocks, sparsity, grid, attention(global_density))
        return _attention_work(blocks, sparsity, grid, kept) + r * whole - spent

    global_density = r**_GLOBAL_EXPONENT
    if left(global_density) > whole:  # more than all MLPs need: back to global attention
        num_blocks = BlockLayout.dense(tokens, block_kv=sparsity.block_size).num_kv_blocks
        steps = (step / num_blocks for step in range(num_blocks, 0, -1))
        global_density = next((a for a in steps if left(a) >= whole), global_density)
    mlp_density = min(1.0, max(1 / tokens, left(global_density) / whole))
    return tuple((a, mlp_density) for a in attention(global_density))


def attention_layout(
    block: BlockConfig, grid: Grid, density: float, block_size: int = 64
) -> BlockLayout:
    """The block layout of a block's attention on a token grid (of its window, if windowed)."""
    size = {"block_q": block_size, "block_kv": block_size}
    if block.window_size is None:
        return BlockLayout.a_shape(grid[0] * grid[1], density, **size)
    return BlockLayout.bar(block.window_size**2, density, **size)


def is_routed(config: EncoderConfig, sparsity: Sparsity, index: int) -> bool:
    """Whether a block's MLP may skip tokens: it is routable, and the tokens are ranked by then."""
    start = sparsity.mlp_start
    if start is None:
        start = first_global(config) + 1
    return index >= start and config.blocks[index].routable


def first_global(config: EncoderConfig) -> int:
    """The first global block, which ranks the tokens; the depth if there is none."""
    indices = (index for index, block in enumerate(config.blocks) if block.is_global)
    return next(indices, len(config.blocks))


def _attention_work(
    blocks: Iterable[BlockConfig], sparsity: Sparsity, grid: Grid, densities: Iterable[float]
) -> int:
    """Of all blocks, each with a density of its own."""
    work = 0
    for block, density in zip(blocks, densities, strict=True):
        layout = attention_layout(block, grid, density, sparsity.block_size)
        work += attention_work(block, grid, computed_pairs(layout))
    return work
