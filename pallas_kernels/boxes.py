"""Boxes of a feature map in shared memory: what the attention kernels' copies have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SMEM_BYTES = 232448 - 2048  # shared memory of one program on Hopper, less what its barriers take


def split_head_dim(head_dim: int) -> tuple[int, ...]:
    """head_dim in parts whose rows are 128 or 32 bytes of 16-bit floats: a TMA swizzle."""
    return (64,) * (head_dim // 64) + (16,) * (head_dim % 64 // 16)


def buffer(dtype: Any, *shape: int) -> Any:
    """Shared memory of an operand of wgmma, as wide as one swizzle."""
    tiling = plgpu.TilingTransform((8, shape[-1]))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(2 * shape[-1])  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def as_box(smem: Any, index: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
    """The rows of a `buffer`, or of plain memory, seen as a box of `shape` of the feature map.

    Where a tile is as wide as the array, tiled rows lie behind each other like plain rows: the
    tiling is dropped, as the box's sides need not be whole tiles.
    """
    if not getattr(smem, "transforms", ()):
        return smem.at[index].reshape(*shape, smem.shape[-1])
    unswizzle, _ = smem.transforms
    plain = dataclasses.replace(smem, transforms=(unswizzle,)).reshape(*smem.shape)
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
