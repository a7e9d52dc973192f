"""The kernels' functions in plain jax.numpy: what runs on a CPU, a TPU or an older GPU.

Same arguments as the kernels, float32 softmax and accumulation, and differentiable. They are
sparse programs and not only oracles: no product is computed for a key outside the layout, except
the diagonal blocks that the bar already holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.block_layout import BlockLayout

Index = Array | np.ndarray  # static where it is a numpy array
# Queries whose logits are one product. XLA can use a chunk's memory again for the next, though
# nothing makes it wait. Unrolled, because XLA's cost analysis counts the body of a loop once.
_QUERY_CHUNK = 256
# Finite, so that a row without any valid key (padding that is cut off later) has no NaN gradient.
_MASKED = -1e30


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
) -> Float[Array, "B N H D"]:
    """Attention over the gathered bar, merged with attention over the diagonal blocks.

    `pallas_kernels.stripe_attention.stripe_attention` documents the arguments.
    """
    q, k, v, rel_h, rel_w = (x.swapaxes(1, 2) for x in (q, k, v, rel_h, rel_w))
    rows, cols = _head_major(key_rows), _head_major(key_cols)
    parts = []
    if layout.num_bar_blocks:
        bar = _bar_positions(layout, block_order)
        keys = (_take(k, bar, axis=2), _take(v, bar, axis=2))
        place = (_take(rows, bar, axis=2), _take(cols, bar, axis=2))
        parts.append(_attend_bar(q, rel_h, rel_w, *keys, *place))
    if layout.diagonal:
        parts.append(_attend_diagonal(q, k, v, rel_h, rel_w, rows, cols, layout, block_order))
    return _merge(parts).normalised(q.dtype).swapaxes(1, 2)


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
) -> Float[Array, "B Gh Gw H D"]:
    """Attention inside windows, over all their keys or over the bar of their order.

    `pallas_kernels.window_attention.window_attention` documents the arguments.
    """
    batch, height, width = q.shape[:3]
    q, k, v, rel_h, rel_w = (
        window_partition(x, window_size).swapaxes(1, 2) for x in (q, k, v, rel_h, rel_w)
    )  # [B W, H, w w, ...]
    rows, cols = _raster(window_size, window_size)
    if layout is not None and not layout.is_dense:
        if order is None:
            raise ValueError("order must be given with a sparse layout, got None")
        order = order[..., : layout.bar_len]
        if order.ndim > 1:
            order = order.reshape(q.shape[0], *order.shape[2:])
        order = _head_major(order)
        k, v = _take(k, order, axis=2), _take(v, order, axis=2)
        rows, cols = order // window_size, order % window_size
    out = _partial(q, k, v, _bias(rel_h, rel_w, rows, cols)).normalised(q.dtype)
    return window_unpartition(out.swapaxes(1, 2), window_size, (batch, height, width))


def relative_position(
    q: Float[Array, "B Gh Gw H D"],
    rel_pos_h: Float[Array, "Gh Sh D"],
    rel_pos_w: Float[Array, "Gw Sw D"],
) -> tuple[Float[Array, "B Gh Gw H Sh"], Float[Array, "B Gh Gw H Sw"]]:
    """The query side of the decomposed position bias, float32: `q . rel_pos_h[y, i]` and columns.

    Source: MViTv2, arXiv 2112.01526, Eq. 4; SAM, arXiv 2304.02643.
    """
    return (
        _einsum("byxhd,yid->byxhi", q, rel_pos_h),
        _einsum("byxhd,xjd->byxhj", q, rel_pos_w),
    )


def window_partition(x: Float[Array, "B Gh Gw *C"], window_size: int) -> Float[Array, "BW ww *C"]:
    """Cut a feature map into windows, zero-padded past its bottom and right edge."""
    batch, height, width, *channels = x.shape
    down, across = -(-height // window_size), -(-width // window_size)
    edges = ((0, 0), (0, down * window_size - height), (0, across * window_size - width))
    x = jnp.pad(x, edges + ((0, 0),) * len(channels))
    x = x.reshape(batch, down, window_size, across, window_size, *channels).swapaxes(2, 3)
    return x.reshape(batch * down * across, window_size**2, *channels)


def window_unpartition(
    windows: Float[Array, "BW ww *C"], window_size: int, shape: tuple[int, int, int]
) -> Float[Array, "B Gh Gw *C"]:
    """Put windows back together to `shape` = (B, Gh, Gw), without the padding."""
    batch, height, width = shape
    down, across = -(-height // window_size), -(-width // window_size)
    channels = windows.shape[2:]
    x = windows.reshape(batch, down, across, window_size, window_size, *channels).swapaxes(2, 3)
    x = x.reshape(batch, down * window_size, across * window_size, *channels)
    return x[:, :height, :width]


def layer_norm(
    x: Float[Array, "... d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    epsilon: float,
    dtype: DTypeLike | None = None,
) -> Float[Array, "... d"]:
    """LayerNorm over the last axis in float32; the result has x's dtype or another."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(axis=-1, keepdims=True) + epsilon)
    return (y * scale + bias).astype(dtype or x.dtype)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full precision for float32 operands, where a GPU would otherwise take TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class _Partial(NamedTuple):
    """Softmax attention over some of the keys, not yet divided by its total weight."""

    out: Array  # [..., Q, D]
    maximum: Array  # [..., Q, 1]
    total: Array  # [..., Q, 1]

    def normalised(self, dtype: jnp.dtype) -> Array:
        """The attention's output."""
        return (self.out / self.total).astype(dtype)


