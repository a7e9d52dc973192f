"""What the kernels compute in plain jax.numpy: what runs on a CPU, a TPU or an older GPU.

Attention takes q, k and v apart and the query side of the position bias, which the public functions
make of packed qkv and tables. Softmax and accumulation are float32, and all is differentiable. They
are sparse programs and not only oracles: no product is computed for a key outside the layout,
except the diagonal blocks that the bar already holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.float8 import Float8Rows, Float8Weight, product

Index = Array | np.ndarray  # static where it is a numpy array
# Queries whose logits are one product. XLA can use a chunk's memory again for the next, though
# nothing makes it wait. Unrolled, because XLA's cost analysis counts the body of a loop once.
_QUERY_CHUNK = 256
# Finite, so that a row without any valid key (padding that is cut off later) has no NaN gradient.
MASKED = -1e30


def stripe_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    rel_h: Float[Array, "B N H Sh"] | None,
    rel_w: Float[Array, "B N H Sw"] | None,
    key_rows: Int[Array | np.ndarray, "*batch N"],
    key_cols: Int[Array | np.ndarray, "*batch N"],
    *,
    layout: BlockLayout,
    block_order: Int[Array, "B num_kv_blocks"] | None = None,
) -> Float[Array, "B N H D"]:
    """Attention over the gathered bar, merged with attention over the diagonal blocks.

    Args:
        q: Queries in the order of the sequence, like all that follows.
        k: Keys.
        v: Values.
        rel_h: What every query adds for every key row of the map, see `relative_position`; None,
            like rel_w, is attention without a position bias.
        rel_w: The same for columns.
        key_rows: Every key's row of the map.
        key_cols: Every key's column.
        layout: Which blocks are computed.
        block_order: Rank -> key block of every image; None is the identity.
    """
    q, k, v, rel_h, rel_w = jax.tree.map(swap, (q, k, v, rel_h, rel_w))
    rows, cols = head_major(key_rows), head_major(key_cols)
    parts = []
    if layout.num_bar_blocks:
        bar = bar_positions(layout, block_order)
        keys = (take(k, bar, axis=2), take(v, bar, axis=2))
        place = (take(rows, bar, axis=2), take(cols, bar, axis=2))
        parts.append(_attend_bar(q, rel_h, rel_w, *keys, *place))
    if layout.diagonal:
        parts.append(attend_diagonal(q, k, v, rel_h, rel_w, rows, cols, layout, block_order))
    return _merge(parts).normalised(q.dtype).swapaxes(1, 2)


def window_attention(
    q: Float[Array, "B Gh Gw H D"],
    k: Float[Array, "B Gh Gw H D"],
    v: Float[Array, "B Gh Gw H D"],
    rel_h: Float[Array, "B Gh Gw H w"] | None,
    rel_w: Float[Array, "B Gh Gw H w"] | None,
    *,
    window_size: int,
    layout: BlockLayout | None = None,
    order: Int[Array | np.ndarray, "*batch ww"] | None = None,
) -> Float[Array, "B Gh Gw H D"]:
    """Attention inside windows, over all their keys or over the bar of their order.

    Args:
        q: Queries of the map in raster order, like k, v, rel_h and rel_w.
        k: Keys without the bias of their projection.
        v: Values, likewise.
        rel_h: What every query adds for every key row of its window, see `relative_position`; None,
            like rel_w, is attention without a position bias.
        rel_w: The same for columns.
        window_size: Side w of a window.
        layout: Which of a window's keys are computed; None is all.
        order: Rank -> raster index in the window; needed with a sparse layout.
    """
    batch, height, width = q.shape[:3]
    q, k, v, rel_h, rel_w = jax.tree.map(
        lambda x: swap(window_partition(x, window_size)), (q, k, v, rel_h, rel_w)
    )  # [B W, H, w w, ...]
    keys = window_keys(order, layout)
    if keys is not None:
        k, v = take(k, keys, axis=2), take(v, keys, axis=2)
    rows, cols = window_places(keys, window_size)
    out = _partial(q, k, v, _bias(rel_h, rel_w, rows, cols)).normalised(q.dtype)
    return window_unpartition(out.swapaxes(1, 2), window_size, (batch, height, width))


def window_keys(order: Index | None, layout: BlockLayout | None) -> Index | None:
    """Raster indices of the keys that windows attend to, [B W or 1, H or 1, K]; None is all."""
    if layout is None or layout.is_dense:
        return None
    if order is None:
        raise ValueError("order must be given with a sparse layout, got None")
    order = order[..., : layout.bar_len]
    return head_major(order if order.ndim == 1 else order.reshape(-1, *order.shape[2:]))


def window_places(keys: Index | None, window_size: int) -> tuple[Index, Index]:
    """Rows and columns, in a window, of what `window_keys` gave."""
    if keys is None:
        return _raster(window_size, window_size)
    return keys // window_size, keys % window_size


def relative_position(
    q: Float[Array, "B Gh Gw H D"],
    rel_pos_h: Float[Array, "Gh Sh D"],
    rel_pos_w: Float[Array, "Gw Sw D"],
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B Gh Gw H Sh"], Float[Array, "B Gh Gw H Sw"]]:
    """The query side of the decomposed position bias: `q . rel_pos_h[y, i]` and columns.

    Source: MViTv2, arXiv 2112.01526, Eq. 4; SAM, arXiv 2304.02643.
    """
    return (
        einsum("byxhd,yid->byxhi", q, rel_pos_h, dtype),
        einsum("byxhd,xjd->byxhj", q, rel_pos_w, dtype),
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


def linear(x: Array | Float8Rows, kernel: Array | Float8Weight) -> Float[Array, "*rows n"]:
    """A product in the dtype of its operands, or in float32 where they have 8 bits."""
    if isinstance(x, Float8Rows) or isinstance(kernel, Float8Weight):
        assert isinstance(x, Float8Rows) and isinstance(kernel, Float8Weight), "it is checked"
        return product(x, kernel)
    return jnp.matmul(x, kernel, precision=matmul_precision(x.dtype))


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full precision for float32 operands, where a GPU would otherwise take TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Partial(NamedTuple):
    """Softmax attention over some of the keys, not yet divided by its total weight."""

    out: Array  # [..., Q, D]
    maximum: Array  # [..., Q, 1]
    total: Array  # [..., Q, 1]

    def normalised(self, dtype: jnp.dtype) -> Array:
        """The attention's output."""
        return (self.out / self.total).astype(dtype)


