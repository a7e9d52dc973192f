"""The stripe attention kernel: flash attention over a block layout, position bias fused.

    logits[q, k] = q . k / sqrt(D) + rel_h[q, row(k)] + rel_w[q, col(k)]
    out[q] = softmax over the layout's keys (logits[q, :]) @ v

Blocks of 64 tokens are tiles of 8 x 8 tokens of the feature map, with a stride of one or, in a
stripe, two. The tensor memory accelerator (TMA) reads them as boxes of the raster map: no sequence
is ever written to global memory. The 64 keys of a tile share 8 rows and 8 columns, so their bias is
8 + 8 numbers a query, and sums of these are what the product q @ k^T accumulates onto. Sequences
whose blocks are no tiles (ranked groups) come permuted, and their bias takes products of its own,
`rel_h @ onehot(rows) + rel_w @ onehot(cols)`, over all coordinates in chunks of K = 16.

An item of work is `num_warpgroups` query blocks of one head, each in its own warpgroup, over the
same keys; one more warpgroup streams keys and values in. Programs are persistent: the next item's
queries and keys come in while an item ends. A warpgroup issues the logits of the next step together
with the product of values of this one, and warpgroups take turns in issuing, so that one multiplies
while the others are at their softmax. Diagonal blocks are steps of their own, read by one warpgroup
each. Design after FlashAttention-3 (Shah et al., arXiv 2407.08608) and jax's `attention_mgpu`.
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

from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.boxes import SMEM_BYTES, as_box, buffer, split_head_dim
from pallas_kernels.implementation import no_gradient
from pallas_kernels.tiles import BLOCK, CHUNK, SIDE, Tiling, div_rem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel runs.

    Attributes:
        num_warpgroups: Query blocks in a program, one a warpgroup; at most `num_stages`.
        block_kv: Keys in a step, 64 or 128.
        num_stages: Steps in flight between TMA and the warpgroups.
        num_programs: Programs at most; each works through every `num_programs`-th item. The
            default is the number of multiprocessors of an H100 or H200 (SXM).
    """

    num_warpgroups: int
    block_kv: int
    num_stages: int
    num_programs: int = 132

    def items(self, layout: BlockLayout, num_heads: int) -> int:
        """Items of work of one image, of which every program takes one at a time."""
        return -(-layout.num_q_blocks // self.num_warpgroups) * num_heads

    def fits(self, head_dim: int, query_bias_bytes: int, key_bias_bytes: int) -> bool:
        """Whether a warpgroup has the registers and a program the shared memory it takes.

        Args:
            head_dim: Width D of a head.
            query_bias_bytes: What the bias takes for every query block.
            key_bias_bytes: What it takes for every key; 0 for tiles.
        """
        # 160 registers a thread: ptxas spills past these and then serialises wgmma (C7512).
        few_registers = self.num_warpgroups == 3 and self.block_kv == 128
        if few_registers and (head_dim > 64 or key_bias_bytes):
            return False
        query = BLOCK * 4 * head_dim + query_bias_bytes
        stage = self.block_kv * (4 * head_dim + key_bias_bytes)
        return self.num_warpgroups * query + self.num_stages * stage <= SMEM_BYTES


class Operands(NamedTuple):
    """The position bias as the kernel reads it, in the units of q . k.

    Attributes:
        rel_h: Tiles: float32 [B H tiles, Gh, 64], the bias of key rows sorted by parity.
            Sequences: [B, N / 8, 8, H, multiple of 16] as `Tiling.view` sees it, dtype of qkv.
        rel_w: Tiles: [B H tiles, Gw / 16, 64, 16], key columns sorted by parity, dtype of qkv.
            Sequences: like rel_h.
        onehot: Tiles: None. Sequences: the keys' coordinates, [1 or B or B H, chunks, N, 16].
    """

    rel_h: Any
    rel_w: Any
    onehot: Any = None


class _Step(NamedTuple):
    """A step of keys: its stage, how many they are, and what to add to the logits."""

    slot: Any
    keys: int
    mask: Any = None  # of a diagonal step only


def _kernel(
    first_gmem, qkv_gmem, operands, table_gmem, out_gmem,
    *, q_smem, out_smem, k_smem, v_smem, rel_smem,
    q_ready, k_ready, v_ready, k_free, v_free, turn,
    statics, onehot_smem: Any = None, p_smem: Any = None,
):  # fmt: skip
    layout, config, tiling, streamed, num_heads, batch_size, _, interpret = statics
    first_image = 0 if first_gmem is None else first_gmem[0]
    head_dim, dtype = qkv_gmem.shape[-1], qkv_gmem.dtype
    spans, start = [], 0
    for chunk in split_head_dim(head_dim):
        spans.append(pl.ds(start, chunk))
        start += chunk
    num_wgs, num_stages, block_kv = config.num_warpgroups, config.num_stages, config.block_kv
    per_step = block_kv // BLOCK
    num_full, tail = divmod(layout.num_bar_blocks, per_step)
    num_shared = num_full + bool(tail)
    num_steps = num_shared + (num_wgs if layout.diagonal else 0)  # of one item
    own_blocks = num_shared * per_step  # where the table of each query block's own tile begins
    scale = math.log2(math.e) / math.sqrt(head_dim)
    program, wg = lax.axis_index("program"), lax.axis_index("wg")

    # An item is `num_wgs` query blocks of one head. Those of a head with fewer query blocks left
    # come last: they fill the end of the launch.
    num_heads_all = batch_size * num_heads
    per_head, rest = divmod(layout.num_q_blocks, num_wgs)
    num_items = num_heads_all * (per_head + bool(rest))
    num_programs = min(config.num_programs, num_items)
    num_own_items = lax.div(num_items - 1 - program, num_programs) + 1

    def place(count):
        """Batch, head and first query block of this program's item `count`."""
        item = program + count * num_programs
        is_rest = item >= num_heads_all * per_head
        head_index = jnp.where(
            is_rest, item - num_heads_all * per_head, lax.div(item, max(per_head, 1))
        )
        tile = jnp.where(is_rest, per_head, lax.rem(item, max(per_head, 1)))
        return lax.div(head_index, num_heads), lax.rem(head_index, num_heads), tile * num_wgs

    def entry(batch, column):
        return table_gmem[batch if table_gmem.shape[0] > 1 else 0, column]

    def boxes(gmem, batch, head, tile, span, smem, *slot):
        """A tile of the map [B rows, stride, columns, stride H, C] and the 64 rows it fills."""
        row, row_parity, col, col_parity = tiling.corner(tile)
        row += batch * tiling.rows
        head += col_parity * (gmem.shape[3] // tiling.stride)
        if interpret:  # has no reshaped references
            for r in range(SIDE):
                source = gmem.at[row + r, row_parity, pl.ds(col, SIDE), head, span]
                *outer, rows = slot
                yield source, smem.at[*outer, pl.ds(rows.start + r * SIDE, SIDE)]
        else:
            source = gmem.at[pl.ds(row, SIDE), row_parity, pl.ds(col, SIDE), head, span]
            yield source, as_box(smem, slot, (SIDE, SIDE))

    def load_block(which, batch, head, tile, smem, slot, part, ready):
        head += which * num_heads
        image = batch if streamed else first_image + batch  # sequences are gathered by launch
        for chunk, span in zip(smem, spans, strict=True):
            rows = pl.ds(part * BLOCK, BLOCK)
            for source, target in boxes(qkv_gmem, image, head, tile, span, chunk, slot, rows):
                plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

    @pl.when(wg < num_wgs)
    def _compute():
        plgpu.set_max_registers(160 if num_wgs == 3 else 232, action="increase")

        def query_block(count):
            batch, head, first_block = place(count)
            block = jnp.minimum(first_block + wg, layout.num_q_blocks - 1)
            return batch, head, block, entry(batch, own_blocks + block)

        def load_queries(count):
            batch, head, _, tile = query_block(count)
            load_block(0, batch, head, tile, q_smem, wg, 0, q_ready)
            rel = (operands.rel_h, operands.rel_w)
            if not streamed:
                own = (batch * num_heads + head) * tiling.num_tiles + tile
                for source, smem in zip(rel, rel_smem, strict=True):
                    plgpu.copy_gmem_to_smem(source.at[own], smem.at[wg], q_ready.at[wg])
                return
            for gmem, smem in zip(rel, rel_smem, strict=True):
                for c in range(smem.shape[1]):
                    span, rows = pl.ds(c * CHUNK, CHUNK), pl.ds(0, BLOCK)
                    for source, target in boxes(gmem, batch, head, tile, span, smem, wg, c, rows):
                        plgpu.copy_gmem_to_smem(source, target, q_ready.at[wg])

        def step_tiles(batch, i):
            """A step's tiles: asked for a step ahead, since a load from global memory is slow."""
            return tuple(entry(batch, i * per_step + part) for part in range(per_step))

        def tile_bias(tile):
            """The bias of 8 keys at a time, [64, 8]: of every row of the tile."""
            row, col = tiling.coordinates(tile)
            chunk, half = div_rem(col, CHUNK // SIDE)
            # pyright reads jax 0.10, where an index had to be given.
            by_col = rel_smem[1].at[wg, chunk, :, pl.ds(half * SIDE, SIDE)]
            by_col = plgpu.load(by_col, layout=plgpu.Layout.WGMMA, optimized=False)  # pyright: ignore
            by_col = by_col.astype(jnp.float32)
            for r in range(SIDE):
                by_row = rel_smem[0].at[wg, row * SIDE + r]
                layout_1d = plgpu.Layout.WGMMA.reduce(1)
                by_row = plgpu.load(by_row, layout=layout_1d, optimized=False)  # pyright: ignore
                yield by_col + lax.broadcast_in_dim(by_row, by_col.shape, [0])

        def issue_logits(s_ref, step, tiles):
            """Issue q @ k^T + bias; what is left to add to it is returned."""
            keys = pl.ds(0, step.keys)
            bias = None
            if not streamed:
                parts = [x for tile in tiles[: step.keys // BLOCK] for x in tile_bias(tile)]
                bias = jnp.concatenate(parts, axis=1)
                if not interpret:  # which cannot write an accumulator
                    s_ref[...] = bias
            plgpu.barrier_wait(turn.at[wg])
            for q_chunk, k_chunk in zip(q_smem, k_smem, strict=True):
                plgpu.wgmma(s_ref, q_chunk.at[wg], k_chunk.at[step.slot, keys].transpose((1, 0)))
            if streamed:
                chunks = [smem.at[wg, c] for smem in rel_smem for c in range(smem.shape[1])]
                for c, rel in enumerate(chunks):
                    onehot = onehot_smem.at[step.slot, c, keys].transpose((1, 0))
                    plgpu.wgmma(s_ref, rel, onehot)
            return bias if interpret else None

        def issue_values(out_refs, p, out, step):
            keys = pl.ds(0, step.keys)
            plgpu.barrier_wait(v_ready.at[step.slot])
            for i, v_chunk in enumerate(v_smem):
                own_v = v_chunk.at[step.slot, keys]
                # Interpret mode knows no operand in registers and cannot write an accumulator.
                if p_smem is not None:
                    own_p = p_smem.at[wg, :, keys]
                    own_p[...] = p
                    plgpu.wgmma(out_refs[i], own_p, own_v)
                else:
                    out_refs[i][...] = out[i]
                    plgpu.wgmma(out_refs[i], p, own_v)
            if p_smem is not None:
                return [x + ref[...] for x, ref in zip(out, out_refs, strict=True)]
            return None

        def await_values(out_refs, issued, step):
            # The barrier ties the uses to the wait: the compiler sees no dependence between them.
            if issued is None:
                issued = [lax.optimization_barrier(ref[...]) for ref in out_refs]
            plgpu.barrier_arrive(v_free.at[step.slot])
            return issued

        def softmax(s, m, l, step):  # s [64, keys], m [64], l [64, 8]
            plgpu.barrier_arrive(k_free.at[step.slot])
            if step.mask is not None:
                s = s + step.mask
            m_next = jnp.maximum(m, s.max(axis=1) * scale)
            p = jnp.exp2(s * scale - lax.broadcast_in_dim(m_next, s.shape, [0]))
            alpha = jnp.exp2(m - m_next)
            # Every thread sums its own columns: one shuffle at the end, not one a step.
            l = l * lax.broadcast_in_dim(alpha, l.shape, [0])
            for start in range(0, step.keys, 8):
                l = l + p[:, start : start + 8]
            return p, m_next, l, alpha

        def end_turn():
            plgpu.barrier_arrive(turn.at[lax.rem(wg + 1, num_wgs)])

        def first(step, tiles):
            def products(s_ref):
                plgpu.barrier_wait(k_ready.at[step.slot])
                rest = issue_logits(s_ref, step, tiles)
                end_turn()
                return s_ref[...] if rest is None else s_ref[...] + rest

            s = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((BLOCK, step.keys), jnp.float32))
            layout_2d, layout_1d = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
            m = plgpu.layout_cast(jnp.full((BLOCK,), -jnp.inf, jnp.float32), layout_1d)
            l = plgpu.layout_cast(jnp.zeros((BLOCK, 8), jnp.float32), layout_2d)
            out = [
                plgpu.layout_cast(jnp.zeros((BLOCK, chunk), jnp.float32), layout_2d)
                for chunk in split_head_dim(head_dim)
            ]
            p, m, l, _ = softmax(s, m, l, step)
            return p.astype(dtype), m, l, out

        def accumulators(*widths):
            return [plgpu.WGMMAAccumulatorRef((BLOCK, n), jnp.float32) for n in widths]

        def advance(carry, previous, step, tiles):
            """Issue the logits of `step` and the values of `previous`, then `step`'s softmax."""
            p, m, l, out = carry

            def products(s_ref, *out_refs):
                plgpu.barrier_wait(k_ready.at[step.slot])
                rest = issue_logits(s_ref, step, tiles)
                issued = issue_values(out_refs, p, out, previous)
                end_turn()
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(out_refs))
                s = s if rest is None else s + rest
                p_next, m_next, l_next, alpha = softmax(s, m, l, step)
                total = await_values(out_refs, issued, previous)
                total = [x * lax.broadcast_in_dim(alpha, x.shape, [0]) for x in total]
                return p_next.astype(dtype), m_next, l_next, total

            widths = (step.keys, *split_head_dim(head_dim))
            return pl.run_scoped(products, *accumulators(*widths))

        def attend(count):
            batch, head, block, own_tile = query_block(count)
            base = lax.rem(count * num_steps, num_stages)

            def slot_of(step):
                return lax.rem(base + step, num_stages)

            def full_step(i, state):
                carry, slot, tiles = state
                step = _Step(jnp.where(slot == num_stages - 1, 0, slot + 1), block_kv)
                next_tiles = step_tiles(batch, jnp.minimum(i + 1, num_full - 1))
                carry = advance(carry, _Step(slot, block_kv), step, tiles)
                return carry, step.slot, next_tiles

            last_steps = []
            if tail:
                step = _Step(slot_of(num_full), BLOCK)
                last_steps.append((step, step_tiles(batch, num_full)))
            if layout.diagonal:
                in_bar = entry(batch, own_blocks + layout.num_q_blocks + block) == 1
                mask = jnp.where(in_bar, -jnp.inf, 0.0)
                last_steps.append((_Step(slot_of(num_shared + wg), BLOCK, mask), (own_tile,)))
            if num_full:
                carry = first(_Step(base, block_kv), step_tiles(batch, 0))
                state = (carry, base, step_tiles(batch, min(1, num_full - 1)))
                carry, slot, _ = lax.fori_loop(1, num_full, full_step, state)
                previous = _Step(slot, block_kv)
            else:
                (previous, tiles), *last_steps = last_steps
                carry = first(previous, tiles)
            for step, tiles in last_steps:
                carry = advance(carry, previous, step, tiles)
                previous = step

            for w in range(num_wgs if layout.diagonal else 0):

                @pl.when(wg != w)
                def _others_diagonal(w=w):
                    slot = slot_of(num_shared + w)
                    for ready, free in ((k_ready, k_free), (v_ready, v_free)):
                        plgpu.barrier_wait(ready.at[slot])
                        plgpu.barrier_arrive(free.at[slot])

            # All logits are there: the next item's queries come in beside the rest of this one.
            pl.when(count + 1 < num_own_items)(lambda: load_queries(count + 1))

            p, _, l, out = carry

            def last_product(*out_refs):
                return await_values(out_refs, issue_values(out_refs, p, out, previous), previous)

            out = pl.run_scoped(last_product, *accumulators(*split_head_dim(head_dim)))
            inverse = 1.0 / l.sum(axis=1)
            plgpu.wait_smem_to_gmem(0)
            for x, chunk in zip(out, out_smem, strict=True):
                own = x * lax.broadcast_in_dim(inverse, x.shape, [0])
                chunk.at[wg][...] = own.astype(dtype)
            plgpu.commit_smem()
            rows, image = pl.ds(0, BLOCK), first_image + batch
            for chunk, span in zip(out_smem, spans, strict=True):
                for target, source in boxes(out_gmem, image, head, own_tile, span, chunk, wg, rows):
                    plgpu.copy_smem_to_gmem(source, target)

        def sit_out(count):
            """Keep pace with the others through an item that has no query block for this one."""
            base = lax.rem(count * num_steps, num_stages)

            @pl.loop(0, num_steps)
            def _step(i):
                slot = lax.rem(base + i, num_stages)
                for ready, free in ((k_ready, k_free), (v_ready, v_free)):
                    plgpu.barrier_wait(ready.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

                @pl.when(i < num_shared + layout.diagonal)
                def _turn():
                    plgpu.barrier_wait(turn.at[wg])
                    end_turn()

            pl.when(count + 1 < num_own_items)(lambda: load_queries(count + 1))

        load_queries(0)
        pl.when(wg == num_wgs - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

        @pl.loop(0, num_own_items)
        def _item(count):
            plgpu.barrier_wait(q_ready.at[wg])
            if not rest:
                attend(count)
                return
            has_block = place(count)[2] + wg < layout.num_q_blocks
            pl.when(has_block)(lambda: attend(count))
            pl.when(jnp.logical_not(has_block))(lambda: sit_out(count))

        plgpu.wait_smem_to_gmem(0)
        # Every completion of a barrier is seen, also the last.
        pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))

    @pl.when(wg == num_wgs)
    def _load():
        plgpu.set_max_registers(32 if num_wgs == 3 else 40, action="decrease")

        def load(batch, head, step, tiles):
            slot = lax.rem(step, num_stages)

            def wait(free):
                pl.when(step >= num_stages)(lambda: plgpu.barrier_wait(free.at[slot]))

            wait(k_free)
            for part, tile in enumerate(tiles):
                load_block(1, batch, head, tile, k_smem, slot, part, k_ready)
                if streamed:
                    own_index = {1: 0, batch_size: batch}
                    index = own_index.get(operands.onehot.shape[0], batch * num_heads + head)
                    rows = pl.ds(part * BLOCK, BLOCK)
                    keys = pl.ds(tile * BLOCK, BLOCK)
                    for c in range(operands.onehot.shape[1]):
                        source = operands.onehot.at[index, c, keys]
                        target = onehot_smem.at[slot, c, rows]
                        plgpu.copy_gmem_to_smem(source, target, k_ready.at[slot])
            wait(v_free)
            for part, tile in enumerate(tiles):
                load_block(2, batch, head, tile, v_smem, slot, part, v_ready)

        @pl.loop(0, num_own_items)
        def _item(count):
            batch, head, first_block = place(count)
            base = count * num_steps

            @pl.loop(0, num_shared)
            def _shared(i):
                # The tail's second tile repeats its first: every step makes the same arrivals.
                tiles = [entry(batch, i * per_step + part) for part in range(per_step)]
                load(batch, head, base + i, tiles)

            for w in range(num_wgs if layout.diagonal else 0):
                block = jnp.minimum(first_block + w, layout.num_q_blocks - 1)
                tiles = [entry(batch, own_blocks + block)] * per_step
                load(batch, head, base + num_shared + w, tiles)

        @pl.loop(0, jnp.minimum(num_own_items * num_steps, num_stages))
        def _finish(slot):  # every completion of a barrier is seen, also the last
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])


class Statics(NamedTuple):
    """What a launch knows when it is traced.

    Attributes:
        layout: The block layout.
        config: How the kernel runs.
        tiling: Which tokens make a block.
        streamed: Whether the one-hots are those of a sequence.
        num_heads: Heads H.
        num_images: How many images of the batch it attends to.
        batch_size: Images B of the batch.
        interpret: False, or parameters of Mosaic GPU's interpret mode.
    """

    layout: BlockLayout
    config: Config
    tiling: Tiling
    streamed: bool
    num_heads: int
    num_images: int
    batch_size: int
    interpret: Any


# Jitted, so that an encoder traces and lowers the kernel once and not once a layer.
@functools.partial(jax.jit, static_argnums=0)
def launch(
    statics: Statics,
    first: Array | None,
    qkv: Array,
    operands: Operands,
    table: Array,
    out: Array | None = None,
) -> Array:
    """Run the kernel.

    Args:
        statics: What is known when the launch is traced.
        first: The first of its images, int32 [1]; None is the batch's.
        qkv: [B, Gh, Gw, 3 H, D] as `Tiling.view` sees it, 16-bit floats: q of all heads, k, v.
            Sequences: of the launch's images alone, like operands and table always.
        operands: The position bias.
        table: `tiles.step_table`, int32.
        out: What another launch returned, for other images; None where this is the first.

    Returns:
        Attention's output [B, Gh, Gw, H, D], as `Tiling.view` sees it. Other images are as in out,
        in whose place it is if XLA can spare out; without out they are undefined.
    """
    layout, config, tiling, streamed, num_heads, num_images, batch_size, interpret = statics
    qkv, operands = _undifferentiable(qkv, operands)
    num_wgs, num_stages, block_kv = config.num_warpgroups, config.num_stages, config.block_kv
    chunks = split_head_dim(qkv.shape[-1])
    rows, heads = batch_size * tiling.rows, tiling.stride * num_heads
    out_shape = (rows, *qkv.shape[1:3], heads, qkv.shape[-1])
    out_refs = [] if out is None else [jax.new_ref(out)]
    num_items = config.items(layout, num_heads) * num_images
    copies = SIDE if interpret else 1  # that a box takes
    key_arrivals = block_kv // BLOCK * len(chunks) * copies
    scratch: dict[str, Any] = {}
    if streamed:
        chunks_of = [x.shape[-1] // CHUNK for x in (operands.rel_h, operands.rel_w)]
        rel_smem = [buffer(qkv.dtype, num_wgs, c, BLOCK, CHUNK) for c in chunks_of]
        num_chunks = sum(chunks_of)
        scratch["onehot_smem"] = buffer(qkv.dtype, num_stages, num_chunks, block_kv, CHUNK)
        query_bias_arrivals = num_chunks * copies
        key_bias_arrivals = num_chunks * block_kv // BLOCK
    else:
        rel = (operands.rel_h, operands.rel_w)
        rel_smem = [plgpu.SMEM((num_wgs, *x.shape[1:]), x.dtype) for x in rel]
        query_bias_arrivals, key_bias_arrivals = len(rel), 0
    if interpret:
        scratch["p_smem"] = plgpu.SMEM((num_wgs, BLOCK, block_kv), qkv.dtype)
    kernel = plgpu.kernel(
        functools.partial(_kernel, statics=statics),
        out_type=() if out_refs else jax.ShapeDtypeStruct(out_shape, qkv.dtype),
        scratch_types=scratch
        | dict(
            q_smem=[buffer(qkv.dtype, num_wgs, BLOCK, chunk) for chunk in chunks],
            out_smem=[buffer(qkv.dtype, num_wgs, BLOCK, chunk) for chunk in chunks],
            k_smem=[buffer(qkv.dtype, num_stages, block_kv, chunk) for chunk in chunks],
            v_smem=[buffer(qkv.dtype, num_stages, block_kv, chunk) for chunk in chunks],
            rel_smem=rel_smem,
            q_ready=plgpu.Barrier(
                num_barriers=num_wgs, num_arrivals=len(chunks) * copies + query_bias_arrivals
            ),
            k_ready=plgpu.Barrier(
                num_barriers=num_stages, num_arrivals=key_arrivals + key_bias_arrivals
            ),
            v_ready=plgpu.Barrier(num_barriers=num_stages, num_arrivals=key_arrivals),
            k_free=plgpu.Barrier(num_barriers=num_stages, num_arrivals=num_wgs),
            v_free=plgpu.Barrier(num_barriers=num_stages, num_arrivals=num_wgs),
            turn=plgpu.Barrier(num_barriers=num_wgs),
        ),
        grid=(min(config.num_programs, num_items),),
        grid_names=("program",),
        num_threads=num_wgs + 1,
        thread_name="wg",
        kernel_name="stripe_attention",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    created = kernel(first, qkv, operands, table, *out_refs)
    return jax.freeze(out_refs[0]) if out_refs else created


# Around the arguments and not the launch: a reference cannot live in a function with its own rule.
@jax.custom_jvp
def _undifferentiable(qkv: Array, operands: Operands) -> tuple[Array, Operands]:
    return qkv, operands


_undifferentiable.defjvp(no_gradient("stripe_attention"))
