"""The stripe attention kernel: flash attention over a block layout, position bias fused.

    logits[q, k] = q . k / sqrt(D) + rel_h[q, row(k)] + rel_w[q, col(k)]
    out[q] = softmax over the layout's keys (logits[q, :]) @ v

The bias is a low-rank product. Cut `rel_h` and `rel_w` into chunks of 16 coordinates: for keys
whose rows lie in one chunk and whose columns lie in another (a spatial tile)

    bias = rel_h[:, chunk] @ onehot(rows) + rel_w[:, chunk] @ onehot(cols),

two K = 16 tensor-core products that accumulate onto q @ k^T. Keys that touch more chunks take more
products, up to all of them where coordinates are only known at run time (ranked groups).

An item of work is `num_warpgroups` query blocks of 64 of one head, each in its own warpgroup, over
the same keys; one more warpgroup streams keys, values and one-hots in through TMA. Programs are
persistent: the next item's queries and keys come in while an item ends. A warpgroup issues the
logits of the next step together with the product of values of this one. Diagonal blocks are steps
of their own, read by one warpgroup each. Design after FlashAttention-3 (Shah et al., arXiv
2407.08608) and jax's `attention_mgpu`.
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
from pallas_kernels.key_side import BLOCK, CHUNK

# Shared memory that one program may have on Hopper, less what its barriers take.
SMEM_BYTES = 232448 - 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the kernel.

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

    def fits(self, head_dim: int, num_query_chunks: int, num_key_chunks: int) -> bool:
        """Whether a warpgroup has the registers and a program the shared memory it takes."""
        # 160 registers a thread: ptxas spills past these and then serialises wgmma (C7512).
        few_registers = self.num_warpgroups == 3 and self.block_kv == 128
        if few_registers and (head_dim > 64 or num_key_chunks > 2):
            return False
        query = BLOCK * (2 * head_dim + num_query_chunks * CHUNK)
        stage = self.block_kv * (2 * head_dim + num_key_chunks * CHUNK)
        return 2 * (self.num_warpgroups * query + self.num_stages * stage) <= SMEM_BYTES


# The first that fits is taken: in the order of their speed, measured on an NVIDIA H200 at B8 N4096
# H16 D64 bfloat16, density 0.3, before programs became persistent. TFLOP/s on computed blocks:
CONFIGS = (
    Config(num_warpgroups=3, block_kv=128, num_stages=3),  # 303 static tiles
    Config(num_warpgroups=3, block_kv=64, num_stages=4),  # 292 static tiles, 254 ranked groups
    Config(num_warpgroups=2, block_kv=128, num_stages=2),  # 274, 228
    Config(num_warpgroups=2, block_kv=64, num_stages=2),  # 257, 211
)


class _Step(NamedTuple):
    """A step of keys: place in the pipeline, place in the table, keys, what to add to logits."""

    index: Any
    table: Any
    row: Any
    keys: int
    mask: Any = None  # of a diagonal step only


def _kernel(
    q_gmem, k_gmem, v_gmem, rel_gmem, onehot_gmem, table_gmem, out_gmem,
    q_smem, out_smem, rel_smem, k_smem, v_smem, onehot_smem,
    q_ready, k_ready, v_ready, k_free, v_free, p_smem=None,
    *, layout: BlockLayout, config: Config, scale: float, q_factor: float, num_blocks: int,
    num_programs: int, streamed: bool,
):  # fmt: skip
    _, _, num_heads, head_dim = q_gmem.shape
    dtype = q_gmem.dtype
    num_wgs, num_stages, block_kv = config.num_warpgroups, config.num_stages, config.block_kv
    num_chunks = onehot_smem.shape[1]
    whole_onehots = num_blocks == 1 and not streamed
    num_full, tail = divmod(layout.num_bar_blocks, block_kv // BLOCK)
    num_shared = num_full + bool(tail)
    num_steps = num_shared + (num_wgs if layout.diagonal else 0)  # of one item
    program, wg = lax.axis_index("program"), lax.axis_index("wg")

    # An item is `num_wgs` query blocks of one head. Those of a head with fewer query blocks left
    # come last: they fill the end of the launch.
    num_heads_all = q_gmem.shape[0] * num_heads
    per_head, rest = divmod(layout.num_q_blocks, num_wgs)
    num_items = num_heads_all * (per_head + bool(rest))
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

    @pl.when(wg < num_wgs)
    def _compute():
        plgpu.set_max_registers(160 if num_wgs == 3 else 232, action="increase")
        own_q, own_out = q_smem.at[wg], out_smem.at[wg]
        num_parts = len(rel_gmem) // 2  # 2: the bias as high + low

        def load_queries(count):
            batch, head, first_block = place(count)
            block = jnp.minimum(first_block + wg, layout.num_q_blocks - 1)
            rows = pl.ds(block * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(q_gmem.at[batch, rows, head], own_q, q_ready.at[wg])
            chunk = 0
            for rel in rel_gmem:
                for start in range(0, rel.shape[-1], CHUNK):
                    source = rel.at[batch, rows, head, pl.ds(start, CHUNK)]
                    plgpu.copy_gmem_to_smem(source, rel_smem.at[wg, chunk], q_ready.at[wg])
                    chunk += 1

        def release(free, step):
            plgpu.barrier_arrive(free.at[lax.rem(step.index, num_stages)])

        def issue_logits(s_ref, step):
            slot = lax.rem(step.index, num_stages)
            keys = pl.ds(0, step.keys)
            chunks = range(num_chunks)
            if not streamed:
                chunks = [table_gmem[step.table, step.row, num_blocks + 1 + c] for c in chunks]
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.wgmma(s_ref, own_q, k_smem.at[slot, keys].transpose((1, 0)))
            for c, chunk in enumerate(chunks):
                onehot = onehot_smem.at[slot, c, keys].transpose((1, 0))
                for part in range(num_parts):
                    offset = part * (rel_smem.shape[1] // num_parts)
                    plgpu.wgmma(s_ref, rel_smem.at[wg, offset + chunk], onehot)

        def issue_values(out_ref, p, out, step):
            slot = lax.rem(step.index, num_stages)
            own_v = v_smem.at[slot, pl.ds(0, step.keys)]
            plgpu.barrier_wait(v_ready.at[slot])
            # Interpret mode knows no operand in registers and cannot write an accumulator.
            if p_smem is not None:
                own_p = p_smem.at[wg, :, pl.ds(0, step.keys)]
                own_p[...] = p
                plgpu.wgmma(out_ref, own_p, own_v)
                return out + out_ref[...]
            out_ref[...] = out
            plgpu.wgmma(out_ref, p, own_v)
            return None

        def await_values(out_ref, issued, step):
            # The barrier ties the uses to the wait: the compiler sees no dependence between them.
            out = lax.optimization_barrier(out_ref[...]) if issued is None else issued
            release(v_free, step)
            return out

        def softmax(s, m, l, step):  # s [64, keys], m [64], l [64, 8]
            release(k_free, step)
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

        def first(step):
            def products(s_ref):
                issue_logits(s_ref, step)
                return s_ref[...]

            s = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((BLOCK, step.keys), jnp.float32))
            layout_2d, layout_1d = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
            m = plgpu.layout_cast(jnp.full((BLOCK,), -jnp.inf, jnp.float32), layout_1d)
            l = plgpu.layout_cast(jnp.zeros((BLOCK, 8), jnp.float32), layout_2d)
            out = plgpu.layout_cast(jnp.zeros((BLOCK, head_dim), jnp.float32), layout_2d)
            p, m, l, _ = softmax(s, m, l, step)
            return p.astype(dtype), m, l, out

        def advance(carry, previous, step):
            """Issue the logits of `step` and the values of `previous`, then `step`'s softmax."""
            p, m, l, out = carry

            def products(s_ref, out_ref):
                issue_logits(s_ref, step)
                issued = issue_values(out_ref, p, out, previous)
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                p_next, m_next, l_next, alpha = softmax(s, m, l, step)
                total = await_values(out_ref, issued, previous)
                total = total * lax.broadcast_in_dim(alpha, out.shape, [0])
                return p_next.astype(dtype), m_next, l_next, total

            accumulators = [
                plgpu.WGMMAAccumulatorRef((BLOCK, n), jnp.float32) for n in (step.keys, head_dim)
            ]
            return pl.run_scoped(products, *accumulators)

        def attend(count):
            batch, head, first_block = place(count)
            table = batch if table_gmem.shape[0] > 1 else 0
            block = jnp.minimum(first_block + wg, layout.num_q_blocks - 1)
            base = count * num_steps

            def full_step(i):
                return _Step(base + i, table, i, block_kv)

            last_steps = [_Step(base + num_full, table, num_full, BLOCK)] if tail else []
            if layout.diagonal:
                row = num_shared + block
                in_bar = table_gmem[table, row, num_blocks] == 1
                mask = jnp.where(in_bar, -jnp.inf, 0.0)
                last_steps.append(_Step(base + num_shared + wg, table, row, BLOCK, mask))
            if num_full:
                carry = lax.fori_loop(
                    1,
                    num_full,
                    lambda i, carry: advance(carry, full_step(i - 1), full_step(i)),
                    first(full_step(0)),
                )
                previous = full_step(num_full - 1)
            else:
                previous, *last_steps = last_steps
                carry = first(previous)
            for step in last_steps:
                carry = advance(carry, previous, step)
                previous = step

            for w in range(num_wgs if layout.diagonal else 0):

                @pl.when(wg != w)
                def _others_diagonal(w=w):
                    slot = lax.rem(base + num_shared + w, num_stages)
                    for ready, free in ((k_ready, k_free), (v_ready, v_free)):
                        plgpu.barrier_wait(ready.at[slot])
                        plgpu.barrier_arrive(free.at[slot])

            # All logits are there: the next item's queries come in beside the rest of this one.
            @pl.when(count + 1 < num_own_items)
            def _next():
                load_queries(count + 1)

            p, _, l, out = carry

            def last_product(out_ref):
                return await_values(out_ref, issue_values(out_ref, p, out, previous), previous)

            out = pl.run_scoped(
                last_product, plgpu.WGMMAAccumulatorRef((BLOCK, head_dim), jnp.float32)
            )
            out = out * lax.broadcast_in_dim(1.0 / l.sum(axis=1), out.shape, [0])
            plgpu.wait_smem_to_gmem(0)
            own_out[...] = out.astype(dtype)
            plgpu.commit_smem()

            @pl.when(first_block + wg < layout.num_q_blocks)
            def _store():
                rows = pl.ds(block * BLOCK, BLOCK)
                plgpu.copy_smem_to_gmem(own_out, out_gmem.at[batch, rows, head])

        load_queries(0)

        @pl.loop(0, num_own_items)
        def _item(count):
            plgpu.barrier_wait(q_ready.at[wg])
            if q_factor != 1:
                scaled = plgpu.load(own_q, (), layout=plgpu.Layout.WGMMA, optimized=False)
                own_q[...] = (scaled.astype(jnp.float32) * q_factor).astype(dtype)
                plgpu.commit_smem()
            attend(count)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == num_wgs)
    def _load():
        plgpu.set_max_registers(32 if num_wgs == 3 else 40, action="decrease")

        def load(batch, head, step, row, keys):
            slot = lax.rem(step, num_stages)
            table = batch if table_gmem.shape[0] > 1 else 0
            own_onehots = {1: 0, q_gmem.shape[0]: batch}
            onehot_index = own_onehots.get(onehot_gmem.shape[0], batch * num_heads + head)
            # A ranked step of 64 keys loads its second block too: all make the same arrivals.
            size = keys if num_blocks == 1 else BLOCK
            parts = []
            for part in range(num_blocks):
                block = table_gmem[table, row, part]
                parts.append((part, pl.ds(block * BLOCK, size), pl.ds(part * BLOCK, size)))

            @pl.when(step >= num_stages)
            def _k_free():
                plgpu.barrier_wait(k_free.at[slot])

            for part, source, keys in parts:
                own_k = k_gmem.at[batch, source, head]
                plgpu.copy_gmem_to_smem(own_k, k_smem.at[slot, keys], k_ready.at[slot])
                if streamed:
                    own_onehot = onehot_gmem.at[onehot_index]
                else:
                    column = num_blocks + 1 + num_chunks + part
                    own_onehot = onehot_gmem.at[table_gmem[table, row, column]]
                if whole_onehots:
                    plgpu.copy_gmem_to_smem(own_onehot, onehot_smem.at[slot], k_ready.at[slot])
                    continue
                for c in range(num_chunks):  # apart, since a copy must fill contiguous memory
                    own_chunk = own_onehot.at[c, source] if streamed else own_onehot.at[c]
                    own_smem = onehot_smem.at[slot, c, keys]
                    plgpu.copy_gmem_to_smem(own_chunk, own_smem, k_ready.at[slot])

            @pl.when(step >= num_stages)
            def _v_free():
                plgpu.barrier_wait(v_free.at[slot])

            for _, source, keys in parts:
                own_v = v_gmem.at[batch, source, head]
                plgpu.copy_gmem_to_smem(own_v, v_smem.at[slot, keys], v_ready.at[slot])

        @pl.loop(0, num_own_items)  # pyright: ignore[reportCallIssue]
        def _item(count):
            batch, head, first_block = place(count)
            base = count * num_steps
            pl.loop(0, num_full)(lambda i: load(batch, head, base + i, i, block_kv))
            if tail:
                load(batch, head, base + num_full, num_full, BLOCK)
            for w in range(num_wgs if layout.diagonal else 0):
                row = num_shared + jnp.minimum(first_block + w, layout.num_q_blocks - 1)
                load(batch, head, base + num_shared + w, row, BLOCK)

        @pl.loop(0, jnp.minimum(num_own_items * num_steps, num_stages))
        def _finish(slot):  # every completion of a barrier is seen, also the last
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])


