"""Global attention over a static block layout, with SAM's decomposed position bias.

The public function, which runs as plain XLA (`reference`) or as the Mosaic GPU kernel
(`stripe_kernel`), and what the kernel needs prepared.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.implementation import Implementation, resolve
from pallas_kernels.key_side import BLOCK, CHUNK, key_side
from pallas_kernels.stripe_kernel import CONFIGS, Config, Statics, launch


def _chunks(size: int) -> int:
    return -(-size // CHUNK)


def _labels(
    key_rows: Array | np.ndarray, key_cols: Array | np.ndarray, num_rows: int
) -> Array | np.ndarray:
    """The labels that `key_side` takes: numpy [2, N], or a jax array [2, 1 or B or B H, N]."""
    key_cols = key_cols + _chunks(num_rows) * CHUNK
    if all(isinstance(x, np.ndarray) and x.ndim == 1 for x in (key_rows, key_cols)):
        return np.stack([key_rows, key_cols])
    with_axes = (
        jnp.asarray(x).reshape(*(*x.shape[:-1], 1, 1)[:2], -1) for x in (key_rows, key_cols)
    )
    labels = jnp.stack(jnp.broadcast_arrays(*with_axes))  # [2, 1 or B, 1 or H, N]
    return labels.reshape(2, -1, labels.shape[-1])


def _fitting_config(
    q: Array,
    rel_h: Array,
    rel_w: Array,
    labels: Array | np.ndarray,
    layout: BlockLayout,
    block_order: Array | None,
) -> Config | None:
    """The first tiling that fits in registers and shared memory."""
    num_chunks = _chunks(rel_h.shape[-1]) + _chunks(rel_w.shape[-1])
    num_parts = 2 if jnp.float32 in (rel_h.dtype, rel_w.dtype) else 1
    for config in CONFIGS:
        side = functools.partial(key_side, labels, num_chunks, layout, block_kv=config.block_kv)
        onehot = jax.eval_shape(lambda side=side: side(block_order=block_order).onehot)
        if config.fits(q.shape[-1], num_parts * num_chunks, onehot.shape[1]):
            return config
    return None


def _problems(
    q: Array,
    k: Array,
    v: Array,
    rel_h: Array,
    rel_w: Array,
    key_rows: Array | np.ndarray,
    key_cols: Array | np.ndarray,
    layout: BlockLayout,
    block_order: Array | None,
) -> list[str]:
    """What keeps the kernel from running a call, each as one clause."""
    seq_len, head_dim = q.shape[1], q.shape[3]
    problems = []
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        dtypes = f"{q.dtype}, {k.dtype} and {v.dtype}"
        problems.append(f"q, k and v must be all bfloat16 or all float16, got {dtypes}")
    if head_dim % 16 or not 16 <= head_dim <= 128:
        problems.append(f"head_dim must be a multiple of 16 up to 128, got {head_dim}")
    if seq_len % BLOCK:
        problems.append(f"seq_len must be a multiple of {BLOCK}, got {seq_len}")
    if (layout.block_q, layout.block_kv) != (BLOCK, BLOCK):
        got = f"{layout.block_q} x {layout.block_kv}"
        problems.append(f"layout must have blocks of {BLOCK} x {BLOCK}, got {got}")
    for name, x in (("rel_h", rel_h), ("rel_w", rel_w)):
        if x.dtype not in (q.dtype, jnp.float32):
            problems.append(f"{name} must have the dtype of q or float32, got {x.dtype}")
        if x.shape[-1] > 128:
            problems.append(f"{name} must have at most 128 coordinates, got {x.shape[-1]}")
    if not problems:
        labels = _labels(key_rows, key_cols, rel_h.shape[-1])
        if _fitting_config(q, rel_h, rel_w, labels, layout, block_order) is None:
            problems.append(
                "head_dim and the coordinates of rel_h and rel_w must fit in shared memory, got "
                f"head_dim {head_dim}, {rel_h.shape[-1]} rows and {rel_w.shape[-1]} columns"
            )
    return problems


def stripe_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    rel_h: Float[Array, "B N H Sh"],
    rel_w: Float[Array, "B N H Sw"],
    key_rows: Int[Array | np.ndarray, "*batch N"],
    key_cols: Int[Array | np.ndarray, "*batch N"],
    *,
    layout: BlockLayout,
    block_order: Int[Array, "B num_kv_blocks"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B N H D"]:
    """Attention over a static block layout with SAM's decomposed relative position bias.

    `softmax(q k^T / sqrt(D) + rel_h[:, key_rows] + rel_w[:, key_cols]) v` over the layout's keys.
    Source: Stripe-Sort attention, SparseSAM, arXiv 2605.17633.

    Args:
        q: Queries in sequence order.
        k: Keys in sequence order.
        v: Values in sequence order.
        rel_h: The query side of the row bias, a value for every key row, from the unscaled q; in
            q's dtype or float32, of which the kernel keeps twice the mantissa of q's dtype.
        rel_w: The same for the columns.
        key_rows: Row of every key, int32: [N] (numpy: static, the fast path), [B, N] or [B, H, N].
        key_cols: Column of every key.
        layout: Which 64 x 64 blocks are computed.
        block_order: Rank -> key block: the bar is the `layout.num_bar_blocks` best-ranked blocks of
            every image. None is the identity.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        Attention's output in sequence order, q's dtype.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernel is differentiated; `"xla"` is differentiable.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k and v must have one shape [B, N, H, D], got {q.shape}, {k.shape} and {v.shape}"
        )
    for name, x in (("rel_h", rel_h), ("rel_w", rel_w)):
        if x.shape[:-1] != q.shape[:-1]:
            raise ValueError(f"{name} must have shape {q.shape[:-1]} + (S,), got {x.shape}")
    batch, seq_len, num_heads, _ = q.shape
    for name, x in (("key_rows", key_rows), ("key_cols", key_cols)):
        if x.shape not in ((seq_len,), (batch, seq_len), (batch, num_heads, seq_len)):
            raise ValueError(f"{name} must have shape [N], [B, N] or [B, H, N], got {x.shape}")
    if layout.seq_len != seq_len:
        raise ValueError(f"layout must have seq_len {seq_len}, got {layout.seq_len}")
    arrays = (q, k, v, rel_h, rel_w, key_rows, key_cols)
    problems = [] if implementation == "xla" else _problems(*arrays, layout, block_order)
    chosen = resolve(implementation, function="stripe_attention", problems=problems)
    program = mosaic_stripe_attention if chosen == "mosaic_gpu" else reference.stripe_attention
    return program(*arrays, layout=layout, block_order=block_order)


