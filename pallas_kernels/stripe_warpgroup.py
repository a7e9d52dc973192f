"""The warpgroups of the stripe attention kernel that compute: products, softmax, turns."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.stripe_memory import Memory
from pallas_kernels.stripe_schedule import Schedule
from pallas_kernels.stripe_softmax import PARTIAL, Softmax
from pallas_kernels.tiles import BLOCK, CHUNK, SIDE, div_rem


class _Step(NamedTuple):
    """A step of keys: its stage, how many they are, and what to add to the logits."""

    slot: Any
    keys: int
    mask: Any = None  # of a diagonal step only


class _State(NamedTuple):
    """What a warpgroup carries from a step to the next, in registers.

    Attributes:
        weights: Of the last step's keys, whose values are not summed yet, [64, keys], qkv's dtype.
        softmax: The running softmax, those keys included.
        out: Sums of weights and values of the keys before, [64, part] for every part of head_dim.
    """

    weights: Any
    softmax: Softmax
    out: list[Any]


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """A warpgroup that computes, one query block of every item."""

    memory: Memory
    schedule: Schedule
    program: Any
    num_own_items: Any  # of the program
    number: Any

    def query_block(self, count: Any) -> tuple[Any, Any, Any, Any]:
        """Image, head, block and tile of an item's queries."""
        place = self.schedule.place(self.program, count)
        block = self.schedule.block(place, self.number)
        tile = self.memory.entry(place.image, self.schedule.own_column(block))
        return place.image, place.head, block, tile

    def load_queries(self, count: Any) -> None:
        """Ask for an item's queries and their bias."""
        memory = self.memory
        image, head, _, tile = self.query_block(count)
        memory.load_block(0, image, head, tile, memory.q_smem, self.number, 0, memory.q_ready)
        memory.load_query_bias(image, head, tile, self.number)

    def step_tiles(self, image: Any, i: Any) -> tuple[Any, ...]:
        """A step's tiles: asked for a step ahead, since a load from global memory is slow."""
        parts = range(self.schedule.tiles_per_step)
        return tuple(self.memory.entry(image, self.schedule.bar_column(i, part)) for part in parts)

    def tile_bias(self, tile: Any) -> list[Any]:
        """The bias of a tile's keys, [64, 8] for every row of the tile."""
        by_row_smem, by_col_smem = self.memory.rel_smem
        row, col = self.memory.statics.tiling.coordinates(tile)
        chunk, half = div_rem(col, CHUNK // SIDE)
        # pyright reads jax 0.10, where an index had to be given.
        by_col = by_col_smem.at[self.number, chunk, :, pl.ds(half * SIDE, SIDE)]
        by_col = plgpu.load(by_col, layout=plgpu.Layout.WGMMA, optimized=False)  # pyright: ignore
        by_col = by_col.astype(jnp.float32)
        bias = []
        for r in range(SIDE):
            by_row = by_row_smem.at[self.number, row * SIDE + r]
            layout_1d = plgpu.Layout.WGMMA.reduce(1)
            by_row = plgpu.load(by_row, layout=layout_1d, optimized=False)  # pyright: ignore
            bias.append(by_col + lax.broadcast_in_dim(by_row, by_col.shape, [0]))
        return bias

    def issue_logits(self, s_ref: Any, step: _Step, tiles: tuple[Any, ...]) -> Any:
        """Issue q @ k^T + bias; what is left to add to it is returned."""
        memory, wg, keys = self.memory, self.number, pl.ds(0, step.keys)
        onehot_smem, interpret = memory.onehot_smem, memory.statics.interpret
        bias = None
        if memory.rel_smem and onehot_smem is None:
            parts = [x for tile in tiles[: step.keys // BLOCK] for x in self.tile_bias(tile)]
            bias = jnp.concatenate(parts, axis=1)
            if not interpret:  # which cannot write an accumulator
                s_ref[...] = bias
        plgpu.barrier_wait(memory.turn.at[wg])
        for q_part, k_part in zip(memory.q_smem, memory.k_smem, strict=True):
            plgpu.wgmma(s_ref, q_part.at[wg], k_part.at[step.slot, keys].transpose((1, 0)))
        if onehot_smem is not None:
            chunks = [smem.at[wg, c] for smem in memory.rel_smem for c in range(smem.shape[1])]
            for c, rel in enumerate(chunks):
                onehot = onehot_smem.at[step.slot, c, keys].transpose((1, 0))
                plgpu.wgmma(s_ref, rel, onehot)
        return bias if interpret else None

    def issue_values(self, out_refs: Any, state: _State, step: _Step) -> list[Any] | None:
        """Issue the product of a step's weights and values; interpreted, return it added up."""
        memory, keys = self.memory, pl.ds(0, step.keys)
        plgpu.barrier_wait(memory.v_ready.at[step.slot])
        for i, v_part in enumerate(memory.v_smem):
            own_v = v_part.at[step.slot, keys]
            # Interpret mode knows no operand in registers and cannot write an accumulator.
            if memory.p_smem is not None:
                own_p = memory.p_smem.at[self.number, :, keys]
                own_p[...] = state.weights
                plgpu.wgmma(out_refs[i], own_p, own_v)
            else:
                out_refs[i][...] = state.out[i]
                plgpu.wgmma(out_refs[i], state.weights, own_v)
        if memory.p_smem is not None:
            return [x + ref[...] for x, ref in zip(state.out, out_refs, strict=True)]
        return None

    def await_values(self, out_refs: Any, issued: list[Any] | None, step: _Step) -> list[Any]:
        """The sums that `issue_values` is at."""
        # The barrier ties the uses to the wait: the compiler sees no dependence between them.
        if issued is None:
            issued = [lax.optimization_barrier(ref[...]) for ref in out_refs]
        plgpu.barrier_arrive(self.memory.v_free.at[step.slot])
        return issued

    def update(self, softmax: Softmax, logits: Any, step: _Step) -> tuple[Softmax, Any, Any]:
        """The softmax after a step, its weights and what to multiply earlier sums by."""
        plgpu.barrier_arrive(self.memory.k_free.at[step.slot])
        if step.mask is not None:
            logits = logits + step.mask
        return softmax.update(logits, math.log2(math.e) / math.sqrt(self.memory.head_dim))

    def end_turn(self) -> None:
        """Let the next warpgroup issue its products."""
        num_wgs = self.schedule.config.num_warpgroups
        plgpu.barrier_arrive(self.memory.turn.at[lax.rem(self.number + 1, num_wgs)])

    def accumulators(self, *widths: int) -> list[Any]:
        """Registers for products of a query block."""
        return [hopper.accumulator(self.memory.dtype, BLOCK, width) for width in widths]

    def first(self, step: _Step, tiles: tuple[Any, ...]) -> _State:
        """The state after an item's first step."""

        def products(s_ref: Any) -> Any:
            plgpu.barrier_wait(self.memory.k_ready.at[step.slot])
            missing = self.issue_logits(s_ref, step, tiles)
            self.end_turn()
            return s_ref[...] if missing is None else s_ref[...] + missing

        logits = pl.run_scoped(products, *self.accumulators(step.keys))
        layout_2d, layout_1d = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
        softmax = Softmax(
            plgpu.layout_cast(jnp.full((BLOCK,), -jnp.inf, jnp.float32), layout_1d),
            plgpu.layout_cast(jnp.zeros((BLOCK, PARTIAL), jnp.float32), layout_2d),
        )
        out = [
            plgpu.layout_cast(jnp.zeros((BLOCK, part), jnp.float32), layout_2d)
            for part in self.memory.parts
        ]
        softmax, weights, _ = self.update(softmax, logits, step)
        return _State(weights.astype(self.memory.dtype), softmax, out)

    def advance(
        self, state: _State, previous: _Step, step: _Step, tiles: tuple[Any, ...]
    ) -> _State:
        """Issue the logits of `step` and the values of `previous`, then `step`'s softmax."""

        def products(s_ref: Any, *out_refs: Any) -> _State:
            plgpu.barrier_wait(self.memory.k_ready.at[step.slot])
            missing = self.issue_logits(s_ref, step, tiles)
            issued = self.issue_values(out_refs, state, previous)
            self.end_turn()
            logits = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(out_refs))
            logits = logits if missing is None else logits + missing
            softmax, weights, rescale = self.update(state.softmax, logits, step)
            out = self.await_values(out_refs, issued, previous)
            out = [x * lax.broadcast_in_dim(rescale, x.shape, [0]) for x in out]
            return _State(weights.astype(self.memory.dtype), softmax, out)

        return pl.run_scoped(products, *self.accumulators(step.keys, *self.memory.parts))

    def attend(self, count: Any) -> None:
        """Compute an item's query block."""
        memory, schedule, config = self.memory, self.schedule, self.schedule.config
        num_full, num_stages = schedule.num_full_steps, config.num_stages
        image, head, block, own_tile = self.query_block(count)
        base = schedule.stage(count * schedule.num_steps)

        def full_step(i: Any, carry: Any) -> Any:
            state, slot, tiles = carry
            step = _Step(jnp.where(slot == num_stages - 1, 0, slot + 1), config.block_kv)
            next_tiles = self.step_tiles(image, jnp.minimum(i + 1, num_full - 1))
            state = self.advance(state, _Step(slot, config.block_kv), step, tiles)
            return state, step.slot, next_tiles

        last_steps = []
        if schedule.has_tail:
            step = _Step(schedule.stage(base + num_full), BLOCK)
            last_steps.append((step, self.step_tiles(image, num_full)))
        if schedule.num_diagonal_steps:
            in_bar = memory.entry(image, schedule.in_bar_column(block)) == 1
            mask = jnp.where(in_bar, -jnp.inf, 0.0)
            slot = schedule.stage(base + (schedule.num_shared_steps + self.number))
            last_steps.append((_Step(slot, BLOCK, mask), (own_tile,)))
        if num_full:
            state = self.first(_Step(base, config.block_kv), self.step_tiles(image, 0))
            carry = (state, base, self.step_tiles(image, min(1, num_full - 1)))
            state, slot, _ = lax.fori_loop(1, num_full, full_step, carry)
            previous = _Step(slot, config.block_kv)
        else:
            (previous, tiles), *last_steps = last_steps
            state = self.first(previous, tiles)
        for step, tiles in last_steps:
            state = self.advance(state, previous, step, tiles)
            previous = step

        for other in range(schedule.num_diagonal_steps):

            @pl.when(self.number != other)
            def _others_diagonal(other=other):
                self.pass_by(schedule.stage(base + (schedule.num_shared_steps + other)))

        # All logits are there: the next item's queries come in beside the rest of this one.
        self.load_next(count)

        def last_product(*out_refs: Any) -> list[Any]:
            issued = self.issue_values(out_refs, state, previous)
            return self.await_values(out_refs, issued, previous)

        out = pl.run_scoped(last_product, *self.accumulators(*memory.parts))
        inverse = state.softmax.inverse_total()
        if memory.inverse_out is not None:
            inverse = inverse * memory.inverse_out
        plgpu.wait_smem_to_gmem(0)
        for x, smem in zip(out, memory.out_smem, strict=True):
            own = x * lax.broadcast_in_dim(inverse, x.shape, [0])
            own = hopper.rounded(own, smem.dtype, interpret=memory.statics.interpret)
            smem.at[self.number][...] = own
        plgpu.commit_smem()
        memory.store_block(image, head, own_tile, self.number)

    def load_next(self, count: Any) -> None:
        """Ask for the queries of the item after this one."""
        more = count + 1 < self.num_own_items
        pl.when(more)(lambda: self.load_queries(count + 1))

    def pass_by(self, slot: Any) -> None:
        """Let a step of others go by."""
        memory = self.memory
        for ready, free in ((memory.k_ready, memory.k_free), (memory.v_ready, memory.v_free)):
            plgpu.barrier_wait(ready.at[slot])
            plgpu.barrier_arrive(free.at[slot])

    def sit_out(self, count: Any) -> None:
        """Keep pace with the others through an item that has no query block for this one."""
        schedule = self.schedule
        base = schedule.stage(count * schedule.num_steps)

        @pl.loop(0, schedule.num_steps)
        def _step(i):
            self.pass_by(schedule.stage(base + i))

            @pl.when(i < schedule.num_shared_steps + schedule.layout.diagonal)
            def _turn():
                plgpu.barrier_wait(self.memory.turn.at[self.number])
                self.end_turn()

        self.load_next(count)

    def run(self) -> None:
        """Compute a query block of each of the program's items."""
        schedule, memory = self.schedule, self.memory
        self.load_queries(0)
        last = schedule.config.num_warpgroups - 1
        pl.when(self.number == last)(lambda: plgpu.barrier_arrive(memory.turn.at[0]))

        @pl.loop(0, self.num_own_items)
        def _item(count):
            plgpu.barrier_wait(memory.q_ready.at[self.number])
            if not schedule.has_rest:
                self.attend(count)
                return
            has_block = schedule.has_block(schedule.place(self.program, count), self.number)
            pl.when(has_block)(lambda: self.attend(count))
            pl.when(jnp.logical_not(has_block))(lambda: self.sit_out(count))

        plgpu.wait_smem_to_gmem(0)
        # Every completion of a barrier is seen, also the last.
        pl.when(self.number == 0)(lambda: plgpu.barrier_wait(memory.turn.at[0]))