def _einsum(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(
        subscripts,
        x,
        y,
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


def _partial(q: Array, k: Array, v: Array, bias: Array) -> _Partial:
    """Attention of q [..., Q, D] to k, v [..., K, D] with bias [..., Q, K]."""
    logits = _einsum("...qd,...kd->...qk", q, k) * q.shape[-1] ** -0.5 + bias
    maximum = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - maximum)
    out = _einsum("...qk,...kd->...qd", weights.astype(v.dtype), v)
    return _Partial(out, maximum, weights.sum(-1, keepdims=True))


def _merge(parts: list[_Partial]) -> _Partial:
    """Attention over the keys of one or two parts."""
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    maximum = jnp.maximum(first.maximum, second.maximum)
    scales = jnp.exp(first.maximum - maximum), jnp.exp(second.maximum - maximum)
    out = first.out * scales[0] + second.out * scales[1]
    return _Partial(out, maximum, first.total * scales[0] + second.total * scales[1])


def _attend_bar(
    q: Array, rel_h: Array, rel_w: Array, k: Array, v: Array, rows: Index, cols: Index
) -> _Partial:
    """All queries' attention to the bar's keys, a chunk of queries at a time."""

    @jax.checkpoint  # the logits of a chunk are computed again rather than kept for a gradient
    def chunk(q: Array, rel_h: Array, rel_w: Array) -> _Partial:
        return _partial(q, k, v, _bias(rel_h, rel_w, rows, cols))

    seq_len = q.shape[2]
    parts = [
        chunk(*(x[:, :, start : start + _QUERY_CHUNK] for x in (q, rel_h, rel_w)))
        for start in range(0, seq_len, _QUERY_CHUNK)
    ]
    return _Partial(*(jnp.concatenate(field, axis=2) for field in zip(*parts, strict=True)))


def _attend_diagonal(
    q: Array,
    k: Array,
    v: Array,
    rel_h: Array,
    rel_w: Array,
    rows: Index,
    cols: Index,
    layout: BlockLayout,
    block_order: Array | None,
) -> _Partial:
    """Each query's attention to the blocks at its own position that the bar does not hold."""
    seq_len, unit = q.shape[2], max(layout.block_q, layout.block_kv)
    padding = -seq_len % unit

    def units(x: Index) -> Array:
        """[B, H, N, ...] cut into [B, H, N / unit, unit, ...]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 3))
        return x.reshape(*x.shape[:2], -1, unit, *x.shape[3:])

    block = np.arange(seq_len + padding) // layout.block_kv
    if block_order is None:
        in_bar = jnp.asarray(block < layout.num_bar_blocks)[None]
    else:
        rank = jnp.argsort(block_order, axis=-1)
        rank = jnp.pad(rank, ((0, 0), (0, block[-1] + 1 - layout.num_kv_blocks)))
        in_bar = rank[:, block] < layout.num_bar_blocks
    computed = ~in_bar & (np.arange(seq_len + padding) < seq_len)
    computed = computed.reshape(-1, 1, computed.shape[-1] // unit, 1, unit)
    bias = _bias(units(rel_h), units(rel_w), units(rows), units(cols))
    part = _partial(units(q), units(k), units(v), jnp.where(computed, bias, _MASKED))
    return _Partial(*(x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :seq_len] for x in part))


def _bar_positions(layout: BlockLayout, block_order: Array | None) -> Array | slice:
    """Positions of the bar's keys in the sequence: a prefix, or [B, 1, bar] by block rank."""
    if block_order is None:
        return slice(layout.bar_len)
    blocks = block_order[:, : layout.num_bar_blocks, None] * layout.block_kv
    bar = (blocks + np.arange(layout.block_kv)).reshape(block_order.shape[0], 1, -1)
    return bar[..., : layout.bar_len]


def _head_major(index: Index) -> Index:
    """An index [K], [B, K] or [B, H, K] as [B or 1, H or 1, K]."""
    return index.reshape(*index.shape[:-1], *(1,) * (3 - index.ndim), index.shape[-1])


def _take(x: Index, index: Index | slice, axis: int) -> Any:
    """Entries of x along its axis of tokens; `index` broadcasts over batch and heads."""
    if isinstance(index, slice):
        return x[(slice(None),) * axis + (index,)]
    if isinstance(index, np.ndarray) and index.shape[:2] == (1, 1):
        return jnp.take(x, index[0, 0], axis=axis)
    index = index.reshape(*index.shape, *(1,) * (x.ndim - index.ndim))
    return jnp.take_along_axis(x, index, axis=axis)


def _raster(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = np.indices((height, width)).reshape(2, 1, 1, -1)
    return rows, cols


def _bias(rel_h: Array, rel_w: Array, rows: Index, cols: Index) -> Array:
    """`rel_h[q, rows[k]] + rel_w[q, cols[k]]`, [..., Q, K], float32.

    `rel_h` [..., Q, Sh] and `rel_w` [..., Q, Sw]; `rows` and `cols` [..., K].
    """
    rel_h, rel_w = rel_h.astype(jnp.float32), rel_w.astype(jnp.float32)
    if isinstance(rows, np.ndarray) and isinstance(cols, np.ndarray):
        raster = _raster(rel_h.shape[-1], rel_w.shape[-1])
        if np.array_equal(rows, raster[0]) and np.array_equal(cols, raster[1]):
            bias = rel_h[..., :, None] + rel_w[..., None, :]  # a broadcast, where a gather is slow
            return bias.reshape(*rel_h.shape[:-1], -1)
    rows, cols = (jnp.expand_dims(x, -2) for x in (rows, cols))
    return jnp.take_along_axis(rel_h, rows, -1) + jnp.take_along_axis(rel_w, cols, -1)
