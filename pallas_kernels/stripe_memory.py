"""What a program of the stripe attention kernel has: operands, shared memory, barriers, copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import float8, hopper
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.boxes import as_box, spans_of, split_head_dim
from pallas_kernels.stripe_schedule import Config, Schedule
from pallas_kernels.tiles import BLOCK, CHUNK, SIDE, Tiling


class Operands(NamedTuple):
    """What the kernel reads beside qkv: the position bias, in the units of q . k, if there is one.

    Attributes:
        rel_h: Tiles: float32 [B H tiles, Gh, 64], the bias of key rows sorted by parity.
            Sequences: [B, N / 8, 8, H, multiple of 16] as `Tiling.view` sees it, dtype of qkv.
        rel_w: Tiles: [B H tiles, Gw / 16, 64, 16], key columns sorted by parity, dtype of qkv.
            Sequences: like rel_h.
        onehot: Tiles: None. Sequences: the keys' coordinates, [1 or B or B H, chunks, N, 16].
        inverse_out: What a result in 8 bits is multiplied by, float32 [1]; None is one of qkv's
            dtype.
    """

    rel_h: Any = None
    rel_w: Any = None
    onehot: Any = None
    inverse_out: Any = None

    @property
    def rel(self) -> list[Any]:
        """rel_h and rel_w, or nothing without a position bias."""
        return [x for x in (self.rel_h, self.rel_w) if x is not None]

    def out_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """Of the result for qkv of a dtype."""
        return dtype if self.inverse_out is None else float8.DTYPE


class Statics(NamedTuple):
    """What a launch knows when it is traced.

    Attributes:
        layout: The block layout.
        config: How the kernel runs.
        tiling: Which tokens make a block.
        gathered: Whether qkv is a sequence, of the launch's images alone; else it is the map of
            the whole batch.
        num_heads: Heads H.
        num_images: How many images of the batch it attends to.
        batch_size: Images B of the batch.
        interpret: False, or parameters of Mosaic GPU's interpret mode.
    """

    layout: BlockLayout
    config: Config
    tiling: Tiling
    gathered: bool
    num_heads: int
    num_images: int
    batch_size: int
    interpret: Any

    @property
    def schedule(self) -> Schedule:
        """The launch's items and steps."""
        return Schedule(self.layout, self.config, self.num_heads, self.num_images)