def mosaic_stripe_attention(
    q: Array,
    k: Array,
    v: Array,
    rel_h: Array,
    rel_w: Array,
    key_rows: Array | np.ndarray,
    key_cols: Array | np.ndarray,
    *,
    layout: BlockLayout,
    block_order: Array | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Array:
    """The kernel on checked arguments; `config` and `interpret` are for tests and tuning."""
    labels = _labels(key_rows, key_cols, rel_h.shape[-1])
    config = config or _fitting_config(q, rel_h, rel_w, labels, layout, block_order)
    assert config is not None, "the public function checks that a tiling fits"
    num_chunks = _chunks(rel_h.shape[-1]) + _chunks(rel_w.shape[-1])
    keys = key_side(labels, num_chunks, layout, block_kv=config.block_kv, block_order=block_order)

    rel = [jnp.pad(x, ((0, 0),) * 3 + ((0, -x.shape[-1] % CHUNK),)) for x in (rel_h, rel_w)]
    info = jnp.finfo(q.dtype)
    # `reduce_precision`, because XLA may drop a pair of conversions and with it the rounding.
    high = [lax.reduce_precision(x, info.nexp, info.nmant) for x in rel]
    low = [x - y for x, y in zip(rel, high, strict=True)]
    # Float32 takes a second product, which adds what rounding to 16 bits took away.
    parts = high + low if jnp.float32 in (rel_h.dtype, rel_w.dtype) else high

    root = math.sqrt(q.shape[-1])
    bias_factor = root if math.frexp(root)[0] == 0.5 else 8.0  # a power of two: exact in 16 bits
    return launch(
        Statics(layout, config, keys.num_blocks, keys.streamed, bias_factor, interpret),
        q,
        k,
        v,
        tuple(x.astype(q.dtype) for x in parts),
        keys.onehot.astype(q.dtype) * jnp.asarray(bias_factor, q.dtype),
        keys.table,
    )