def einsum(subscripts: str, x: Array, y: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """A product with float32 sums, in full precision where its operands are float32."""
    return jnp.einsum(
        subscripts,
        x,
        y,
        precision=matmul_precision(x.dtype),
        preferred_element_type=dtype,
    )


def _partial(q: Array, k: Array, v: Array, bias: Array | float) -> Partial:
    """Attention of q [..., Q, D] to k, v [..., K, D] with bias [..., Q, K] or none, 0."""
    logits = einsum("...qd,...kd->...qk", q, k) * q.shape[-1] ** -0.5 + bias
    maximum = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - maximum)
    out = einsum("...qk,...kd->...qd", weights.astype(v.dtype), v)
    return Partial(out, maximum, weights.sum(-1, keepdims=True))


def _merge(parts: list[Partial]) -> Partial:
    """Attention over the keys of one or two parts."""
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    maximum = jnp.maximum(first.maximum, second.maximum)
    scales = jnp.exp(first.maximum - maximum), jnp.exp(second.maximum - maximum)
    out = first.out * scales[0] + second.out * scales[1]
    return Partial(out, maximum, first.total * scales[0] + second.total * scales[1])


def swap(x: Array) -> Array:
    """Tokens and heads in each other's place."""
    return x.swapaxes(1, 2)


def _attend_bar(
    q: Array,
    rel_h: Array | None,
    rel_w: Array | None,
    k: Array,
    v: Array,
    rows: Index,
    cols: Index,
) -> Partial:
    """All queries' attention to the bar's keys, a chunk of queries at a time."""

    @jax.checkpoint  # the logits of a chunk are computed again rather than kept for a gradient
    def chunk(q: Array, rel_h: Array | None, rel_w: Array | None) -> Partial:
        return _partial(q, k, v, _bias(rel_h, rel_w, rows, cols))

    queries = (q, rel_h, rel_w)
    parts = [
        chunk(*jax.tree.map(lambda x: x[:, :, start : start + _QUERY_CHUNK], queries))  # noqa: B023
        for start in range(0, q.shape[2], _QUERY_CHUNK)
    ]
    return Partial(*(jnp.concatenate(field, axis=2) for field in zip(*parts, strict=True)))


def attend_diagonal(
    q: Array,
    k: Array,
    v: Array,
    rel_h: Array | None,
    rel_w: Array | None,
    rows: Index,
    cols: Index,
    layout: BlockLayout,
    block_order: Array | None,
) -> Partial:
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
    bias = _bias(*jax.tree.map(units, (rel_h, rel_w, rows, cols)))
    part = _partial(units(q), units(k), units(v), jnp.where(computed, bias, MASKED))
    return Partial(*(x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :seq_len] for x in part))


def bar_positions(layout: BlockLayout, block_order: Array | None) -> Array | slice:
    """Positions of the bar's keys in the sequence: a prefix, or [B, 1, bar] by block rank."""
    if block_order is None:
        return slice(layout.bar_len)
    blocks = block_order[:, : layout.num_bar_blocks, None] * layout.block_kv
    bar = (blocks + np.arange(layout.block_kv)).reshape(block_order.shape[0], 1, -1)
    return bar[..., : layout.bar_len]


def head_major(index: Index) -> Index:
    """An index [K], [B, K] or [B, H, K] as [B or 1, H or 1, K]."""
    return index.reshape(*index.shape[:-1], *(1,) * (3 - index.ndim), index.shape[-1])


def take(x: Index, index: Index | slice, axis: int) -> Any:
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


def _bias(rel_h: Array | None, rel_w: Array | None, rows: Index, cols: Index) -> Array | float:
    """`rel_h[q, rows[k]] + rel_w[q, cols[k]]`, [..., Q, K], float32, or 0 without these.

    `rel_h` [..., Q, Sh] and `rel_w` [..., Q, Sw]; `rows` and `cols` [..., K].
    """
    if rel_h is None or rel_w is None:
        return 0.0
    rel_h, rel_w = rel_h.astype(jnp.float32), rel_w.astype(jnp.float32)
    if isinstance(rows, np.ndarray) and isinstance(cols, np.ndarray):
        raster = _raster(rel_h.shape[-1], rel_w.shape[-1])
        if np.array_equal(rows, raster[0]) and np.array_equal(cols, raster[1]):
            bias = rel_h[..., :, None] + rel_w[..., None, :]  # a broadcast, where a gather is slow
            return bias.reshape(*rel_h.shape[:-1], -1)
    rows, cols = (jnp.expand_dims(x, -2) for x in (rows, cols))
    return jnp.take_along_axis(rel_h, rows, -1) + jnp.take_along_axis(rel_w, cols, -1)
