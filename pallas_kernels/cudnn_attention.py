"""The attention of `reference` through cuDNN, for 16-bit floats on NVIDIA GPUs since Ampere.

cuDNN keeps no logits in memory, but knows neither block layouts nor decomposed position biases. Two
identities bring both into a product of queries and keys:

- The position bias is a product: `rel_h[q, row k] + rel_w[q, col k] = [rel_h | rel_w] . [e_row k |
  e_col k]` with unit vectors e. Its columns stand behind those of the heads where cuDNN takes
  heads of that width; else the product is written out, an image at a time.
- The keys that a query has for itself, its diagonal block, are one more key of all: its logit is
  c, about the logarithm of their weight, its value zero but for a column that is one. That column
  of the output, x = e^c / (L + e^c), says the weight L of the other keys, so that with the diagonal
  blocks' own output o', and weight l' e^c, the whole is `(out + x l' o') / (1 - x + x l')`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.reference import Index, Partial

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_MULTIPLE = 8  # of the widths of heads that cuDNN takes
_LARGEST_LOGIT = 4096.0  # of a diagonal block's weight: in every dtype, times the root of D

Library = Literal["cudnn", "xla"]  # the latter for tests of the algebra where there is no GPU


def widest_head() -> int:
    """The widest head that cuDNN takes on the default device; 0 where it does not run."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "")).split(".")[0]
    if device.platform != "gpu" or not capability.isdecimal():  # AMD's are names
        return 0
    return {8: 128}.get(int(capability), 256 if int(capability) > 8 else 0)


