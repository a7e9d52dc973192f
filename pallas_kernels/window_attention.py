"""Attention inside the windows of a feature map, with SAM's decomposed position bias.

The public function, which runs as plain XLA (`reference`) or as the Mosaic GPU kernel
(`window_kernel`), and what the kernel needs prepared.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import cudnn_attention, reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.choices import Implementation
from pallas_kernels.float8 import Float8Rows, quantize_static
from pallas_kernels.hopper import KERNEL_DTYPES, dtype_problems
from pallas_kernels.implementation import resolve
from pallas_kernels.relative_position import given_tables, relative_position
from pallas_kernels.tuning import tuned
from pallas_kernels.window_kernel import KEEP, REL, Config, Geometry, Statics, launch

HEAD_DIMS = (64, 80)
WINDOW_SIZES = range(7, 17)


def _one_hots(window_size: int, num_keys: int) -> np.ndarray:
    """E_h and E_w, transposed: [2, num_keys, REL]."""
    key, i = np.arange(num_keys)[:, None], np.arange(REL)
    places = np.stack([key // window_size, key % window_size])
    return (places == i) & (key < window_size**2)


def _keep(order: Any, bar_len: int) -> Array | np.ndarray:
    """0 for the bar's keys and -inf for all others, [1 or B, 1 or W, 1 or H, KEEP]."""
    bar = order[..., :bar_len]
    bar = bar.reshape(*(*bar.shape[:-1], 1, 1, 1)[:3], bar_len)
    if isinstance(bar, np.ndarray):
        keep = np.full((*bar.shape[:-1], KEEP), -np.inf, np.float32)
        np.put_along_axis(keep, bar, 0, axis=-1)
        return keep
    keep = jnp.full((*bar.shape[:-1], KEEP), -jnp.inf, jnp.float32)
    return jnp.put_along_axis(keep, bar, 0, axis=-1, inplace=False)


def fitting_config(
    window_size: int, head_dim: int, dtype: DTypeLike, *, float8_out: bool = False
) -> Config | None:
    """The first tuned configuration that fits in shared memory, with a position bias or without."""
    options = {"float8_out": float8_out}
    fits = (c for c in tuned().windows if c.fits(window_size, head_dim, dtype, **options))
    return next(fits, None)


