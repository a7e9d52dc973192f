"""Correctness, then speed, of the window attention kernel on this machine's GPU.

    python -m benchmarks.window_attention [--out results.jsonl] [--only B8 head] [--configs]

Random normal inputs, fresh every run. Each case is first compared, on the last image's first and
last head, with a float32 reference of the same rounded inputs. Times are medians over loops inside
one program, of the kernel alone and of the whole function, which also computes the position bias.
TFLOP/s are the kernel's and count 4 D times the (query, key) pairs of real queries and all keys of
their window or bar, without the products of the bias.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_table
from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.tuning import tuned
from pallas_kernels.window_attention import launch, prepare
from pallas_kernels.window_kernel import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of the benchmark; `order` is static, window or head (per window and head)."""

    batch: int = 8
    side: int = 64
    num_heads: int = 16
    head_dim: int = 64
    window_size: int = 14
    density: float = 1.0
    order: str = "static"
    dtype: str = "bfloat16"
    bias: float = 1.0

    def __str__(self) -> str:
        sizes = f"B{self.batch} S{self.side} H{self.num_heads} D{self.head_dim} w{self.window_size}"
        return f"{sizes} r{self.density} {self.order} {self.dtype}"

    @property
    def layout(self) -> BlockLayout:
        """The case's block layout."""
        return BlockLayout.bar(self.window_size**2, self.density)

    @property
    def windows(self) -> int:
        """Windows of an image."""
        return (-(-self.side // self.window_size)) ** 2


CASES = [
    Case(),
    Case(dtype="float16"),
    Case(head_dim=80),
    Case(density=0.3),
    Case(density=0.3, order="head"),
    Case(batch=1),
    Case(batch=1, density=0.3),
    Case(batch=1, side=128),
]


class Arguments(NamedTuple):
    """Arguments of `window_attention`; `order` is static where it is numpy."""

    qkv: Any
    rel_pos_h: Any
    rel_pos_w: Any
    order: Any


def static_order(window_size: int) -> np.ndarray:
    """An order of a window's tokens, the same for every window and call."""
    return np.random.default_rng(0).permutation(window_size**2).astype(np.int32)


def inputs(case: Case, seed: int) -> Arguments:
    """Random arguments."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (case.batch, case.side, case.side, 3, case.num_heads, case.head_dim)
    qkv = jax.random.normal(keys[0], shape, case.dtype)
    # q . table is then a bias of variance `bias`^2.
    scale = case.bias * case.head_dim**-0.5
    shape = (2, case.side, case.window_size, case.head_dim)
    by_row, by_col = (jax.random.normal(keys[1], shape) * scale).astype(case.dtype)
    if case.order == "static":
        return Arguments(qkv, by_row, by_col, static_order(case.window_size))
    lead = (case.batch, case.windows, case.num_heads)[: 3 if case.order == "head" else 2]
    draws = jax.random.uniform(keys[2], (*lead, case.window_size**2))
    return Arguments(qkv, by_row, by_col, jnp.argsort(draws, axis=-1).astype(jnp.int32))


def relative_error(case: Case, out: jax.Array, arguments: Arguments) -> float:
    """Frobenius error of the last image's first and last head against float32."""
    heads = np.array(sorted({0, case.num_heads - 1}))
    qkv, *tables = (x.astype(jnp.float32) for x in arguments[:3])
    order = arguments.order if case.order == "static" else arguments.order[-1:]
    order = order[:, :, heads] if case.order == "head" else order
    options: dict[str, Any] = dict(window_size=case.window_size, layout=case.layout, order=order)

    @jax.jit
    def attend(qkv: jax.Array, *tables: jax.Array) -> jax.Array:
        q, k, v = (qkv[:, :, :, i] for i in range(3))
        rel = reference.relative_position(q, *tables)
        return reference.window_attention(q, k, v, *rel, **options)

    want = attend(qkv[-1:, :, :, :, heads], *tables)
    return gpu_table.frobenius_error(out[-1:, :, :, heads], want)


def plan(case: Case, config: Config | None) -> gpu_table.Programs:
    """The whole function and its kernel on fresh inputs."""
    arguments = inputs(case, seed=time.time_ns() % 2**31)
    is_static, statics = case.order == "static", None
    options: dict[str, Any] = dict(window_size=case.window_size, layout=case.layout, config=config)

    def prepare_arrays(arrays: Arguments) -> tuple[Any, ...]:
        nonlocal statics
        order = arguments.order if is_static else arrays.order
        statics, operands = prepare(*arrays[:3], order=order, **options)
        return operands

    def kernel(operands: tuple[Any, ...]) -> jax.Array:
        return launch(statics, *operands)

    pairs = case.batch * case.num_heads * case.side**2 * case.layout.bar_len
    return gpu_table.Programs(
        whole=lambda arrays: kernel(prepare_arrays(arrays)),
        prepare=prepare_arrays,
        kernel=kernel,
        arrays=arguments._replace(order=None) if is_static else arguments,
        error=lambda out: relative_error(case, out, arguments),
        flops=4.0 * case.head_dim * pairs,
    )


if __name__ == "__main__":
    # Turns have no effect where an operand has one stage.
    configs = (*tuned().windows, Config(take_turns=False))
    gpu_table.main("Window attention: the kernel and the whole function", plan, CASES, configs)
