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
from jaxtyping import Array

from pallas_kernels.boxes import buffer, map_boxes, split_head_dim
from pallas_kernels.implementation import no_gradient

TILE_Q = 64  # queries of one product on the tensor core
REL = 16  # columns of rel and E: one K step of the tensor core, and the largest window
WARPGROUPS = 2  # that compute
SMEM_BYTES = 232448 - 4096  # shared memory of one block on Hopper, less barriers and scratch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel runs.

    Attributes:
        num_ctas: Blocks of threads: the device's multiprocessors, as one block fills one.
        kv_stages: Items whose k and v are in shared memory at a time.
        q_stages: Items whose q, rel and result are in shared memory at a time.
        take_turns: Whether the warpgroups take turns at the tensor core, one multiplying while the
            other is at its softmax. Without effect where one has more query tiles than the other,
            or where an operand has one stage: a turn would then wait for an item that waits for it.
    """

    num_ctas: int = 132
    kv_stages: int = 2
    q_stages: int = 2
    take_turns: bool = True


class Geometry(NamedTuple):
    """One window's operands in shared memory; `of` makes it."""

    box_rows: int  # window rows that a copy takes: a barrier counts whole units of 128 bytes
    num_tiles: int  # query tiles
    q_rows: int
    num_keys: int  # keys of a tile of logits, the masked ones after w w included
    chunks: tuple[int, ...]  # head_dim in parts whose rows are 128 or 32 bytes, a TMA swizzle

    @classmethod
    def of(cls, window_size: int, head_dim: int) -> Geometry:
        """The geometry of a window of `window_size` x `window_size` tokens."""
        box_rows = window_size if window_size % 2 == 0 else -(-window_size // 4) * 4
        num_tiles = -(-(window_size**2) // TILE_Q)
        return cls(
            box_rows=box_rows,
            num_tiles=num_tiles,
            q_rows=max(num_tiles * TILE_Q, -(-box_rows * window_size // 8) * 8),
            num_keys=max(-(-box_rows * window_size // 16) * 16, TILE_Q),
            chunks=split_head_dim(head_dim),
        )

    def smem_bytes(self, config: Config) -> int:
        """Shared memory of one block of threads, 16-bit operands."""
        row = 2 * sum(self.chunks)
        q_stage = self.q_rows * (row + 2 * REL * 2) + 1024
        kv_stage = 2 * self.num_keys * row
        one_hot = 2 * REL * self.num_keys * 2
        return config.q_stages * q_stage + config.kv_stages * kv_stage + one_hot


class Statics(NamedTuple):
    """What is known of a launch when it is traced."""

    window_size: int
    geometry: Geometry
    sparse: bool
    num_heads: int
    config: Config
    interpret: Any


def _kernel(
    qkv_gmem: Any,
    rel_gmem: tuple[Any, ...],
    one_hot_gmem: Any,
    keep_gmem: Any,
    out_gmem: Any,
    *,
    q_smem: list[Any],  # of every chunk of head_dim
    k_smem: list[Any],
    v_smem: list[Any],
    rel_smem: list[Any],
    one_hot_smem: Any,
    keep_smem: Any,
    q_full: Any,
    kv_full: Any,
    kv_empty: Any,
    out_full: Any,
    one_hot_full: Any,
    turn: Any,
    statics: Statics,
) -> None:
    w, geometry, sparse, num_heads, config, interpret = statics
    batch, height, width, _, head_dim = qkv_gmem.shape
    num_keys, chunks = geometry.num_keys, geometry.chunks
    spans = [pl.ds(sum(chunks[:c]), chunk) for c, chunk in enumerate(chunks)]
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
        for chunk, span in zip(q_smem, spans, strict=True):
            boxes = map_boxes(out_gmem, chunk, corner, (head, span), slot, (w, w, interpret))
            for target, source in boxes:
                plgpu.copy_smem_to_gmem(source, target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def transfer() -> None:
        plgpu.set_max_registers(40, action="decrease")
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

        logits = pl.run_scoped(
            multiply_qk, plgpu.WGMMAAccumulatorRef((TILE_Q, num_keys), jnp.float32)
        )
        if sparse or w * w < num_keys:
            logits = mask(logits, q_slot)
        scale = math.log2(math.e) / math.sqrt(head_dim)
        maximum = lax.broadcast_in_dim(logits.max(axis=1) * scale, logits.shape, [0])
        weights = jnp.exp2(logits * scale - maximum)  # [TILE_Q, num_keys]
        total = weights.sum(axis=1)
        # The barrier keeps the compiler from moving the softmax past the turn's end.
        weights, total = lax.optimization_barrier((weights.astype(qkv_gmem.dtype), total))
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

        accs = [plgpu.WGMMAAccumulatorRef((TILE_Q, chunk), jnp.float32) for chunk in chunks]
        for out, smem in zip(pl.run_scoped(multiply_weights_v, *accs), q_smem, strict=True):
            out *= lax.broadcast_in_dim(1 / total, out.shape, [0])
            smem[q_slot, rows] = out.astype(smem.dtype)

    def compute() -> None:
        plgpu.set_max_registers(232, action="increase")
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _launch(
    statics: Statics,
    qkv: Array,
    rel: tuple[Array, Array],
    one_hot: Array,
    keep: Array,
) -> Array:
    """Run the kernel.

    Args:
        statics: What is known when the launch is traced.
        qkv: [B, Gh, Gw, 3 H, D], 16-bit floats like rel and one_hot: q of all heads, k, v.
        rel: The left factors of the bias, sqrt(D) rel_h and sqrt(D) rel_w, [B, Gh, Gw, H, 16].
        one_hot: The right factors, transposed, [2, num_keys, 16].
        keep: 0 for the bar's keys and -inf for others, float32 [1 or B, 1 or W, 1 or H, 256].

    Returns:
        Attention's output [B, Gh, Gw, H, D].
    """
    window_size, geometry, sparse, num_heads, config, interpret = statics
    kv_stages, q_stages, chunks = config.kv_stages, config.q_stages, geometry.chunks

    def boxes_of(stages: int, rows: int) -> list[Any]:
        return [buffer(qkv.dtype, stages, rows, chunk) for chunk in chunks]

    def arrivals(num_boxes: int) -> int:
        return num_boxes * (window_size if interpret else 1)

    kernel = plgpu.kernel(
        functools.partial(_kernel, statics=statics),
        out_type=jax.ShapeDtypeStruct((*qkv.shape[:3], num_heads, qkv.shape[4]), qkv.dtype),
        scratch_types=dict(
            q_smem=boxes_of(q_stages, geometry.q_rows),
            k_smem=boxes_of(kv_stages, geometry.num_keys),
            v_smem=boxes_of(kv_stages, geometry.num_keys),
            rel_smem=[buffer(qkv.dtype, q_stages, geometry.q_rows, REL) for _ in rel],
            one_hot_smem=buffer(qkv.dtype, *one_hot.shape),
            keep_smem=plgpu.SMEM((q_stages, 256), jnp.float32),
            q_full=plgpu.Barrier(
                num_barriers=q_stages, num_arrivals=arrivals(len(chunks) + len(rel)) + sparse
            ),
            kv_full=plgpu.Barrier(num_barriers=kv_stages, num_arrivals=arrivals(2 * len(chunks))),
            kv_empty=plgpu.Barrier(num_barriers=kv_stages, num_arrivals=WARPGROUPS),
            out_full=plgpu.Barrier(num_barriers=q_stages, num_arrivals=WARPGROUPS),
            one_hot_full=plgpu.Barrier(),
            turn=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="window_attention",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    return kernel(qkv, rel, one_hot, keep)


_launch.defjvp(no_gradient("window_attention"))


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
launch = jax.jit(_launch, static_argnums=0)
