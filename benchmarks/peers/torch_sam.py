"""SAM's image encoder by PyTorch: transformers' modules, with attention and sparsity of our own.

`eager` forms all logits and adds the decomposed position bias to them, as Meta's code does; `sdpa`
hands the same bias, materialised, to `scaled_dot_product_attention`; `flex` computes global
attention with FlexAttention, the bias in its score_mod, and windows as `sdpa` does. Windows are cut
from a padded map, padding included in QKV, in all three.

Sparse is `flex` alone: the plan is `sparsesam_jax.sparsity.plan`'s; what depends on the images is
ranked here, for sparsities that rank by the sobel importance of the keys, shared by the heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.run.jobs import NotRunError
from pallas_kernels.block_layout import BlockLayout
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.sparsity.orders import GROUP, curve_order
from sparsesam_jax.sparsity.plan import Rankings, encoder_plan

Ranked = dict[bool, tuple[Tensor, Tensor]]  # of a forward, by whether attention is global


# An operation of its own: torch.compile (2.11) refuses to hand FlexAttention a gather that it has
# not materialised.
@torch.library.custom_op("sparsesam::permute", mutates_args=())
def permute(x: Tensor, sequence: Tensor) -> Tensor:
    """The tokens of x [B, H, N, C] in the order of a sequence [B, M]."""
    return x.gather(2, sequence[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


@permute.register_fake
def _(x: Tensor, sequence: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], sequence.shape[1], x.shape[3])


def sobel(maps: Tensor) -> Tensor:
    """Magnitude of the gradient of [B, Gh, Gw, C], mean over channels; the edge replicated."""
    x = F.pad(maps.float().permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")
    down = x[:, :, 2:] - x[:, :, :-2]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    across = x[..., 2:] - x[..., :-2]
    across = across[:, :, :-2] + 2 * across[:, :, 1:-1] + across[:, :, 2:]
    return torch.sqrt(down**2 + across**2).mean(1)


def stripes(groups: Tensor, layout: str) -> Tensor:
    """Sequence [..., N] of groups [..., G, 4]: interleaved or one after the other."""
    return (groups.transpose(-1, -2) if layout == "interleave" else groups).flatten(-2)


class Plan:
    """What the blocks compute on a device; all of it without a sparsity.

    Raises:
        NotRunError: The sparsity is not supported, or its curve leaves tokens over.
    """

    def __init__(self, config: ImageEncoderConfig, sparsity: Sparsity | None, device: Any):
        self.sparsity, self.groups, side = sparsity, {}, config.grid_size
        plans = encoder_plan(config, sparsity, (side, side), "xla")
        self.is_global = [plan.block.is_global for plan in plans]
        self.num_routed = [plan.num_routed for plan in plans]
        self.bar_len = [None if plan.layout.is_dense else plan.layout.bar_len for plan in plans]
        self.sequences: list[Tensor | None] = [None] * len(plans)  # where no ranking makes them
        self.masks: list[Any] = [None] * len(plans)  # of sparse global attention
        if sparsity is None:
            return
        if (sparsity.importance, sparsity.features, sparsity.per_head) != ("sobel", "keys", False):
            told = f"the PyTorch peer ranks by the keys' sobel, heads shared; {sparsity}"
            raise NotRunError(told)
        window = config.window_size
        if side * side % sparsity.block_size or window * window % GROUP or side * side % GROUP:
            raise NotRunError(f"the PyTorch peer needs whole groups and blocks, side {side}")
        for is_global, edge in ((True, side), (False, window)):
            order = curve_order(sparsity.curve, edge, edge, sparsity.seed).astype(np.int64)
            self.groups[is_global] = torch.from_numpy(order.reshape(-1, GROUP)).to(device)
        masks = {}
        for index, plan in enumerate(plans):
            if sparsity.ranking not in ("group", "block"):
                sequence = plan.attention_order(Rankings())[0]
                if sequence is not None:
                    self.sequences[index] = torch.from_numpy(np.int64(sequence)).to(device)
            if plan.block.is_global and not plan.layout.is_dense:
                if plan.layout not in masks:
                    masks[plan.layout] = block_mask(plan.layout, device)
                self.masks[index] = masks[plan.layout]

    def attention(self, index: int, k: Tensor, ranked: Ranked) -> tuple[Tensor | None, Any]:
        """Of global attention its sequence [B, N] and block mask, of windows their bar's keys.

        Dense is None. The first block that needs a ranking makes it.
        """
        is_global, bar_len = self.is_global[index], self.bar_len[index]
        fixed = self.sequences[index]
        needed = self.sparsity is not None and (is_global or bar_len is not None)
        if needed and is_global not in ranked and (is_global or fixed is None):
            ranked[is_global] = self._rank(k, is_global)
        if bar_len is None:
            return None, None
        sequence = ranked[is_global][0] if fixed is None else fixed.expand(len(k), -1)
        return (sequence if is_global else sequence[:, :bar_len]), self.masks[index]

    def routed_tokens(self, index: int, ranked: Ranked) -> Tensor | None:
        """Tokens [B, M] that the block's MLP runs on, in memory order; None for all."""
        count = self.num_routed[index]
        if count is None or True not in ranked:
            return None
        return ranked[True][1][:, :count].sort(-1).values

    def _rank(self, k: Tensor, is_global: bool) -> tuple[Tensor, Tensor]:
        """Attention's ranked sequence [B, N], and all tokens by the importance of their groups.

        The keys [B, H, N, D] are those of a square map.
        """
        assert self.sparsity is not None
        groups, batch, side = self.groups[is_global], len(k), round(k.shape[2] ** 0.5)
        maps = k.transpose(1, 2).reshape(batch, side, side, -1)
        scores = sobel(maps).reshape(batch, -1)[:, groups].mean(-1)
        ranked = groups[scores.argsort(dim=-1, descending=True, stable=True)]  # [B, G, 4]
        tokens = ranked.flatten(1)
        if self.sparsity.ranking != "block":
            return stripes(ranked, self.sparsity.layout), tokens
        sequence, size = stripes(groups, self.sparsity.layout), self.sparsity.block_size
        full = len(sequence) // size * size
        of_token = torch.empty_like(sequence)
        of_token[groups.flatten()] = torch.arange(len(sequence), device=k.device) // GROUP
        blocks = sequence[:full].reshape(-1, size)
        mean = scores[:, of_token[blocks]].mean(-1)  # [B, blocks]
        order = mean.argsort(dim=-1, descending=True, stable=True)
        tail = sequence[full:].expand(batch, -1)
        return torch.cat([blocks[order].flatten(1), tail], -1), tokens


