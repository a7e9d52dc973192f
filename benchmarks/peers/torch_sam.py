"""SAM's image encoder in PyTorch, module by module as Meta's code has it, with three attentions.

`eager` forms all logits and adds the decomposed position bias to them, as Meta's code does; `sdpa`
hands the same bias, materialised, to `scaled_dot_product_attention`; `flex` computes global
attention with FlexAttention, the bias in its score_mod, and windows as `sdpa` does. Windows are cut
from a padded map, padding included in QKV, in all three. Parameter names are those of Meta's
checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.peers.torch_sparse import Plan, Static, permute
from sparsesam_jax.config import ImageEncoderConfig, Sparsity

EPSILON = 1e-6


def relative_table(rel_pos: Tensor, side: int) -> Tensor:
    """`table[q, k] = rel_pos[q - k + side - 1]`, [side, side, D]."""
    place = torch.arange(side, device=rel_pos.device)
    return rel_pos[place[:, None] - place[None] + side - 1]


def relative_position(
    q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The query side of the bias of q [..., N, D] on a grid: [..., N, Gh] and [..., N, Gw]."""
    height, width = grid
    maps = q.reshape(-1, height, width, q.shape[-1])
    rel_h = torch.einsum("byxd,yid->byxi", maps, relative_table(rel_pos_h, height))
    rel_w = torch.einsum("byxd,xjd->byxj", maps, relative_table(rel_pos_w, width))
    lead = q.shape[:-1]
    return rel_h.reshape(*lead, height), rel_w.reshape(*lead, width)


def attend(
    attention: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    sequence: Tensor | None = None,
    mask: Any = None,
) -> Tensor:
    """Attention of q, k, v [B, H, N, D] in raster order, with the query side of their bias.

    Args:
        attention: eager, sdpa, flex or fast (segment-anything-fast's kernel).
        q: Queries.
        k: Keys.
        v: Values.
        rel_h: Bias of every key row, [B, H, N, Gh].
        rel_w: Bias of every key column, [B, H, N, Gw].
        sequence: The order [B, N] that flex's mask is of; None is raster order. Of sdpa, the only
            keys [B, K]; None is all.
        mask: flex's block mask; None is dense.
    """
    if attention == "fast":
        from segment_anything_fast import flash_4  # pyright: ignore[reportMissingImports]

        return flash_4._attention_rel_h_rel_w(q, k, v, rel_h[..., None], rel_w[..., None, :])
    if attention == "flex":
        if sequence is None:
            sequence = torch.arange(k.shape[2], device=k.device).expand(len(k), -1)
        if mask is None:
            return _flex_attention(q, k, v, rel_h, rel_w, sequence, None)
        q, k, v, rel_h, rel_w = (permute(x, sequence) for x in (q, k, v, rel_h, rel_w))
        return permute(_flex_attention(q, k, v, rel_h, rel_w, sequence, mask), sequence.argsort(-1))
    if attention == "eager":
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        logits = logits.unflatten(-1, (rel_h.shape[-1], rel_w.shape[-1]))
        logits = logits + rel_h[..., :, None] + rel_w[..., None, :]
        return logits.flatten(-2).softmax(-1) @ v
    if sequence is None:
        bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    else:
        k, v, width = permute(k, sequence), permute(v, sequence), rel_w.shape[-1]
        bias = _of_keys(rel_h, sequence // width) + _of_keys(rel_w, sequence % width)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _of_keys(rel: Tensor, place: Tensor) -> Tensor:
    return rel.gather(-1, place[:, None, None].expand(*rel.shape[:-1], -1))


def _flex_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, sequence: Tensor, mask: Any
) -> Tensor:
    """FlexAttention over a block mask (None: all) of keys in the order of a sequence."""
    from torch.nn.attention import flex_attention as flex

    width = rel_w.shape[-1]
    rows, cols = sequence // width, sequence % width

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, key: Tensor) -> Tensor:
        return score + rel_h[b, h, q_index, rows[b, key]] + rel_w[b, h, q_index, cols[b, key]]

    options: Any = {}
    if mask is not None:  # tiles of the kernel must not be larger than blocks of the mask
        options["kernel_options"] = {"BLOCK_M": 64, "BLOCK_N": 64}
    return flex.flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, **options)


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of a map, [B, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + EPSILON)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Attention(nn.Module):
    """Multi-head attention over a map or over windows, [B, Gh, Gw, d]."""

    def __init__(self, config: ImageEncoderConfig, index: int, attention: str):
        super().__init__()
        d, side = config.embed_dim, config.window_size
        if config.is_global(index):
            side = config.grid_size
        self.index, self.num_heads, self.attention = index, config.num_heads, attention
        self.is_global = config.is_global(index)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, config.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, config.head_dim))

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """Attend and project."""
        batch, height, width, d = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        rel = relative_position(q, self.rel_pos_h, self.rel_pos_w, (height, width))
        sequence, mask = plan.attention(self.index, k)
        name = self.attention if self.is_global or self.attention == "eager" else "sdpa"
        out = attend(name, q, k, v, *rel, sequence=sequence, mask=mask)
        out = out.transpose(1, 2).reshape(batch, height, width, d)
        return self.proj(out)


