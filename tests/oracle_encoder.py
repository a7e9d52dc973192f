"""NumPy oracle of SAM's image encoder with SparseSAM: float64, brute force, slow on purpose.

One image at a time; every attention is a full [N, N] matrix under a boolean mask. Shares no code
with the library. SciPy gives the error function of the exact GELU.

N tokens, d embedding dim, h heads, D head dim, G = N // 4 full groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from oracle import (
    Array,
    attention_sequence,
    curve_order,
    global_mask,
    group_scores,
    raster_mask,
    routed_tokens,
    window_mask,
)
from scipy.special import erf

from sparsesam_jax.config import ImageEncoderConfig, Sparsity

Params = Mapping[str, Array]
LAYER_NORM_EPS = 1e-6


def linear(x: Array, params: Params, name: str) -> Array:
    """x W^T + b."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def layer_norm(x: Array, params: Params, name: str) -> Array:
    """LayerNorm over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt(variance + LAYER_NORM_EPS)
    return normal * params[f"{name}.weight"] + params[f"{name}.bias"]


def mlp(x: Array, params: Params, name: str) -> Array:
    """Two linear layers around the exact GELU."""
    hidden = linear(x, params, f"{name}.lin1")
    hidden = 0.5 * hidden * (1.0 + erf(hidden / math.sqrt(2.0)))
    return linear(hidden, params, f"{name}.lin2")


def conv2d(x: Array, weight: Array, padding: int) -> Array:
    """Stride-1 convolution of x [H, W, C] with weight [out, in, kh, kw], zero padded."""
    height, width, _ = x.shape
    padded = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    out = np.zeros((height, width, weight.shape[0]))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            out += padded[i : i + height, j : j + width] @ weight[:, :, i, j].T
    return out


def patch_embed(pixels: Array, params: Params, name: str, patch_size: int) -> Array:
    """One linear map of every patch: [H, W, 3] -> [H / patch, W / patch, d]."""
    height, width = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    weight = params[f"{name}.weight"]  # [d, 3, patch, patch]
    flat = weight.transpose(0, 2, 3, 1).reshape(weight.shape[0], -1)
    out = np.empty((height, width, weight.shape[0]))
    for row in range(height):
        for col in range(width):
            rows = slice(row * patch_size, (row + 1) * patch_size)
            cols = slice(col * patch_size, (col + 1) * patch_size)
            out[row, col] = flat @ pixels[rows, cols].reshape(-1)
    return out + params[f"{name}.bias"]


def split_windows(x: Array, size: int) -> Array:
    """[H, W, C] -> [windows in raster order, size * size, C], zeros past the border."""
    height, width, channels = x.shape
    windows = []
    for top in range(0, height, size):
        for left in range(0, width, size):
            window = np.zeros((size, size, channels))
            part = x[top : top + size, left : left + size]
            window[: part.shape[0], : part.shape[1]] = part
            windows.append(window.reshape(size * size, channels))
    return np.stack(windows)


def join_windows(windows: Array, size: int, height: int, width: int) -> Array:
    """The inverse of `split_windows`: what lies past the border is dropped."""
    out = np.empty((height, width, windows.shape[-1]))
    index = 0
    for top in range(0, height, size):
        for left in range(0, width, size):
            part = out[top : top + size, left : left + size]
            window = windows[index].reshape(size, size, -1)
            part[...] = window[: part.shape[0], : part.shape[1]]
            index += 1
    return out


def project_qkv(x: Array, params: Params, name: str, num_heads: int) -> tuple[Array, Array, Array]:
    """q, k, v [h, N, D] of tokens [N, d]."""
    qkv = linear(x, params, f"{name}.qkv").reshape(len(x), 3, num_heads, -1)
    q, k, v = qkv.transpose(1, 2, 0, 3)
    return q, k, v


def position_bias(q: Array, rel_pos_h: Array, rel_pos_w: Array, height: int, width: int) -> Array:
    """bias[q, k] = q . R_h[row(q) - row(k) + H - 1] + q . R_w[col(q) - col(k) + W - 1], [N, N]."""
    grid = q.reshape(height, width, -1)
    by_row, by_col = np.empty((height, width, height)), np.empty((height, width, width))
    for row in range(height):
        by_row[row] = grid[row] @ rel_pos_h[row - np.arange(height) + height - 1].T
    for col in range(width):
        by_col[:, col] = grid[:, col] @ rel_pos_w[col - np.arange(width) + width - 1].T
    return (by_row[..., :, None] + by_col[..., None, :]).reshape(len(q), len(q))


def masked_attention(q: Array, k: Array, v: Array, bias: Array, mask: Array) -> Array:
    """softmax over the mask's keys of q.k / sqrt(D) + bias, times v: one head, raster, [N, D]."""
    out = np.empty_like(q)
    for start in range(0, len(q), 256):  # whole [N, N] matrices of float64 are slow to allocate
        rows = slice(start, start + 256)
        logits = np.where(mask[rows], q[rows] @ k.T / math.sqrt(q.shape[-1]) + bias[rows], -np.inf)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[rows] = weights @ v / weights.sum(axis=1, keepdims=True)
    return out


