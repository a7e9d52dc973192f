"""SparseSAM's rankings, sequences and block masks in PyTorch, for the FlexAttention peer.

The same algorithm as `sparsesam_jax.sparsity.plan`, for sparsities that rank by the sobel
importance of the keys, shared by the heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.run.process import NotRunError
from pallas_kernels.block_layout import BlockLayout
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.sparsity.orders import GROUP, curve_order, spread_sequence
from sparsesam_jax.sparsity.plan import attention_layout, num_routed_tokens


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


class Static:
    """What does not depend on the images; dense without a sparsity.

    Attributes, one entry a block: `layouts` of attention, `sequences` where no ranking makes them,
    block `masks` of sparse global attention, and how many tokens are `routed`.

    Raises:
        NotRunError: The sparsity is not supported, or its curve leaves tokens over.
    """

    def __init__(self, config: ImageEncoderConfig, sparsity: Sparsity | None):
        self.sparsity, self.groups = sparsity, {}
        side, window, blocks = config.grid_size, config.window_size, range(config.depth)
        self.is_global = [config.is_global(i) for i in blocks]
        self.layouts = [attention_layout(config, sparsity, i, (side, side)) for i in blocks]
        self.routed = [num_routed_tokens(config, sparsity, i, (side, side)) for i in blocks]
        self.sequences: list[Tensor | None] = [None] * config.depth
        self.masks: list[Any] = [None] * config.depth
        if sparsity is None:
            return
        if (sparsity.importance, sparsity.features, sparsity.per_head) != ("sobel", "keys", False):
            raise NotRunError(
                f"the PyTorch peer ranks by the keys' sobel, heads shared; {sparsity}"
            )
        if side * side % sparsity.block_size or window * window % GROUP or side * side % GROUP:
            raise NotRunError(f"the PyTorch peer needs whole groups and blocks, side {side}")
        for is_global, edge in ((True, side), (False, window)):
            order = curve_order(sparsity.curve, edge, edge, sparsity.seed).astype(np.int64)
            self.groups[is_global] = torch.from_numpy(order.reshape(-1, GROUP))
        for i in blocks if sparsity.ranking not in ("group", "block") else ():
            sequence, layout = (
                stripes(self.groups[self.is_global[i]], sparsity.layout),
                self.layouts[i],
            )
            if sparsity.ranking == "spread" and not layout.is_dense:
                spread = (sequence.numpy(), layout.num_bar_blocks, layout.block_kv)
                sequence = torch.from_numpy(spread_sequence(*spread))
            self.sequences[i] = sequence

    def to(self, device: torch.device | str) -> None:
        """Move the tables, and make the block masks there; before the first forward."""
        self.groups = {key: groups.to(device) for key, groups in self.groups.items()}
        self.sequences = [None if x is None else x.to(device) for x in self.sequences]
        sparse = {x for x, whole in zip(self.layouts, self.is_global, strict=True) if whole}
        masks = {layout: block_mask(layout, device) for layout in sparse if not layout.is_dense}
        pairs = zip(self.layouts, self.is_global, strict=True)
        self.masks = [masks.get(layout) if whole else None for layout, whole in pairs]

    def ranked(self, k: Tensor, is_global: bool) -> tuple[Tensor, Tensor]:
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


class Plan:
    """What the blocks of one forward share: static tables, and the rankings as they are made."""

    def __init__(self, static: Static):
        self.static = static
        self.ranked: dict[bool, tuple[Tensor, Tensor]] = {}  # by whether attention is global

    def attention(self, index: int, k: Tensor) -> tuple[Tensor | None, Any]:
        """Of global attention its sequence [B, N] and block mask, of windows their bar's keys.

        Dense is None. The first block that needs a ranking makes it.
        """
        static, is_global = self.static, self.static.is_global[index]
        layout, fixed = static.layouts[index], static.sequences[index]
        needed = static.sparsity is not None and (is_global or not layout.is_dense)
        if needed and is_global not in self.ranked and (is_global or fixed is None):
            self.ranked[is_global] = static.ranked(k, is_global)
        if layout.is_dense:
            return None, None
        sequence = self.ranked[is_global][0] if fixed is None else fixed.expand(len(k), -1)
        return (sequence if is_global else sequence[:, : layout.bar_len]), static.masks[index]

    def routed_tokens(self, index: int) -> Tensor | None:
        """Tokens [B, M] that the block's MLP runs on, in memory order; None for all."""
        count = self.static.routed[index]
        if count is None or True not in self.ranked:
            return None
        return self.ranked[True][1][:, :count].sort(-1).values


def block_mask(layout: BlockLayout, device: torch.device | str) -> Any:
    """A layout as FlexAttention's BlockMask: all its blocks are full."""
    from torch.nn.attention.flex_attention import BlockMask

    count = torch.from_numpy(layout.kv_num_blocks).to(device)[None, None]
    padded = np.zeros((layout.num_q_blocks, layout.num_kv_blocks), np.int32)
    indices = layout.kv_indices
    padded[:, : indices.shape[1]] = np.maximum(indices, 0)
    index = torch.from_numpy(padded).to(device)[None, None]

    def computed(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        own = q // layout.block_q == key // layout.block_kv
        return (key < layout.bar_len) | (own if layout.diagonal else own & False)

    return BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        torch.zeros_like(index),
        count,
        index,
        BLOCK_SIZE=(layout.block_q, layout.block_kv),
        mask_mod=computed,  # what runs uncompiled knows no blocks
        seq_lengths=(layout.seq_len, layout.seq_len),
    )
