"""Attention inside the windows of a feature map, with SAM's decomposed position bias.

The public function, which runs as plain XLA (`reference`) or as the Mosaic GPU kernel
(`window_kernel`), and what the kernel needs prepared.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.implementation import Implementation, resolve
from pallas_kernels.window_kernel import CONFIGS, REL, SMEM_BYTES, Config, Geometry, Statics, launch

HEAD_DIMS = (64, 80)
WINDOW_SIZES = range(7, 17)


def _halves(x: Array, dtype: Any) -> tuple[Array, Array]:
    """A float32 x as high + low in `dtype`: what is lost is beyond twice its precision."""
    # Not x.astype(dtype): within a jitted function XLA may keep the digits that this drops.
    info = jnp.finfo(dtype)
    high = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return high.astype(dtype), (x - high).astype(dtype)


def _one_hots(window_size: int, num_keys: int, head_dim: int, dtype: Any) -> np.ndarray:
    """sqrt(D) E_h and sqrt(D) E_w, transposed, then their low halves if they are not zero.

    Shape [2 or 4, num_keys, REL].
    """
    key, i = np.arange(num_keys)[:, None], np.arange(REL)
    places = np.stack([key // window_size, key % window_size])
    one_hot = (places == i) & (key < window_size**2)
    high = np.sqrt(np.float64(head_dim)).astype(dtype)
    low = (np.sqrt(np.float64(head_dim)) - np.float64(high)).astype(dtype)
    return np.concatenate([one_hot * half for half in (high, low) if half])


def _keep(order: Any, bar_len: int) -> Array | np.ndarray:
    """0 for the bar's keys and -inf for all others, [1 or B, 1 or W, 1 or H, 256]."""
    bar = order[..., :bar_len]
    bar = bar.reshape(*(*bar.shape[:-1], 1, 1, 1)[:3], bar_len)
    if isinstance(bar, np.ndarray):
        keep = np.full((*bar.shape[:-1], 256), -np.inf, np.float32)
        np.put_along_axis(keep, bar, 0, axis=-1)
        return keep
    keep = jnp.full((*bar.shape[:-1], 256), -jnp.inf, jnp.float32)
    return jnp.put_along_axis(keep, bar, 0, axis=-1, inplace=False)


def mosaic_window_attention(
    q: Array,
    k: Array,
    v: Array,
    rel_h: Array,
    rel_w: Array,
    *,
    window_size: int,
    layout: BlockLayout | None = None,
    order: Any = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Array:
    """The kernel on checked arguments; `config` and `interpret` are for tests and tuning."""
    head_dim, dtype = q.shape[4], q.dtype
    geometry = Geometry.of(window_size, head_dim)
    one_hot = _one_hots(window_size, geometry.num_keys, head_dim, dtype)
    factors = [(axis, e) for axis in (0, 1) for e in range(axis, len(one_hot), 2)]
    rel = [rel_h, rel_w]
    if jnp.float32 in (rel_h.dtype, rel_w.dtype):
        halves = [_halves(x.astype(jnp.float32), dtype) for x in rel]
        rel = [half[level] for level in (0, 1) for half in halves]
        factors += [(2, 0), (3, 1)]
    # The TMA begins a box at a whole multiple of 16 bytes: at every head's first column.
    rel = [jnp.pad(x, ((0, 0),) * 4 + ((0, REL - x.shape[4]),)) for x in rel]
    if layout is None or layout.is_dense:
        sparse, keep = False, np.zeros((1, 1, 1, 256), np.float32)
    else:
        sparse, keep = True, _keep(order, layout.bar_len)
    for candidate in CONFIGS if config is None else (config,):
        config = candidate
        if geometry.smem_bytes(config, len(rel), len(one_hot)) <= SMEM_BYTES:
            break
    assert config is not None
    statics = Statics(window_size, geometry, tuple(factors), sparse, config, interpret)
    return launch(statics, q, k, v, tuple(rel), jnp.asarray(one_hot), jnp.asarray(keep))


def _check(
    q: Array,
    k: Array,
    v: Array,
    rel: tuple[Array, Array],
    w: int,
    layout: Any,
    order: Any,
) -> None:
    if q.ndim != 5 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k and v must have one shape [B, Gh, Gw, H, D], got {q.shape}, {k.shape}, {v.shape}"
        )
    for name, x in zip(("rel_h", "rel_w"), rel, strict=True):
        if x.shape not in ((*q.shape[:4], w), (*q.shape[:4], max(w, REL))):
            expected = f"{q.shape[:4]} + ({w},), the last padded to {REL} or not"
            raise ValueError(f"{name} must have shape {expected}, got {x.shape}")
    if layout is None or layout.is_dense:
        return
    if layout.seq_len != w * w or layout.diagonal:
        raise ValueError(f"layout must be BlockLayout.bar({w * w}, density), got {layout}")
    batch, height, width, num_heads, _ = q.shape
    windows = -(-height // w) * -(-width // w)
    shapes = [(*lead, w * w) for lead in ((), (batch, windows), (batch, windows, num_heads))]
    if order is None or order.shape not in shapes:
        got = None if order is None else order.shape
        raise ValueError(f"order must have one of the shapes {shapes} with a bar, got {got}")


def _problems(
    q: Array, k: Array, v: Array, rel: tuple[Array, Array], window_size: int
) -> list[str]:
    """What the kernel does not support about these arguments."""
    problems = []
    dtypes = {str(x.dtype) for x in (q, k, v)}
    if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16):
        problems.append(f"q, k and v must be all bfloat16 or all float16, got {sorted(dtypes)}")
    for name, x in zip(("rel_h", "rel_w"), rel, strict=True):
        if x.dtype not in (q.dtype, jnp.float32):
            problems.append(f"{name} must have the dtype of q or float32, got {x.dtype}")
    if q.shape[4] not in HEAD_DIMS:
        problems.append(f"head_dim must be one of {HEAD_DIMS}, got {q.shape[4]}")
    if window_size not in WINDOW_SIZES:
        problems.append(f"window_size must lie in 7 to 16, got {window_size}")
    return problems