def block_mask(layout: BlockLayout, device: torch.device | str) -> Any:
    """A layout as FlexAttention's BlockMask: all its blocks are full."""
    from torch.nn.attention.flex_attention import BlockMask

    padded = np.zeros((layout.num_q_blocks, layout.num_kv_blocks), np.int32)
    indices = layout.kv_indices
    padded[:, : indices.shape[1]] = np.maximum(indices, 0)
    count, index = (
        torch.from_numpy(x).to(device)[None, None] for x in (layout.kv_num_blocks, padded)
    )

    def computed(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        own = q // layout.block_q == key // layout.block_kv
        return (key < layout.bar_len) | (own if layout.diagonal else own & False)

    return BlockMask.from_kv_blocks(
        *(torch.zeros_like(count), torch.zeros_like(index), count, index),
        BLOCK_SIZE=(layout.block_q, layout.block_kv),
        mask_mod=computed,  # what runs uncompiled knows no blocks
        seq_lengths=(layout.seq_len, layout.seq_len),
    )


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
    if sequence is None:
        bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    else:
        k, v, width = permute(k, sequence), permute(v, sequence), rel_w.shape[-1]
        bias = _of_keys(rel_h, sequence // width) + _of_keys(rel_w, sequence % width)
    if attention == "eager":
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
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


class ImageEncoder(nn.Module):
    """transformers' encoder with one of the attentions; a sparsity needs `flex`.

    Args:
        encoder: transformers' own, whose modules are used.
        attention: eager, sdpa or flex.
        plan: What its blocks compute.
    """

    def __init__(self, encoder: Any, attention: str, plan: Plan):
        super().__init__()
        self.encoder, self.layers, self.attention = encoder, encoder.layers, attention
        self.plan = plan

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [B, C, Gh, Gw] of normalised pixels [B, 3, height, width]."""
        x, ranked = self.encoder.patch_embed(pixels) + self.encoder.pos_embed, {}
        for index, layer in enumerate(self.layers):
            y, size = layer.layer_norm1(x), layer.window_size
            if size:
                windows, padded = layer.window_partition(y, size)
                y = self._attend(index, windows, ranked)
                y = layer.window_unpartition(y, size, padded, x.shape[1:3])
            else:
                y = self._attend(index, y, ranked)
            x = x + y
            routed = self.plan.routed_tokens(index, ranked)
            if routed is None:
                x = x + layer.mlp(layer.layer_norm2(x))
            else:
                tokens = x.flatten(1, 2)
                place = routed[..., None].expand(-1, -1, tokens.shape[-1])
                update = layer.mlp(layer.layer_norm2(tokens.gather(1, place)))
                x = tokens.scatter_add(1, place, update).reshape(x.shape)
        return self.encoder.neck(x)

    def _attend(self, index: int, x: Tensor, ranked: Ranked) -> Tensor:
        """A block's attention and projection over a map or over windows, [B, Gh, Gw, d]."""
        own, (batch, height, width, _) = self.layers[index].attn, x.shape
        qkv = own.qkv(x).reshape(batch, height * width, 3, own.num_attention_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        maps, lead = q.reshape(-1, height, width, q.shape[-1]), q.shape[:-1]
        rel_h = torch.einsum("byxd,yid->byxi", maps, _table(own.rel_pos_h, height))
        rel_w = torch.einsum("byxd,xjd->byxj", maps, _table(own.rel_pos_w, width))
        rel = rel_h.reshape(*lead, height), rel_w.reshape(*lead, width)
        sequence, mask = self.plan.attention(index, k, ranked)
        windows = self.layers[index].window_size > 0 and self.attention == "flex"
        name = "sdpa" if windows else self.attention
        out = attend(name, q, k, v, *rel, sequence=sequence, mask=mask)
        return own.proj(out.transpose(1, 2).reshape(x.shape))


def _table(rel_pos: Tensor, side: int) -> Tensor:
    """`table[q, k] = rel_pos[q - k + side - 1]`, [side, side, D]."""
    place = torch.arange(side, device=rel_pos.device)
    return rel_pos[place[:, None] - place[None] + side - 1]