def runs(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether attention of such heads goes through cuDNN on the default device."""
    width = -(-(head_dim + 1) // _MULTIPLE) * _MULTIPLE
    return jnp.dtype(dtype) in _DTYPES and width <= widest_head()


def stripe_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    rel_h: Float[Array, "B N H Sh"] | None,
    rel_w: Float[Array, "B N H Sw"] | None,
    key_rows: Index,
    key_cols: Index,
    *,
    layout: BlockLayout,
    block_order: Int[Array, "B num_kv_blocks"] | None = None,
) -> Float[Array, "B N H D"]:
    """`reference.stripe_attention`, with the same arguments."""
    rows, cols = reference.head_major(key_rows), reference.head_major(key_cols)
    diagonal = None
    if layout.diagonal and not layout.is_dense:
        by_head: tuple[Any, Any, Any, Any, Any]
        by_head = jax.tree.map(reference.swap, (q, k, v, rel_h, rel_w))
        diagonal = reference.attend_diagonal(*by_head, rows, cols, layout, block_order)
        if not layout.num_bar_blocks:
            return reference.swap(diagonal.normalised(q.dtype))
    bar = reference.bar_positions(layout, block_order)
    rows, cols = (reference.take(x, bar, axis=2) for x in (rows, cols))
    return attend(q, _keys(k, bar), _keys(v, bar), rel_h, rel_w, rows, cols, diagonal=diagonal)


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
    """`reference.window_attention`, with the same arguments."""
    batch, height, width = q.shape[:3]
    q, k, v, rel_h, rel_w = jax.tree.map(
        lambda x: reference.window_partition(x, window_size), (q, k, v, rel_h, rel_w)
    )
    keys = reference.window_keys(order, layout)
    if keys is not None:
        k, v = _keys(k, keys), _keys(v, keys)
    out = attend(q, k, v, rel_h, rel_w, *reference.window_places(keys, window_size))
    return reference.window_unpartition(out, window_size, (batch, height, width))


def attend(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K H D"],
    v: Float[Array, "B K H D"],
    rel_h: Float[Array, "B Q H Sh"] | None,
    rel_w: Float[Array, "B Q H Sw"] | None,
    rows: Index,
    cols: Index,
    *,
    diagonal: Partial | None = None,
    widest: int | None = None,
    library: Library = "cudnn",
) -> Float[Array, "B Q H D"]:
    """Attention of all queries to the same keys and, if given, of each to its diagonal block.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        rel_h: What every query adds for every key row; None, like rel_w, is no position bias.
        rel_w: The same for columns.
        rows: Every key's row, [B or 1, H or 1, K].
        cols: Every key's column.
        diagonal: Attention to the diagonal blocks, with axes [B, H, Q].
        widest: Head that the library takes; None is `widest_head`.
        library: What attends.
    """
    head_dim, root = q.shape[-1], math.sqrt(q.shape[-1])
    ours, theirs = (
        [],
        [],
    )  # columns behind those of q and of k, whose products are logits times D^.5
    shift = jnp.float32(0)
    if rel_h is not None and rel_w is not None:
        # A key has one row: without the first row's column, all logits of a query are shifted. So
        # 64 columns of a head and a grid of 64 x 64 take 192, the next width that is fast.
        shift = rel_h[..., :1].astype(jnp.float32)
        ours = [(rel_h - shift)[..., 1:] * root, rel_w.astype(jnp.float32) * root]
        unit = [jax.nn.one_hot(x, rel.shape[-1]) for x, rel in ((rows, rel_h), (cols, rel_w))]
        theirs = [unit[0][..., 1:], unit[1]]
        theirs = [jnp.broadcast_to(x.swapaxes(1, 2), (*k.shape[:3], x.shape[-1])) for x in theirs]
    if diagonal is not None:
        weight = diagonal.maximum + jnp.log(diagonal.total)
        weight = jax.lax.stop_gradient(weight).swapaxes(1, 2) - shift
        given = jnp.clip(weight, -_LARGEST_LOGIT, _LARGEST_LOGIT) * root
        ours = [*ours, given]
        theirs = [*theirs, jnp.zeros((*k.shape[:3], 1))]
        # Its row of k is zero; so is that of v but for the column behind the values. Or two such
        # keys: the gradient of a written bias wants an even number.
        copies = 2 - k.shape[1] % 2
        theirs = [jnp.pad(x, ((0, 0), (0, copies), (0, 0), (0, 0))) for x in theirs]
        theirs[-1] = theirs[-1].at[:, -copies:].set(1)
        k, v = (jnp.pad(x, ((0, 0), (0, copies), (0, 0), (0, x is v))) for x in (k, v))
        v = v.at[:, -copies:, :, -1].set(1)
        shift = shift + math.log(copies)
    ours, theirs = (_joined(columns, q.dtype) for columns in (ours, theirs))
    out = _attend(q, k, v, ours, theirs, root, widest or widest_head(), library)
    if diagonal is None:
        return out[..., :head_dim]
    assert ours is not None
    exact = ours[..., -1:].astype(jnp.float32) / root + shift  # the logit as it was rounded
    maximum, total, own = (
        x.swapaxes(1, 2) for x in (diagonal.maximum, diagonal.total, diagonal.out)
    )
    scale = jnp.where(maximum <= reference.MASKED, 0.0, jnp.exp(maximum - exact))
    x = out[..., head_dim : head_dim + 1].astype(jnp.float32)
    values = out[..., :head_dim].astype(jnp.float32)
    return ((values + x * scale * own) / (1 - x + x * scale * total)).astype(q.dtype)


def _keys(x: Array, index: Index | slice) -> Array:
    """Keys [B, K, H, C] of x [B, N, H, C] by a slice or an index [B or 1, H or 1, K]."""
    if isinstance(index, slice):
        return x[:, index]
    if isinstance(index, np.ndarray) and index.shape[:2] == (1, 1):
        return jnp.take(x, index[0, 0], axis=1)
    return jnp.take_along_axis(x, index.swapaxes(1, 2)[..., None], axis=1)


def _attend(
    q: Array,
    k: Array,
    v: Array,
    ours: Array | None,
    theirs: Array | None,
    root: float,
    widest: int,
    library: Library,
) -> Array:
    """`softmax((q k^T + ours theirs^T) / root) v`, [B, Q, H, D or more]."""
    bias = None
    if ours is not None and theirs is not None:
        if q.shape[-1] + ours.shape[-1] <= widest:
            q, k = jnp.concatenate([q, ours], -1), jnp.concatenate([k, theirs], -1)
        else:
            bias = ours, theirs
    width = max(q.shape[-1], v.shape[-1])
    width += -width % _MULTIPLE
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),)) for x in (q, k, v))
    options: dict[str, Any] = dict(scale=1 / root, implementation=library)
    if bias is None:
        return jax.nn.dot_product_attention(q, k, v, **options)

    def attend_to_image(i: int) -> Array:
        one = slice(i, i + 1)
        written = reference.einsum("bqhe,bkhe->bhqk", *(x[one] for x in bias)) / root
        operands = (q[one], k[one], v[one], written.astype(q.dtype))
        return jax.nn.dot_product_attention(*operands, **options)

    # One after the other, so that the bias of one image exists at a time.
    return jnp.concatenate([attend_to_image(i) for i in range(len(q))])


def _joined(columns: list[Array], dtype: DTypeLike) -> Array | None:
    return jnp.concatenate([x.astype(dtype) for x in columns], -1) if columns else None