def window_attention(
    q: Float[Array, "B Gh Gw H D"],
    k: Float[Array, "B Gh Gw H D"],
    v: Float[Array, "B Gh Gw H D"],
    rel_h: Float[Array, "B Gh Gw H w"],
    rel_w: Float[Array, "B Gh Gw H w"],
    *,
    window_size: int,
    layout: BlockLayout | None = None,
    order: Int[Array | np.ndarray, "*batch ww"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B Gh Gw H D"]:
    """Attention inside the windows of a feature map, with SAM's decomposed position bias.

    `softmax(q k^T / sqrt(D) + rel_h[:, row(k)] + rel_w[:, col(k)]) v` over a window's keys, or over
    the bar of its order. Windows begin at multiples of w; where they reach past the map, its padded
    tokens have k = 0 and v = 0 and do take part as keys, so k and v come without the bias of their
    projection: the key bias cancels in the softmax, the value bias adds to the result.
    Source: SAM, arXiv 2304.02643; the bar: SparseSAM, arXiv 2605.17633.

    Args:
        q: Queries, any map of Gh x Gw tokens in raster order.
        k: Keys.
        v: Values.
        rel_h: The query side of the row bias, a value for every key row of the window, from the
            unscaled q; in q's dtype, or in float32 of which the kernel keeps twice the digits of
            q's dtype. Zero-padded to 16 columns it saves the kernel a copy.
        rel_w: The same for the columns.
        window_size: Side w of a window; the kernel takes 7 to 16.
        layout: `BlockLayout.bar(w * w, density)`: only the first `layout.bar_len` tokens of `order`
            are keys. None is dense.
        order: Rank -> raster index in the (padded) window, int32: [w w], [B, W, w w] or
            [B, W, H, w w], windows in raster order. Needed with a sparse layout.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        Attention's output in raster order, q's dtype.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernel is differentiated; `"xla"` is differentiable.
    """
    _check(q, k, v, (rel_h, rel_w), window_size, layout, order)
    problems = _problems(q, k, v, (rel_h, rel_w), window_size)
    chosen = resolve(implementation, function="window_attention", problems=problems)
    if chosen == "mosaic_gpu":
        program = mosaic_window_attention
    else:
        program = reference.window_attention
        rel_h, rel_w = rel_h[..., :window_size], rel_w[..., :window_size]
    return program(q, k, v, rel_h, rel_w, window_size=window_size, layout=layout, order=order)