class Encoded(NamedTuple):
    """What `encode` returns: every block's output [Gh, Gw, d] and the features [Gh, Gw, out_chans].

    `scores` are those that ranked, by kind of grid ("windowed", "global"): [windows or 1, heads or
    1, G].
    """

    blocks: list[Array]
    features: Array
    scores: dict[str, Array]


def encode(
    params: Params,
    config: ImageEncoderConfig,
    pixels: Array,
    sparsity: Sparsity | None = None,
    *,
    random_orders: Mapping[str, Array] | None = None,
    random_scores: Mapping[str, Array] | None = None,
) -> Encoded:
    """Encodes one image.

    Args:
        params: Meta's keys with their `image_encoder.` prefix, arrays in PyTorch's layouts.
        config: Shape of the encoder.
        pixels: Normalised, [image_size, image_size, 3].
        sparsity: None is SAM.
        random_orders: The permutation of each kind of grid ("windowed", "global") for the random
            curve.
        random_scores: Each kind's scores for the random importance, broadcast to [windows or 1,
            heads or 1, G].
    """
    params = {name: np.asarray(array, np.float64) for name, array in params.items()}
    x = patch_embed(pixels, params, "image_encoder.patch_embed.proj", config.patch_size)
    x = x + params["image_encoder.pos_embed"][0]
    height, width, _ = x.shape
    if sparsity is None:
        sparsity = Sparsity(1.0, importance="uniform")

    orders: dict[str, Array] = {}
    for kind, rows, cols in (
        ("windowed", config.window_size, config.window_size),
        ("global", height, width),
    ):
        permutation = random_orders[kind] if random_orders is not None else None
        orders[kind] = curve_order(sparsity.curve, rows, cols, permutation)
    scores: dict[str, Array] = {}
    blocks = []

    for index in range(config.depth):
        name = f"image_encoder.blocks.{index}"
        kind = "global" if config.is_global(index) else "windowed"
        attention_density, mlp_density = sparsity.block_density(index, config.depth)

        normal = layer_norm(x, params, f"{name}.norm1")
        if kind == "global":
            size_h, size_w = height, width
            grids, inputs = normal.reshape(1, height * width, -1), x.reshape(1, height * width, -1)
        else:
            size_h = size_w = config.window_size
            grids, inputs = split_windows(normal, size_h), split_windows(x, size_h)
        qkv = [project_qkv(grid, params, f"{name}.attn", config.num_heads) for grid in grids]

        if kind not in scores:
            scores[kind] = _rank_scores(
                sparsity, orders[kind], inputs, [k for _, k, _ in qkv], size_h, size_w
            )
            if sparsity.importance == "random":
                assert random_scores is not None
                scores[kind] = np.broadcast_to(random_scores[kind], scores[kind].shape)

        layout = global_mask if kind == "global" else window_mask
        mask = layout(size_h * size_w, attention_density, sparsity.block_size)
        outputs = []
        for (q, k, v), grid_scores in zip(qkv, scores[kind], strict=True):
            heads = []
            for head in range(config.num_heads):
                sequence = attention_sequence(
                    orders[kind],
                    grid_scores[head % len(grid_scores)],
                    layout=sparsity.layout,
                    ranking=sparsity.ranking,
                    block_size=sparsity.block_size,
                )
                bias = position_bias(
                    q[head],
                    params[f"{name}.attn.rel_pos_h"],
                    params[f"{name}.attn.rel_pos_w"],
                    size_h,
                    size_w,
                )
                heads.append(
                    masked_attention(q[head], k[head], v[head], bias, raster_mask(mask, sequence))
                )
            outputs.append(linear(np.concatenate(heads, axis=-1), params, f"{name}.attn.proj"))
        if kind == "global":
            attended = outputs[0].reshape(height, width, -1)
        else:
            attended = join_windows(np.stack(outputs), config.window_size, height, width)
        x = x + attended

        tokens = x.reshape(height * width, -1).copy()
        mlp_start = 0 if sparsity.mlp_start is None else sparsity.mlp_start
        if kind == "windowed" and "global" in scores and index >= mlp_start:
            chosen = routed_tokens(orders["global"], scores["global"][0], mlp_density)
        else:
            chosen = np.arange(height * width)
        normal = layer_norm(tokens[chosen], params, f"{name}.norm2")
        tokens[chosen] += mlp(normal, params, f"{name}.mlp")
        x = tokens.reshape(height, width, -1)
        blocks.append(x)

    return Encoded(blocks, _neck(x, params), scores)


