"""Cases of window attention, and their error against the reference in float32."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from stripe_cases import frobenius_error

from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; `order` is static, window or head (per window and head)."""

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
    return frobenius_error(out[-1:, :, :, heads], want)
