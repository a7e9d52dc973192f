"""The window attention kernel: all windows of a feature map in one launch, position bias fused.

For a query q and a key k of the same window of w x w tokens,

    logits[q, k] = q.k / sqrt(D) + rel_h[q, row(k)] + rel_w[q, col(k)]

and the softmax runs over all keys of the window, or over the bar of Stripe-Sort attention
(SparseSAM, arXiv 2605.17633). The position bias is MViTv2's (arXiv 2112.01526), as in SAM.

A window is one strided box of the raster feature map, which the tensor memory accelerator (TMA)
packs into w w consecutive rows of shared memory: nothing is partitioned or padded in global memory.
Past the edge of the map the TMA reads zeros, which are a padded token's k and v, and drops what is
written. The bias is a low-rank product: E_h[i, k] = [row(k) = i], E_w[i, k] = [col(k) = i],

    sqrt(D) logits = q.k + (sqrt(D) rel_h) E_h + (sqrt(D) rel_w) E_w,

two more K = 16 steps of the product that computes q.k.

Each block of threads takes every `num_ctas`-th (image, window, head), heads fastest, because a
token's heads are neighbours in memory. Two warpgroups compute, half of the window's query tiles of
64 each; a third loads the items to come and stores the results, which overwrite q in shared memory.
All keys of a window make one tile of logits, so the softmax never rescales.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import float8, hopper
from pallas_kernels.boxes import map_boxes, spans_of, split_head_dim
from pallas_kernels.hopper import MULTIPROCESSORS, REGISTERS, WGMMA_ROWS
from pallas_kernels.implementation import undifferentiable
from pallas_kernels.tiles import CHUNK

TILE_Q = WGMMA_ROWS  # queries of one product
REL = CHUNK  # columns of rel and E: one K step of the tensor core, and the largest window
KEEP = 256  # keys of a mask, of which a window has at most as many
WARPGROUPS = 2  # that compute


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel runs.

    Attributes:
        num_ctas: Blocks of threads: as one fills a multiprocessor, as many as there are.
        kv_stages: Items whose k and v are in shared memory at a time.
        q_stages: Items whose q, rel and result are in shared memory at a time.
        take_turns: Whether the warpgroups take turns at the tensor core, one multiplying while the
            other is at its softmax. Without effect where one has more query tiles than the other,
            or where an operand has one stage: a turn would then wait for an item that waits for it.
    """

    num_ctas: int = MULTIPROCESSORS
    kv_stages: int = 2
    q_stages: int = 2
    take_turns: bool = True

    def fits(
        self, window_size: int, head_dim: int, dtype: DTypeLike, *, float8_out: bool = False
    ) -> bool:
        """Whether a block of threads has the shared memory that this takes."""
        scratch = scratch_types(window_size, head_dim, dtype, self, float8_out=float8_out)
        return hopper.smem_bytes(scratch, reduces=True) <= hopper.smem_limit()