def _rank_scores(
    sparsity: Sparsity,
    order: Array,
    inputs: Array,
    keys: list[Array],
    height: int,
    width: int,
) -> Array:
    """Scores [grids, heads or 1, G] from block inputs [grids, N, d] or keys, each [h, N, D]."""
    importance = "uniform" if sparsity.importance == "random" else sparsity.importance

    def score(features: Array) -> Array:
        return group_scores(importance, features, order, height, width)

    if sparsity.features == "input":
        return np.array([[score(grid)] for grid in inputs])
    if sparsity.per_head:
        return np.array([[score(head) for head in k] for k in keys])
    return np.array([[score(np.concatenate(list(k), axis=-1))] for k in keys])


def _neck(x: Array, params: Params) -> Array:
    name = "image_encoder.neck"
    x = conv2d(x, params[f"{name}.0.weight"], padding=0)
    x = layer_norm(x, params, f"{name}.1")
    x = conv2d(x, params[f"{name}.2.weight"], padding=1)
    return layer_norm(x, params, f"{name}.3")


def random_params(config: ImageEncoderConfig, seed: int) -> dict[str, Array]:
    """Random float32 parameters under Meta's keys, scaled so that every term matters."""
    rng = np.random.default_rng(seed)
    params: dict[str, Array] = {}

    def put(name: str, scale: float, *shape: int, mean: float = 0.0) -> None:
        values = mean + scale * rng.standard_normal(shape)
        params[f"image_encoder.{name}"] = values.astype(np.float32)

    def put_linear(name: str, fan_in: int, fan_out: int) -> None:
        put(f"{name}.weight", fan_in**-0.5, fan_out, fan_in)
        put(f"{name}.bias", 0.3, fan_out)

    def put_norm(name: str, width: int) -> None:
        put(f"{name}.weight", 0.2, width, mean=1.0)
        put(f"{name}.bias", 0.2, width)

    d, patch = config.embed_dim, config.patch_size
    put("patch_embed.proj.weight", (3 * patch * patch) ** -0.5, d, 3, patch, patch)
    put("patch_embed.proj.bias", 0.3, d)
    put("pos_embed", 0.5, 1, config.grid_size, config.grid_size, d)
    for index in range(config.depth):
        name = f"blocks.{index}"
        side = config.grid_size if config.is_global(index) else config.window_size
        put_norm(f"{name}.norm1", d)
        put_linear(f"{name}.attn.qkv", d, 3 * d)
        put_linear(f"{name}.attn.proj", d, d)
        put(f"{name}.attn.rel_pos_h", config.head_dim**-0.5, 2 * side - 1, config.head_dim)
        put(f"{name}.attn.rel_pos_w", config.head_dim**-0.5, 2 * side - 1, config.head_dim)
        put_norm(f"{name}.norm2", d)
        put_linear(f"{name}.mlp.lin1", d, config.mlp_dim)
        put_linear(f"{name}.mlp.lin2", config.mlp_dim, d)
    put("neck.0.weight", d**-0.5, config.out_chans, d, 1, 1)
    put_norm("neck.1", config.out_chans)
    put("neck.2.weight", (9 * config.out_chans) ** -0.5, config.out_chans, config.out_chans, 3, 3)
    put_norm("neck.3", config.out_chans)
    return params