class Statics(NamedTuple):
    """What a launch knows when it is traced.

    Attributes:
        layout: The block layout.
        config: The tiling.
        num_blocks: Copies a step, as `key_side.KeySide` says.
        streamed: Whether the one-hots cover all keys, likewise.
        bias_factor: What the one-hots hold in place of one, a power of two near sqrt(head_dim):
            q . k then takes little or no scaling to meet the bias.
        interpret: False, or parameters of Mosaic GPU's interpret mode.
    """

    layout: BlockLayout
    config: Config
    num_blocks: int
    streamed: bool
    bias_factor: float
    interpret: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def launch(
    statics: Statics,
    q: Array,
    k: Array,
    v: Array,
    rel: tuple[Array, ...],
    onehot: Array,
    table: Array,
) -> Array:
    """Run the kernel.

    Args:
        statics: What is known when the launch is traced.
        q: Queries [B, N, H, D], 16-bit floats, as are k, v, rel and onehot.
        k: Keys [B, N, H, D].
        v: Values [B, N, H, D].
        rel: The query side of the bias, rows and columns [B, N, H, multiple of 16]; then, if the
            bias has a second 16-bit part, that part's rows and columns.
        onehot: `KeySide.onehot` times `bias_factor`.
        table: `KeySide.table`.

    Returns:
        Attention's output [B, N, H, D].
    """
    layout, config, num_blocks, streamed, bias_factor, interpret = statics
    batch, _, num_heads, head_dim = q.shape
    num_wgs, num_stages, block_kv = config.num_warpgroups, config.num_stages, config.block_kv

    def buffer(*shape: int) -> Any:
        swizzle = next(s for s in (128, 64, 32) if shape[-1] * 2 % s == 0)
        tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
        transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, q.dtype, transforms=transforms)

    scratch = {"p_smem": plgpu.SMEM((num_wgs, BLOCK, block_kv), q.dtype)} if interpret else {}
    num_query_chunks = sum(x.shape[-1] for x in rel) // CHUNK
    num_onehot_copies = 1 if num_blocks == 1 and not streamed else onehot.shape[1]
    num_items = -(-layout.num_q_blocks // num_wgs) * num_heads * batch
    num_programs = min(config.num_programs, num_items)
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            layout=layout,
            config=config,
            scale=math.log2(math.e) / bias_factor,
            q_factor=bias_factor / math.sqrt(head_dim),
            num_blocks=num_blocks,
            num_programs=num_programs,
            streamed=streamed,
        ),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=scratch
        | dict(
            q_smem=buffer(num_wgs, BLOCK, head_dim),
            out_smem=buffer(num_wgs, BLOCK, head_dim),
            rel_smem=buffer(num_wgs, num_query_chunks, BLOCK, CHUNK),
            k_smem=buffer(num_stages, block_kv, head_dim),
            v_smem=buffer(num_stages, block_kv, head_dim),
            onehot_smem=buffer(num_stages, onehot.shape[1], block_kv, CHUNK),
            q_ready=plgpu.Barrier(num_barriers=num_wgs, num_arrivals=1 + num_query_chunks),
            k_ready=plgpu.Barrier(
                num_barriers=num_stages, num_arrivals=num_blocks * (1 + num_onehot_copies)
            ),
            v_ready=plgpu.Barrier(num_barriers=num_stages, num_arrivals=num_blocks),
            k_free=plgpu.Barrier(num_barriers=num_stages, num_arrivals=num_wgs),
            v_free=plgpu.Barrier(num_barriers=num_stages, num_arrivals=num_wgs),
        ),
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=num_wgs + 1,
        thread_name="wg",
        kernel_name="stripe_attention",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    return kernel(q, k, v, rel, onehot, table)


@launch.defjvp
def _no_gradient(*_: Any) -> Any:
    raise NotImplementedError(
        'stripe_attention with implementation="mosaic_gpu" has no gradient; '
        'use implementation="xla", which is differentiable'
    )
