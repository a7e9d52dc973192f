"""Boxes of a feature map: what the copies and launches of the attention kernels have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import hopper
from pallas_kernels.hopper import OPERANDS


def split_head_dim(head_dim: int, dtype: DTypeLike) -> tuple[int, ...]:
    """head_dim in parts whose rows are the TMA's widest swizzle, and after these its narrowest."""
    operand = OPERANDS[jnp.dtype(dtype)]
    wide, rest = divmod(head_dim, operand.columns)
    return (operand.columns,) * wide + (operand.step,) * (rest // operand.step)


def spans_of(parts: tuple[int, ...]) -> list[Any]:
    """Where each part of head_dim lies, as slices of the last axis in global memory."""
    return [pl.ds(sum(parts[:p]), part) for p, part in enumerate(parts)]


def plain_rows(smem: Any) -> Any:
    """A `hopper.buffer` one tile wide without its tiling, so that boxes need not be whole tiles.

    Where a tile is as wide as the array, tiled rows lie behind each other like plain rows.
    """
    *others, _ = smem.transforms
    return dataclasses.replace(smem, transforms=tuple(others)).reshape(*smem.shape)


def as_box(smem: Any, index: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
    """The rows of a `hopper.buffer`, or of plain memory, seen as a box of the feature map."""
    plain = plain_rows(smem) if getattr(smem, "transforms", ()) else smem
    return plain.at[index].reshape(*shape, smem.shape[-1])


def map_boxes(
    gmem: Any, smem: Any, corner: tuple[Any, Any, Any], columns: Any, slot: Any, shape: Any
) -> Any:
    """A box of `shape` = (rows, w) of the feature map beside the rows of `smem` that it fills."""
    image, row, col = corner
    rows, w, interpret = shape
    if interpret:  # has no reshaped references
        for r in range(rows):
            window_row = gmem.at[image, row + r, pl.ds(col, w), *columns]
            yield window_row, smem.at[slot, pl.ds(r * w, w)]
    else:
        box = as_box(smem, (slot, pl.ds(0, rows * w)), (rows, w))
        yield gmem.at[image, pl.ds(row, rows), pl.ds(col, w), *columns], box


def launch_over_map(
    body: Callable[..., None],
    operands: tuple[Any, ...],
    *,
    tiles: tuple[int, int],
    num_items: int,
    num_programs: int,
    **options: Any,
) -> Any:
    """Run a kernel whose programs each stay with a tile of the map, and with the tile's tables.

    Args:
        body: The kernel; its axes are "row" and "col" of a tile, and "split".
        operands: What it reads.
        tiles: Rows and columns of tiles.
        num_items: What there is to do for every tile; programs of a tile take turns.
        num_programs: Programs at most, or one for each tile where there are more.
        **options: Further arguments of `hopper.kernel`.
    """
    num_splits = max(min(num_items, num_programs // math.prod(tiles)), 1)
    names = ("row", "col", "split")
    kernel = hopper.kernel(
        body, grid=(*tiles, num_splits), grid_names=names, approx_math=False, **options
    )
    return kernel(*operands)