def prepare(
    qkv: Array,
    rel_pos_h: Array | None = None,
    rel_pos_w: Array | None = None,
    *,
    window_size: int,
    layout: BlockLayout | None = None,
    order: Any = None,
    out_scale: Array | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> tuple[Statics, tuple[Array, tuple[Array, ...], Array | None, Array, Array | None]]:
    """What `launch` takes, for checked arguments of `window_attention`.

    The position bias comes from a kernel of its own, or by XLA where that does not fit.

    Args:
        qkv: See `window_attention`, like the next five.
        rel_pos_h: None is no position bias.
        rel_pos_w: Likewise.
        window_size: Side w of a window.
        layout: None is dense.
        order: Needed with a sparse layout.
        out_scale: None is a result of qkv's dtype.
        config: How the kernel runs; None is the tuned one.
        interpret: For tests: parameters of Mosaic GPU's interpret mode.
    """
    batch, height, width, _, heads, head_dim = qkv.shape
    float8_out = out_scale is not None
    config = config or fitting_config(window_size, head_dim, qkv.dtype, float8_out=float8_out)
    assert config is not None, "the last configuration fits all that is checked for"
    rel, one_hot = (), None
    if tables := given_tables(rel_pos_h, rel_pos_w):
        num_keys = Geometry.of(window_size).num_keys
        one_hot = jnp.asarray(_one_hots(window_size, num_keys), qkv.dtype)
        # Whole boxes for the TMA, which begins them at multiples of 16 bytes.
        by_row, by_col = (jnp.pad(x, ((0, 0), (0, REL - x.shape[1]), (0, 0))) for x in tables)
        rel = relative_position(qkv, by_row, by_col, interpret=interpret)
    if layout is None or layout.is_dense:
        sparse, keep = False, np.zeros((1, 1, 1, KEEP), np.float32)
    else:
        sparse, keep = True, _keep(order, layout.bar_len)
    flat = qkv.reshape(batch, height, width, 3 * heads, head_dim)
    statics = Statics(window_size, heads, sparse, config, interpret)
    inverse_out = None if out_scale is None else 1 / out_scale.reshape(1)
    return statics, (flat, rel, one_hot, jnp.asarray(keep), inverse_out)


def _check(
    qkv: Array,
    rel_pos: tuple[Array | None, Array | None],
    w: int,
    layout: BlockLayout | None,
    order: Any,
) -> None:
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must have shape [B, Gh, Gw, 3, H, D], got {qkv.shape}")
    batch, height, width, _, num_heads, head_dim = qkv.shape
    tables = given_tables(*rel_pos)
    for name, x, side in zip(("rel_pos_h", "rel_pos_w"), tables, (height, width), strict=False):
        shapes = [(side, columns, head_dim) for columns in (w, max(w, REL))]
        if x.shape not in shapes or x.dtype != qkv.dtype:
            expected = f"shape {(side, w, head_dim)} and dtype {qkv.dtype}"
            raise ValueError(f"{name} must have {expected}, got {x.shape} and {x.dtype}")
    if layout is None or layout.is_dense:
        return
    if layout.seq_len != w * w or layout.diagonal:
        raise ValueError(f"layout must be BlockLayout.bar({w * w}, density), got {layout}")
    windows = -(-height // w) * -(-width // w)
    shapes = [(*lead, w * w) for lead in ((), (batch, windows), (batch, windows, num_heads))]
    if order is None or order.shape not in shapes:
        got = None if order is None else order.shape
        raise ValueError(f"order must have one of the shapes {shapes} with a bar, got {got}")


def _problems(qkv: Array, window_size: int) -> list[str]:
    """What the kernel does not support about these arguments."""
    problems = dtype_problems(KERNEL_DTYPES, qkv=qkv.dtype)
    if qkv.shape[5] not in HEAD_DIMS:
        problems.append(f"head_dim must be one of {HEAD_DIMS}, got {qkv.shape[5]}")
    if window_size not in WINDOW_SIZES:
        problems.append(f"window_size must lie in 7 to 16, got {window_size}")
    return problems


def window_attention(
    qkv: Float[Array, "B Gh Gw 3 H D"],
    rel_pos_h: Float[Array, "Gh w D"] | None = None,
    rel_pos_w: Float[Array, "Gw w D"] | None = None,
    *,
    window_size: int,
    layout: BlockLayout | None = None,
    order: Int[Array | np.ndarray, "*batch ww"] | None = None,
    out_scale: Float[Array, ""] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B Gh Gw H D"] | Float8Rows:
    """Attention inside the windows of a feature map, with SAM's decomposed position bias.

    `softmax(q k^T / sqrt(D) + rel_h + rel_w) v` over a window's keys, or over the bar of its order,
    where a query at row y and column x of the map and a key at row i and column j of the window
    have `rel_h = q . rel_pos_h[y, i]` and `rel_w = q . rel_pos_w[x, j]`. Windows begin at multiples
    of w; where they reach past the map, its padded tokens have k = 0 and v = 0 and do take part as
    keys, so k and v come without the bias of their projection: the key bias cancels in the softmax,
    the value bias adds to the result.
    Source: SAM, arXiv 2304.02643; the bar: SparseSAM, arXiv 2605.17633.

    Args:
        qkv: Queries, keys and values of any map of Gh x Gw tokens in raster order.
        rel_pos_h: What every query row of the map adds for every key row of its window, dtype of
            qkv. Padded to 16 key rows by zeros, it spares the kernel a copy. None, like rel_pos_w,
            is attention without a position bias.
        rel_pos_w: The same for columns.
        window_size: Side w of a window; the kernel takes 7 to 16.
        layout: `BlockLayout.bar(w * w, density)`: only the first `layout.bar_len` tokens of `order`
            are keys. None is dense.
        order: Rank -> raster index in the (padded) window, int32: [w w], [B, W, w w] or
            [B, W, H, w w], windows in raster order. Needed with a sparse layout.
        out_scale: The result has 8 bits with this scale; None is the dtype of qkv.
        implementation: `"auto"`, `"mosaic_gpu"` or `"xla"`; see `pallas_kernels.implementation`.

    Returns:
        Attention's output in raster order, dtype of qkv or `Float8Rows`.

    Raises:
        ValueError: Shapes disagree, or `"mosaic_gpu"` is asked for where it cannot run.
        NotImplementedError: The kernel is differentiated; `"xla"` is differentiable.
    """
    _check(qkv, (rel_pos_h, rel_pos_w), window_size, layout, order)
    problems = _problems(qkv, window_size)
    chosen = resolve(implementation, function="window_attention", problems=problems)
    options: dict[str, Any] = dict(window_size=window_size, layout=layout, order=order)
    if chosen == "xla":
        out = _xla_window_attention(qkv, given_tables(rel_pos_h, rel_pos_w), **options)
        return out if out_scale is None else quantize_static(out, out_scale)
    statics, operands = prepare(qkv, rel_pos_h, rel_pos_w, out_scale=out_scale, **options)
    out = launch(statics, *operands)
    return out if out_scale is None else Float8Rows(out, out_scale)


def _xla_window_attention(
    qkv: Array, tables: tuple[Array, ...], *, window_size: int, **options: Any
) -> Array:
    q, k, v = (qkv[:, :, :, i] for i in range(3))
    program, dtype = reference, jnp.dtype(jnp.float32)
    if cudnn_attention.runs(q.dtype, q.shape[-1]):
        program, dtype = cudnn_attention, q.dtype
    rel_h, rel_w = None, None
    if tables:
        by_row, by_col = (x[:, :window_size] for x in tables)
        rel_h, rel_w = reference.relative_position(q, by_row, by_col, dtype)
    return program.window_attention(q, k, v, rel_h, rel_w, window_size=window_size, **options)