def scratch_types(
    config: Config,
    head_dim: int,
    dtype: DTypeLike,
    operands: Operands,
    *,
    interpret: Any = False,
) -> dict[str, Any]:
    """Shared memory and barriers of a program; of the operands only shapes and dtypes matter."""
    num_wgs, num_stages, block_kv = config.num_warpgroups, config.num_stages, config.block_kv
    parts, copies = split_head_dim(head_dim, dtype), SIDE if interpret else 1  # that a box takes
    q_arrivals = len(parts) * copies
    k_arrivals = v_arrivals = block_kv // BLOCK * len(parts) * copies
    scratch: dict[str, Any] = {}
    if operands.onehot is not None:
        chunks = [x.shape[-1] // CHUNK for x in operands.rel]
        rel_smem = [hopper.buffer(dtype, num_wgs, c, BLOCK, CHUNK) for c in chunks]
        scratch["onehot_smem"] = hopper.buffer(dtype, num_stages, sum(chunks), block_kv, CHUNK)
        q_arrivals += sum(chunks) * copies
        k_arrivals += sum(chunks) * block_kv // BLOCK
    else:
        rel_smem = [plgpu.SMEM((num_wgs, *x.shape[1:]), x.dtype) for x in operands.rel]
        q_arrivals += len(rel_smem)
    if interpret:
        scratch["p_smem"] = plgpu.SMEM((num_wgs, BLOCK, block_kv), dtype)
    return scratch | dict(
        q_smem=[hopper.buffer(dtype, num_wgs, BLOCK, part) for part in parts],
        out_smem=[hopper.buffer(operands.out_dtype(dtype), num_wgs, BLOCK, part) for part in parts],
        k_smem=[hopper.buffer(dtype, num_stages, block_kv, part) for part in parts],
        v_smem=[hopper.buffer(dtype, num_stages, block_kv, part) for part in parts],
        rel_smem=rel_smem,
        q_ready=plgpu.Barrier(num_barriers=num_wgs, num_arrivals=q_arrivals),
        k_ready=plgpu.Barrier(num_barriers=num_stages, num_arrivals=k_arrivals),
        v_ready=plgpu.Barrier(num_barriers=num_stages, num_arrivals=v_arrivals),
        k_free=plgpu.Barrier(num_barriers=num_stages, num_arrivals=num_wgs),
        v_free=plgpu.Barrier(num_barriers=num_stages, num_arrivals=num_wgs),
        turn=plgpu.Barrier(num_barriers=num_wgs),
    )


def fits(config: Config, head_dim: int, dtype: DTypeLike, operands: Operands) -> bool:
    """Whether a warpgroup has the registers and a program the shared memory that this takes."""
    # 160 registers a thread: ptxas spills past these and then serialises wgmma (C7512).
    few_registers = config.num_warpgroups == 3 and config.block_kv == 128
    if few_registers and (head_dim > 64 or operands.onehot is not None):
        return False
    scratch = scratch_types(config, head_dim, dtype, operands)
    return hopper.smem_bytes(scratch, reduces=True) <= hopper.smem_limit()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """A program's references: arrays in global memory, buffers and barriers in shared memory.

    `stripe_kernel` says which barrier is for what. Indices of images count those of the launch.
    """

    statics: Statics
    first_image: Any  # of the batch, in whose map it is
    inverse_out: Any  # the operand's number, or None
    qkv_gmem: Any
    operands: Operands
    table_gmem: Any
    out_gmem: Any
    q_smem: list[Any]  # of every part of head_dim, like the next three
    k_smem: list[Any]
    v_smem: list[Any]
    out_smem: list[Any]
    rel_smem: list[Any]
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any
    onehot_smem: Any = None
    p_smem: Any = None  # the weights, in interpret mode

    @property
    def head_dim(self) -> int:
        """Width D of a head."""
        return self.qkv_gmem.shape[-1]

    @property
    def dtype(self) -> Any:
        """Of qkv."""
        return self.qkv_gmem.dtype

    @property
    def parts(self) -> tuple[int, ...]:
        """head_dim in parts, each with a buffer of its own."""
        return split_head_dim(self.head_dim, self.dtype)

    def entry(self, image: Any, column: Any) -> Any:
        """What the table has about an image."""
        return self.table_gmem[image if self.table_gmem.shape[0] > 1 else 0, column]

    def boxes(
        self, gmem: Any, image: Any, head: Any, tile: Any, span: Any, smem: Any, *slot: Any
    ) -> Iterator[tuple[Any, Any]]:
        """A tile of the map [B rows, stride, columns, stride H, C] and the 64 rows it fills."""
        tiling = self.statics.tiling
        row, row_parity, col, col_parity = tiling.corner(tile)
        row += image * tiling.rows
        head += col_parity * (gmem.shape[3] // tiling.stride)
        if self.statics.interpret:  # has no reshaped references
            for r in range(SIDE):
                source = gmem.at[row + r, row_parity, pl.ds(col, SIDE), head, span]
                *outer, rows = slot
                yield source, smem.at[*outer, pl.ds(rows.start + r * SIDE, SIDE)]
        else:
            source = gmem.at[pl.ds(row, SIDE), row_parity, pl.ds(col, SIDE), head, span]
            yield source, as_box(smem, slot, (SIDE, SIDE))

    def load_block(
        self,
        which: int,
        image: Any,
        head: Any,
        tile: Any,
        smem: list[Any],
        slot: Any,
        part: int,
        ready: Any,
    ) -> None:
        """Copy a tile's queries (`which` 0), keys (1) or values (2) to rows `part` of a slot."""
        head += which * self.statics.num_heads
        image = image if self.statics.gathered else self.first_image + image
        for own_smem, span in zip(smem, spans_of(self.parts), strict=True):
            rows = pl.ds(part * BLOCK, BLOCK)
            place = (image, head, tile, span, own_smem, slot, rows)
            for source, target in self.boxes(self.qkv_gmem, *place):
                plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

    def load_query_bias(self, image: Any, head: Any, tile: Any, wg: Any) -> None:
        """Copy the position bias of a query block."""
        rel = list(zip(self.operands.rel, self.rel_smem, strict=True))
        if rel and self.operands.onehot is None:
            own = (image * self.statics.num_heads + head) * self.statics.tiling.num_tiles + tile
            for gmem, smem in rel:
                plgpu.copy_gmem_to_smem(gmem.at[own], smem.at[wg], self.q_ready.at[wg])
            return
        for gmem, smem in rel:
            for c in range(smem.shape[1]):
                span, rows = pl.ds(c * CHUNK, CHUNK), pl.ds(0, BLOCK)
                place = (image, head, tile, span, smem, wg, c, rows)
                for source, target in self.boxes(gmem, *place):
                    plgpu.copy_gmem_to_smem(source, target, self.q_ready.at[wg])

    def load_key_bias(self, image: Any, head: Any, tile: Any, slot: Any, part: int) -> None:
        """Copy the coordinates of a tile's keys, which only those of a sequence have."""
        onehot, num_heads = self.operands.onehot, self.statics.num_heads
        if onehot is None:
            return
        own_index = {1: 0, self.statics.num_images: image}
        index = own_index.get(onehot.shape[0], image * num_heads + head)
        rows, keys = pl.ds(part * BLOCK, BLOCK), pl.ds(tile * BLOCK, BLOCK)
        for c in range(onehot.shape[1]):
            target = self.onehot_smem.at[slot, c, rows]
            plgpu.copy_gmem_to_smem(onehot.at[index, c, keys], target, self.k_ready.at[slot])

    def store_block(self, image: Any, head: Any, tile: Any, wg: Any) -> None:
        """Copy a query block's result to its place in the batch."""
        rows, image = pl.ds(0, BLOCK), self.first_image + image
        for smem, span in zip(self.out_smem, spans_of(self.parts), strict=True):
            for target, source in self.boxes(
                self.out_gmem, image, head, tile, span, smem, wg, rows
            ):
                plgpu.copy_smem_to_gmem(source, target)