class Geometry(NamedTuple):
    """One window's operands in shared memory; `of` makes it."""

    box_rows: int  # window rows that a copy takes: a barrier counts whole units of 128 bytes
    num_tiles: int  # query tiles
    q_rows: int
    num_keys: int  # keys of a tile of logits, the masked ones after w w included

    @classmethod
    def of(cls, window_size: int) -> Geometry:
        """The geometry of a window of `window_size` x `window_size` tokens."""
        box_rows = window_size if window_size % 2 == 0 else -(-window_size // 4) * 4
        num_tiles = -(-(window_size**2) // TILE_Q)
        return cls(
            box_rows=box_rows,
            num_tiles=num_tiles,
            q_rows=max(num_tiles * TILE_Q, -(-box_rows * window_size // 8) * 8),
            num_keys=max(-(-box_rows * window_size // 16) * 16, TILE_Q),
        )


class Statics(NamedTuple):
    """What a launch knows when it is traced.

    Attributes:
        window_size: Side w of a window.
        num_heads: Heads H.
        sparse: Whether a mask keeps the bar's keys alone.
        config: How the kernel runs.
        interpret: False, or parameters of Mosaic GPU's interpret mode.
    """

    window_size: int
    num_heads: int
    sparse: bool
    config: Config
    interpret: Any


def _kernel(
    qkv_gmem, rel_gmem, one_hot_gmem, keep_gmem, inverse_out_gmem, out_gmem,
    *, q_smem, k_smem, v_smem, keep_smem,
    q_full, kv_full, kv_empty, out_full, turn,
    statics, rel_smem: Any = None, one_hot_smem: Any = None, one_hot_full: Any = None,
    out_smem: Any = None, rel_or_out_smem: Any = None,
):  # fmt: skip
    if rel_or_out_smem is not None:
        rel_smem, out_smem = rel_or_out_smem
    out_smem = q_smem if out_smem is None else out_smem
    w, num_heads, sparse = statics.window_size, statics.num_heads, statics.sparse
    config, interpret = statics.config, statics.interpret
    batch, height, width, _, head_dim = qkv_gmem.shape
    geometry, chunks = Geometry.of(w), split_head_dim(head_dim, qkv_gmem.dtype)
    num_keys, spans = geometry.num_keys, spans_of(chunks)
    compute_registers, transfer_registers = REGISTERS[WARPGROUPS]
    dtype = qkv_gmem.dtype
    down, across = pl.cdiv(height, w), pl.cdiv(width, w)
    num_items = batch * down * across * num_heads
    box_rows = w if interpret else geometry.box_rows
    tiles = pl.cdiv(geometry.num_tiles, WARPGROUPS)
    even = tiles * WARPGROUPS == geometry.num_tiles
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    steps = (num_items - cta + config.num_ctas - 1) // config.num_ctas

    def div_rem(x: Any, y: int) -> tuple[Any, Any]:
        return lax.div(x, jnp.int32(y)), lax.rem(x, jnp.int32(y))

    def slots(step: Any) -> tuple[Any, Any]:
        """The step's stages of q and of k and v."""
        return div_rem(step, config.q_stages)[1], div_rem(step, config.kv_stages)[1]

    def item(step: Any) -> tuple[tuple[Any, Any, Any], Any, Any]:
        """Where the step's window begins, its number in the image, and the head."""
        rest, head = div_rem(cta + step * config.num_ctas, num_heads)
        image, window = div_rem(rest, down * across)
        row, col = div_rem(window, across)
        return (image, row * w, col * w), window, head

    def load(gmem: Any, smem: Any, corner: Any, columns: Any, slot: Any, full: Any) -> None:
        boxes = map_boxes(gmem, smem, corner, columns, slot, (box_rows, w, interpret))
        for source, target in boxes:
            plgpu.copy_gmem_to_smem(source, target, full.at[slot])

    def load_kv(step: Any) -> None:
        corner, _, head = item(step)
        for which, smem in ((1, k_smem), (2, v_smem)):
            for chunk, span in zip(smem, spans, strict=True):
                columns = (which * num_heads + head, span)
                load(qkv_gmem, chunk, corner, columns, slots(step)[1], kv_full)

    def load_q(step: Any) -> None:
        corner, window, head = item(step)
        slot = slots(step)[0]
        for chunk, span in zip(q_smem, spans, strict=True):
            load(qkv_gmem, chunk, corner, (head, span), slot, q_full)
        for gmem, smem in zip(rel_gmem, rel_smem, strict=True):
            load(gmem, smem, corner, (head, pl.ds(0, REL)), slot, q_full)
        if sparse:
            indices = zip((corner[0], window, head), keep_gmem.shape, strict=False)
            keep = keep_gmem.at[*(0 if size == 1 else index for index, size in indices)]
            plgpu.copy_gmem_to_smem(keep, keep_smem.at[slot], q_full.at[slot])

    def store(step: Any) -> None:
        corner, _, head = item(step)
        slot = slots(step)[0]
        plgpu.barrier_wait(out_full.at[slot])
        out_spans = spans_of(tuple(smem.shape[-1] for smem in out_smem))
        for chunk, span in zip(out_smem, out_spans, strict=True):
            boxes = map_boxes(out_gmem, chunk, corner, (head, span), slot, (w, w, interpret))
            for target, source in boxes:
                plgpu.copy_smem_to_gmem(source, target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def transfer() -> None:
        plgpu.set_max_registers(transfer_registers, action="decrease")
        if one_hot_gmem is not None:
            plgpu.copy_gmem_to_smem(one_hot_gmem, one_hot_smem, one_hot_full)
        if box_rows * w < num_keys:
            # No copy writes the last rows, and weight 0 times whatever is there may be NaN.
            for smem in (*k_smem, *v_smem):
                zeros = jnp.zeros((TILE_Q, smem.shape[-1]), smem.dtype)
                zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                for slot in range(config.kv_stages):
                    smem[slot, num_keys - TILE_Q :] = zeros
            plgpu.commit_smem()

        def wait_kv_empty(step: Any) -> None:
            plgpu.barrier_wait(kv_empty.at[slots(step)[1]])

        @pl.loop(0, steps)
        def _(step: Any) -> None:
            pl.when(step >= config.kv_stages)(lambda: wait_kv_empty(step - config.kv_stages))
            load_kv(step)
            pl.when(step >= config.q_stages)(lambda: store(step - config.q_stages))
            load_q(step)

        pl.loop(jnp.maximum(steps - config.kv_stages, 0), steps)(wait_kv_empty)
        pl.loop(jnp.maximum(steps - config.q_stages, 0), steps)(store)
        plgpu.wait_smem_to_gmem(0)

    def yield_turn() -> None:
        if config.take_turns and even and min(config.q_stages, config.kv_stages) > 1:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

    def mask(logits: Any, q_slot: Any) -> Any:
        if sparse:
            keep = keep_smem.at[q_slot, pl.ds(0, num_keys)]
            by_column = plgpu.Layout.WGMMA.reduce(0)
            # pyright reads jax 0.10, where an index had to be given.
            keep = plgpu.load(keep, layout=by_column, optimized=False)  # pyright: ignore
            return logits + lax.broadcast_in_dim(keep, logits.shape, [1])
        # Only the columns that hold masked keys: the compiler would compare all of them.
        whole = w * w // 16 * 16
        last = logits[:, whole:]
        key = plgpu.broadcasted_iota(jnp.int32, last.shape, 1, layout=plgpu.Layout.WGMMA)
        last = jnp.where(key < w * w - whole, last, -jnp.inf)
        return jnp.concatenate([logits[:, :whole], last], axis=1)

    def attend(tile: Any, q_slot: Any, kv_slot: Any) -> None:
        rows = pl.ds(tile * TILE_Q, TILE_Q)

        def multiply_qk(acc_ref: Any) -> Any:
            for q, k in zip(q_smem, k_smem, strict=True):
                plgpu.wgmma(acc_ref, q.at[q_slot, rows], k.at[kv_slot].transpose((1, 0)))
            for axis, rel in enumerate(rel_smem):
                one_hot = one_hot_smem.at[axis].transpose((1, 0))
                plgpu.wgmma(acc_ref, rel.at[q_slot, rows], one_hot)
            yield_turn()
            return acc_ref[...]

        logits = pl.run_scoped(multiply_qk, hopper.accumulator(dtype, TILE_Q, num_keys))
        if sparse or w * w < num_keys:
            logits = mask(logits, q_slot)
        scale = math.log2(math.e) / math.sqrt(head_dim)
        maximum = lax.broadcast_in_dim(logits.max(axis=1) * scale, logits.shape, [0])
        weights = jnp.exp2(logits * scale - maximum)  # [TILE_Q, num_keys]
        total = weights.sum(axis=1)
        # The barrier keeps the compiler from moving the softmax past the turn's end.
        weights, total = lax.optimization_barrier((weights.astype(dtype), total))
        yield_turn()

        def multiply_weights_v(*acc_refs: Any) -> Any:
            if interpret:  # has no product with an operand in registers
                return [weights.astype(jnp.float32) @ v[kv_slot] for v in v_smem]
            for acc_ref, v, chunk in zip(acc_refs, v_smem, chunks, strict=True):
                # The product takes keys in groups of a chunk's width: the last group begins
                # inside the one before it, with weight zero there.
                whole = num_keys // chunk * chunk
                plgpu.wgmma(acc_ref, weights[:, :whole], v.at[kv_slot, pl.ds(0, whole)])
                if whole < num_keys:
                    zeros = jnp.zeros((TILE_Q, chunk - num_keys + whole), weights.dtype)
                    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                    last = jnp.concatenate([zeros, weights[:, whole:]], axis=1)
                    plgpu.wgmma(acc_ref, last, v.at[kv_slot, pl.ds(num_keys - chunk, chunk)])
            return [acc_ref[...] for acc_ref in acc_refs]

        accs = [hopper.accumulator(dtype, TILE_Q, chunk) for chunk in chunks]
        width = out_smem[0].shape[-1]
        pieces = [
            out[:, first : first + width]
            for out in pl.run_scoped(multiply_weights_v, *accs)
            for first in range(0, out.shape[1], width)
        ]
        for out, smem in zip(pieces, out_smem, strict=True):
            inverse = 1 / total
            if inverse_out_gmem is not None:
                inverse *= inverse_out_gmem[0]
            out *= lax.broadcast_in_dim(inverse, out.shape, [0])
            smem[q_slot, rows] = hopper.rounded(out, smem.dtype, interpret=interpret)

    def compute() -> None:
        plgpu.set_max_registers(compute_registers, action="increase")
        if one_hot_gmem is not None:
            plgpu.barrier_wait(one_hot_full)
        pl.when(warpgroup == 1)(yield_turn)

        @pl.loop(0, steps)
        def _(step: Any) -> None:
            q_slot, kv_slot = slots(step)
            plgpu.barrier_wait(kv_full.at[kv_slot])
            plgpu.barrier_wait(q_full.at[q_slot])
            for t in range(tiles):
                tile = warpgroup * tiles + t
                attend_tile = functools.partial(attend, tile, q_slot, kv_slot)
                attend_tile() if even else pl.when(tile < geometry.num_tiles)(attend_tile)
            plgpu.barrier_arrive(kv_empty.at[kv_slot])
            plgpu.commit_smem()
            plgpu.barrier_arrive(out_full.at[q_slot])

        pl.when(warpgroup == 0)(yield_turn)

    pl.when(warpgroup < WARPGROUPS)(compute)
    pl.when(warpgroup == WARPGROUPS)(transfer)


def scratch_types(
    window_size: int,
    head_dim: int,
    dtype: DTypeLike,
    config: Config,
    *,
    sparse: bool = True,
    has_bias: bool = True,
    float8_out: bool = False,
    interpret: Any = False,
) -> dict[str, Any]:
    """Shared memory and barriers of a block of threads.

    A result in 8 bits has no place in q's rows, as its own are half as wide and a warpgroup's would
    lie among the other's queries. Rows of rel are as wide as those of 32 columns of it: at head_dim
    64 it takes the place of rel, which is read no more, and else memory of its own.
    """
    kv_stages, q_stages = config.kv_stages, config.q_stages
    geometry, chunks = Geometry.of(window_size), split_head_dim(head_dim, dtype)
    rel = (REL, REL) if has_bias else ()
    copies = window_size if interpret else 1  # that a box takes

    def boxes_of(
        stages: int, rows: int, widths: tuple[int, ...], dtype: DTypeLike = dtype
    ) -> list[Any]:
        return [hopper.buffer(dtype, stages, rows, width) for width in widths]

    scratch: dict[str, Any] = dict(
        q_smem=boxes_of(q_stages, geometry.q_rows, chunks),
        k_smem=boxes_of(kv_stages, geometry.num_keys, chunks),
        v_smem=boxes_of(kv_stages, geometry.num_keys, chunks),
        rel_smem=boxes_of(q_stages, geometry.q_rows, rel),
        keep_smem=plgpu.SMEM((q_stages, KEEP), jnp.float32),
        q_full=plgpu.Barrier(
            num_barriers=q_stages, num_arrivals=copies * (len(chunks) + len(rel)) + sparse
        ),
        kv_full=plgpu.Barrier(num_barriers=kv_stages, num_arrivals=copies * 2 * len(chunks)),
        kv_empty=plgpu.Barrier(num_barriers=kv_stages, num_arrivals=WARPGROUPS),
        out_full=plgpu.Barrier(num_barriers=q_stages, num_arrivals=WARPGROUPS),
        turn=plgpu.Barrier(num_arrivals=WARPGROUPS),
    )
    if has_bias:
        scratch["one_hot_smem"] = hopper.buffer(dtype, len(rel), geometry.num_keys, REL)
        scratch["one_hot_full"] = plgpu.Barrier()
    if float8_out:
        widths = tuple(smem.dtype.itemsize * REL for smem in scratch["rel_smem"])
        in_place = sum(widths) == head_dim
        out_smem = boxes_of(q_stages, geometry.q_rows, widths if in_place else chunks, float8.DTYPE)
        if in_place:
            scratch["rel_or_out_smem"] = plgpu.RefUnion(scratch.pop("rel_smem"), out_smem)
        else:
            scratch["out_smem"] = out_smem
    return scratch


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def launch(
    statics: Statics,
    qkv: Array,
    rel: tuple[Array, ...],
    one_hot: Array | None,
    keep: Array,
    inverse_out: Array | None,
) -> Array:
    """Run the kernel on what `window_attention.prepare` gives.

    Args:
        statics: What is known when the launch is traced.
        qkv: [B, Gh, Gw, 3 H, D], 16-bit floats like rel and one_hot: q of all heads, k, v.
        rel: The left factors of the bias, sqrt(D) rel_h and sqrt(D) rel_w, [B, Gh, Gw, H, 16];
            none without a position bias.
        one_hot: The right factors, transposed, [2, num_keys, 16]; None without.
        keep: 0 for the bar's keys and -inf for others, float32 [1 or B, 1 or W, 1 or H, 256].
        inverse_out: What a result in 8 bits is multiplied by, float32 [1]; None is one of qkv's
            dtype.

    Returns:
        Attention's output [B, Gh, Gw, H, D].
    """
    qkv, rel = undifferentiable("window_attention", (qkv, rel))
    config, interpret, head_dim = statics.config, statics.interpret, qkv.shape[-1]
    float8_out = inverse_out is not None
    out_dtype = float8.DTYPE if float8_out else qkv.dtype
    kernel = hopper.kernel(
        functools.partial(_kernel, statics=statics),
        name="window_attention",
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((*qkv.shape[:3], statics.num_heads, head_dim), out_dtype),
        scratch_types=scratch_types(
            statics.window_size,
            head_dim,
            qkv.dtype,
            config,
            sparse=statics.sparse,
            has_bias=one_hot is not None,
            float8_out=float8_out,
            interpret=interpret,
        ),
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
    )
    return kernel(qkv, rel, one_hot, keep, inverse_out)