class MLPBlock(nn.Module):
    """The transformer's MLP."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(d, hidden)
        self.lin2 = nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers."""
        return self.lin2(F.gelu(self.lin1(x)))


class Block(nn.Module):
    """Attention, windowed or global, and the MLP, on all tokens or on the routed ones."""

    def __init__(self, config: ImageEncoderConfig, index: int, attention: str):
        super().__init__()
        d = config.embed_dim
        self.index = index
        self.window_size = 0 if config.is_global(index) else config.window_size
        self.norm1 = nn.LayerNorm(d, eps=EPSILON)
        self.attn = Attention(config, index, attention)
        self.norm2 = nn.LayerNorm(d, eps=EPSILON)
        self.mlp = MLPBlock(d, config.mlp_dim)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """Apply the block."""
        batch, height, width, d = x.shape
        y = self.norm1(x)
        if self.window_size:
            windows = window_partition(y, self.window_size)
            y = window_unpartition(self.attn(windows, plan), self.window_size, (height, width))
        else:
            y = self.attn(y, plan)
        x = x + y
        routed = plan.routed_tokens(self.index)
        if routed is None:
            return x + self.mlp(self.norm2(x))
        tokens = x.reshape(batch, -1, d)
        index = routed[..., None].expand(-1, -1, d)
        update = self.mlp(self.norm2(tokens.gather(1, index)))
        return tokens.scatter_add(1, index, update).reshape(x.shape)


class PatchEmbed(nn.Module):
    """Patches to tokens, [B, 3, height, width] -> [B, Gh, Gw, d]."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Project each patch."""
        return self.proj(x).permute(0, 2, 3, 1)


class ImageEncoder(nn.Module):
    """The encoder; a sparsity needs `flex`."""

    def __init__(
        self, config: ImageEncoderConfig, attention: str, sparsity: Sparsity | None = None
    ):
        super().__init__()
        d, grid, out = config.embed_dim, config.grid_size, config.out_chans
        self.config = config
        self.static = Static(config, sparsity)
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, d))
        self.blocks = nn.ModuleList(Block(config, i, attention) for i in range(config.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(d, out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [B, C, Gh, Gw] of normalised pixels [B, 3, height, width]."""
        x = self.patch_embed(pixels) + self.pos_embed
        plan = Plan(self.static)
        for block in self.blocks:
            x = block(x, plan)
        return self.neck(x.permute(0, 3, 1, 2))


def window_partition(x: Tensor, side: int) -> Tensor:
    """Cut a map into windows [B W, side, side, d], zero-padded past its bottom and right edge."""
    batch, height, width, d = x.shape
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    down, across = x.shape[1] // side, x.shape[2] // side
    x = x.view(batch, down, side, across, side, d)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, d)


def window_unpartition(windows: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """Put windows together to a map, without the padding."""
    height, width = grid
    down, across = -(-height // side), -(-width // side)
    x = windows.view(-1, down, across, side, side, windows.shape[-1])
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, down * side, across * side, windows.shape[-1])
    return x[:, :height, :width]
