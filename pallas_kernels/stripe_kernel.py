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
same keys; one more warpgroup streams keys and values in (`stripe_schedule`). Programs are
persistent: the next item's queries and keys come in while an item ends. A warpgroup issues the
logits of the next step together with the product of values of this one, and warpgroups take turns
in issuing, so that one multiplies while the others are at their softmax. Diagonal blocks are steps
of their own, read by one warpgroup each. Design after FlashAttention-3 (Shah et al., arXiv
2407.08608) and jax's `attention_mgpu`.

Barriers. Every completion is seen by who waits, also the last, before the program ends:

| barrier | waits | arrives | once |
|---|---|---|---|
| q_ready[warpgroup] | it, before an item | TMA: its queries and their bias | an item |
| k_ready[stage] | every warpgroup, before the logits | TMA: keys and coordinates | a step |
| v_ready[stage] | every warpgroup, before the values | TMA: values | a step |
| k_free[stage] | the loader, before new keys | every warpgroup, after the logits | a step |
| v_free[stage] | the loader, before new values | every warpgroup, after the values | a step |
| turn[warpgroup] | it, before a step's products | the one before it, after its own | a step (1) |

(1) Once for each step that the warpgroup computes. The last one also arrives at the start, for the
first, whose wait for the next turn at the end answers it.

A warpgroup passes by the others' diagonal steps, and by every step of an item that has no query
block for it: it waits for what is ready, and arrives at once at what is free.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import hopper
from pallas_kernels.hopper import REGISTERS
from pallas_kernels.implementation import undifferentiable
from pallas_kernels.stripe_memory import Memory, Operands, Statics, scratch_types
from pallas_kernels.stripe_schedule import Schedule
from pallas_kernels.stripe_warpgroup import Warpgroup


def _load(memory: Memory, schedule: Schedule, program: Any, num_own_items: Any) -> None:
    """Stream the keys and values of the program's items through its stages."""
    num_stages = schedule.config.num_stages

    def load(image: Any, head: Any, step: Any, tiles: list[Any]) -> None:
        slot = schedule.stage(step)

        def wait(free: Any) -> None:
            pl.when(step >= num_stages)(lambda: plgpu.barrier_wait(free.at[slot]))

        wait(memory.k_free)
        for part, tile in enumerate(tiles):
            memory.load_block(1, image, head, tile, memory.k_smem, slot, part, memory.k_ready)
            memory.load_key_bias(image, head, tile, slot, part)
        wait(memory.v_free)
        for part, tile in enumerate(tiles):
            memory.load_block(2, image, head, tile, memory.v_smem, slot, part, memory.v_ready)

    @pl.loop(0, num_own_items)
    def _item(count):
        place = schedule.place(program, count)
        base = count * schedule.num_steps

        @pl.loop(0, schedule.num_shared_steps)
        def _shared(i):
            # The tail's second tile repeats its first: every step makes the same arrivals.
            parts = range(schedule.tiles_per_step)
            tiles = [memory.entry(place.image, schedule.bar_column(i, part)) for part in parts]
            load(place.image, place.head, base + i, tiles)

        for wg in range(schedule.num_diagonal_steps):
            own_column = schedule.own_column(schedule.block(place, wg))
            tiles = [memory.entry(place.image, own_column)] * schedule.tiles_per_step
            load(place.image, place.head, base + schedule.num_shared_steps + wg, tiles)

    @pl.loop(0, jnp.minimum(num_own_items * schedule.num_steps, num_stages))
    def _finish(slot):  # every completion of a barrier is seen, also the last
        plgpu.barrier_wait(memory.k_free.at[slot])
        plgpu.barrier_wait(memory.v_free.at[slot])


def _kernel(first_gmem, qkv_gmem, operands, table_gmem, out_gmem, *, statics: Statics, **scratch):
    first_image = 0 if first_gmem is None else first_gmem[0]
    inverse_out = None if operands.inverse_out is None else operands.inverse_out[0]
    memory = Memory(
        statics=statics,
        first_image=first_image,
        inverse_out=inverse_out,
        qkv_gmem=qkv_gmem,
        operands=operands,
        table_gmem=table_gmem,
        out_gmem=out_gmem,
        **scratch,
    )
    schedule, num_wgs = statics.schedule, statics.config.num_warpgroups
    compute_registers, load_registers = REGISTERS[num_wgs]
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    num_own_items = schedule.num_own_items(program)

    @pl.when(wg < num_wgs)
    def _compute():
        plgpu.set_max_registers(compute_registers, action="increase")
        Warpgroup(memory, schedule, program, num_own_items, wg).run()

    @pl.when(wg == num_wgs)
    def _copy():
        plgpu.set_max_registers(load_registers, action="decrease")
        _load(memory, schedule, program, num_own_items)


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
    """Run the kernel on what `stripe_attention.prepare` gives.

    Args:
        statics: What is known when the launch is traced.
        first: The first of its images, int32 [1]; None is the batch's.
        qkv: [B, Gh, Gw, 3 H, D] as `Tiling.view` sees it, 16-bit floats: q of all heads, k, v.
            Sequences: of the launch's images alone, like operands and table always.
        operands: The position bias, and the scale of a result in 8 bits.
        table: `stripe_schedule.step_table`, int32.
        out: What another launch returned, for other images, or anything where this is the first of
            several; None where this is the only one.

    Returns:
        Attention's output [B, Gh, Gw, H, D], as `Tiling.view` sees it. Other images are as in out,
        in whose place it is if XLA can spare out; without out they are undefined.
    """
    qkv, operands = undifferentiable("stripe_attention", (qkv, operands))
    config, tiling, head_dim = statics.config, statics.tiling, qkv.shape[-1]
    rows, heads = statics.batch_size * tiling.rows, tiling.stride * statics.num_heads
    out_shape = (rows, *qkv.shape[1:3], heads, head_dim)
    out_dtype = operands.out_dtype(qkv.dtype)
    out_refs = [] if out is None else [jax.new_ref(out)]
    kernel = hopper.kernel(
        functools.partial(_kernel, statics=statics),
        name="stripe_attention",
        interpret=statics.interpret,
        out_type=() if out_refs else jax.ShapeDtypeStruct(out_shape, out_dtype),
        scratch_types=scratch_types(
            config, head_dim, qkv.dtype, operands, interpret=statics.interpret
        ),
        grid=(statics.schedule.num_programs,),
        grid_names=("program",),
        num_threads=config.num_warpgroups + 1,
        thread_name="wg",
    )
    created = kernel(first, qkv, operands, table, *out_refs)
    return jax.freeze(out_refs[0]) if out_refs else created
