"""Correctness, then speed, of the stripe attention kernel on this machine's GPU.

    python -m benchmarks.stripe_attention [--out results.jsonl] [--only B8 r0.3] [--configs]

Random normal inputs, fresh every run. Each case is first compared, on the last image's first and
last head, with a float32 reference of the same rounded inputs. Times are medians over loops inside
one program, of the kernel alone and of the whole function, which also computes the position bias.
TFLOP/s are the kernel's and count 4 B H D times the (query, key) pairs of the computed
blocks, without the products of the bias.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_table
from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.stripe_attention import attend_by_groups, launch, prepare
from pallas_kernels.stripe_schedule import Config
from pallas_kernels.tuning import tuned
from sparsesam_jax.sparsity.orders import GROUP, curve_order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of the benchmark.

    `order` is tiles (Morton stripes), blocks (those, ranked by image), groups (tokens ranked by
    image) or heads (tokens ranked by image and head).
    """

    batch: int = 8
    side: int = 64
    num_heads: int = 16
    head_dim: int = 64
    density: float = 1.0
    order: str = "tiles"
    dtype: str = "bfloat16"
    bias: float = 1.0

    def __str__(self) -> str:
        sizes = f"B{self.batch} S{self.side} H{self.num_heads} D{self.head_dim} r{self.density}"
        return f"{sizes} {self.order} {self.dtype}"

    @property
    def layout(self) -> BlockLayout:
        """The case's block layout."""
        return BlockLayout.a_shape(self.side**2, self.density)


CASES = [
    Case(),
    Case(density=0.5),
    Case(density=0.3),
    Case(density=0.25),
    Case(head_dim=80),
    Case(head_dim=80, density=0.3),
    Case(batch=1),
    Case(batch=1, density=0.3),
    Case(density=0.3, order="blocks"),
    Case(order="groups"),
    Case(density=0.3, order="groups"),
    Case(dtype="float16"),
    Case(side=128, batch=1),
    Case(side=128, batch=1, density=0.3),
    Case(side=32, batch=8),
]


class Arguments(NamedTuple):
    """Arguments of `stripe_attention`; those that may be None, or static numpy, last."""

    qkv: Any
    rel_pos_h: Any
    rel_pos_w: Any
    sequence: Any
    block_order: Any


def stripes(side: int) -> np.ndarray:
    """Token 0 of every group of the Morton curve, then token 1 of every group, and so on."""
    return curve_order("morton", side, side).reshape(-1, GROUP).T.ravel()


def inputs(case: Case, seed: int) -> Arguments:
    """Random arguments."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (case.batch, case.side, case.side, 3, case.num_heads, case.head_dim)
    qkv = jax.random.normal(keys[0], shape, case.dtype)
    # q . table is then a bias of variance `bias`^2.
    scale = case.bias * case.head_dim**-0.5
    shape = (2, case.side, case.side, case.head_dim)
    by_row, by_col = (jax.random.normal(keys[1], shape) * scale).astype(case.dtype)
    sequence = stripes(case.side)
    blocks = None
    if case.order == "blocks":
        blocks = _ranks((case.batch,), case.layout.num_kv_blocks, keys[2])
    elif case.order != "tiles":
        lead = (case.batch, case.num_heads)[: 2 if case.order == "heads" else 1]
        sequence = jnp.asarray(sequence)[_ranks(lead, len(sequence), keys[3])]
    return Arguments(qkv, by_row, by_col, sequence, blocks)


def _ranks(lead: tuple[int, ...], size: int, key: jax.Array) -> jax.Array:
    return jnp.argsort(jax.random.uniform(key, (*lead, size)), axis=-1).astype(jnp.int32)


def masked_attention(case: Case, arguments: Arguments, image: int, heads: list[int]) -> jax.Array:
    """Some heads of an image's attention [Gh, Gw, heads, D] from all N x N logits, in float32."""
    qkv, rel_pos_h, rel_pos_w, sequence, block_order = arguments
    if sequence.ndim > 1:
        sequence = sequence[image]
    if sequence.ndim > 1:
        sequence = sequence[np.array(heads)]
    sequence = jnp.broadcast_to(sequence, (len(heads), case.layout.seq_len))
    blocks = np.arange(case.layout.num_kv_blocks)
    blocks = blocks if block_order is None else block_order[image]
    qkv = qkv[image][:, :, :, np.array(heads)]
    return _masked_attention(qkv, rel_pos_h, rel_pos_w, sequence, blocks, case.layout)


@functools.partial(jax.jit, static_argnames="layout")
def _masked_attention(qkv, rel_pos_h, rel_pos_w, sequence, block_order, layout: BlockLayout):
    block = jnp.argsort(sequence, axis=-1) // layout.block_kv  # of every token of the raster
    in_bar = jnp.argsort(block_order)[block] < layout.num_bar_blocks
    mask = in_bar[:, None] | (layout.diagonal & (block[:, :, None] == block[:, None]))
    q, k, v = (qkv[:, :, i].astype(jnp.float32) for i in range(3))
    tables = (x.astype(jnp.float32) for x in (rel_pos_h, rel_pos_w))
    rel_h, rel_w = reference.relative_position(q[None], *tables)
    bias = (rel_h[0, ..., :, None] + rel_w[0, ..., None, :]).swapaxes(1, 2).swapaxes(0, 1)
    q, k, v = (x.reshape(layout.seq_len, *x.shape[2:]).swapaxes(0, 1) for x in (q, k, v))
    einsum = functools.partial(jnp.einsum, precision="highest")
    logits = einsum("hqd,hkd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, logits + bias.reshape(logits.shape), -jnp.inf))
    return einsum("hqk,hkd->qhd", weights, v).reshape(qkv[:, :, 0].shape)


def relative_error(case: Case, out: jax.Array, arguments: Arguments) -> float:
    """Frobenius error of the last image's first and last head against float32."""
    heads = sorted({0, case.num_heads - 1})
    want = masked_attention(case, arguments, case.batch - 1, heads)
    return gpu_table.frobenius_error(out[-1][:, :, np.array(heads)], want)


def plan(case: Case, config: Config | None) -> gpu_table.Programs:
    """The whole function and its kernel on fresh inputs."""
    arguments = inputs(case, seed=time.time_ns() % 2**31)
    sequence, statics = arguments.sequence, None
    is_static = isinstance(sequence, np.ndarray)

    def bound(arrays: Arguments) -> Arguments:
        return arrays._replace(sequence=sequence) if is_static else arrays

    def whole(arrays: Arguments) -> jax.Array:
        *positional, block_order = bound(arrays)
        options: dict[str, Any] = dict(block_order=block_order, config=config)
        return attend_by_groups(*positional, layout=case.layout, **options)

    def prepare_arrays(arrays: Arguments) -> tuple[Any, ...]:
        nonlocal statics
        *positional, block_order = bound(arrays)
        options: dict[str, Any] = dict(block_order=block_order, config=config)
        statics, operands = prepare(*positional, layout=case.layout, **options)
        return operands

    pairs = float(case.layout.block_mask.sum()) * case.layout.block_q * case.layout.block_kv
    return gpu_table.Programs(
        whole=whole,
        prepare=prepare_arrays,
        kernel=lambda operands: launch(statics, *operands),
        arrays=arguments._replace(sequence=None) if is_static else arguments,
        error=lambda out: relative_error(case, out, arguments),
        flops=4 * case.batch * case.num_heads * case.head_dim * pairs,
    )


if __name__ == "__main__":
    configs = tuned().tiles + tuned().sequences
    gpu_table.main("Stripe attention: the kernel and the whole function", plan, CASES, configs)
