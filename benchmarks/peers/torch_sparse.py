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


def supported(sparsity: Sparsity) -> None:
    """Raise NotRunError for a sparsity that this port does not know."""
    known = (sparsity.importance, sparsity.features, sparsity.per_head) == ("sobel", "keys", False)
    if not known:
        raise NotRunError(f"the PyTorch peer ranks by the keys' sobel, heads shared; {sparsity}")


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
    x = maps.float().permute(0, 3, 1, 2)
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    down = x[:, :, 2:] - x[:, :, :-2]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    across = x[..., 2:] - x[..., :-2]
    across = across[:, :, :-2] + 2 * across[:, :, 1:-1] + across[:, :, 2:]
    return torch.sqrt(down**2 + across**2).mean(1)


def group_scores(k: Tensor, groups: Tensor) -> Tensor:
    """Scores [B, G] of groups [G, 4] by the keys [B, H, N, D] of a square map."""
    batch, _, tokens, _ = k.shape
    side = round(tokens**0.5)
    maps = k.transpose(1, 2).reshape(batch, side, side, -1)
    return sobel(maps).reshape(batch, -1)[:, groups].mean(-1)


def stripes(groups: Tensor, layout: str) -> Tensor:
    """Sequence [..., N] of groups [..., G, 4]: interleaved or one after the other."""
    return (groups.transpose(-1, -2) if layout == "interleave" else groups).flatten(-2)


class Plan:
    """What the blocks of one forward share: static tables, and the rankings as they are made."""

    def __init__(self, static: Static):
        self.static = static
        self.window_sequence: Tensor | None = None
        self.grid_sequence: Tensor | None = None
        self.token_order: Tensor | None = None

    def window_bar(self, index: int, k: Tensor) -> Tensor | None:
        """The keys [B W, K] of windowed attention; None for all. The first one ranks them."""
        static = self.static
        length = static.bar_lengths[index]
        if length is None:
            return None
        fixed = static.sequences[index]
        if fixed is not None:
            return fixed[:length].expand(len(k), -1)
        if self.window_sequence is None:
            self.window_sequence = static.ranked(k, static.window_groups)[0]
        return self.window_sequence[:, :length]

    def grid_bar(self, index: int, k: Tensor) -> tuple[Tensor, Any]:
        """Sequence [B, N] and block mask of global attention; the first global block ranks.

        Dense is raster order and None.
        """
        static = self.static
        if static.sparsity is not None and self.token_order is None:
            self.grid_sequence, self.token_order = static.ranked(k, static.grid_groups)
        mask, sequence = static.masks[index], static.sequences[index]
        if mask is None:
            sequence = torch.arange(k.shape[2], device=k.device)
        elif sequence is None:
            assert self.grid_sequence is not None
            return self.grid_sequence, mask
        return sequence.expand(len(k), -1), mask

    def routed_tokens(self, index: int) -> Tensor | None:
        """Tokens [B, M] that the block's MLP runs on, in memory order; None for all."""
        count = self.static.routed[index]
        if count is None or self.token_order is None:
            return None
        return self.token_order[:, :count].sort(-1).values


class Static:
    """What does not depend on the images.

    Raises:
        NotRunError: The sparsity is not supported, or its curve leaves tokens over.
    """

    def __init__(self, config: ImageEncoderConfig, sparsity: Sparsity | None):
        self.sparsity = sparsity
        side, window, blocks = config.grid_size, config.window_size, range(config.depth)
        if sparsity is not None:
            supported(sparsity)
            if side * side % sparsity.block_size or window * window % GROUP or side * side % GROUP:
                raise NotRunError(f"the PyTorch peer needs whole groups and blocks, side {side}")
        self.layouts = [attention_layout(config, sparsity, i, (side, side)) for i in blocks]
        self.is_global = [config.is_global(i) for i in blocks]
        self.bar_lengths = [None if x.is_dense else x.bar_len for x in self.layouts]
        self.routed = [num_routed_tokens(config, sparsity, i, (side, side)) for i in blocks]
        self.grid_groups, self.window_groups = (self._groups(x) for x in (side, window))
        self.sequences = [self._fixed_sequence(i) for i in blocks]
        self.masks: list[Any] = [None] * config.depth

    def _groups(self, side: int) -> Tensor | None:
        if self.sparsity is None:
            return None
        order = curve_order(self.sparsity.curve, side, side, self.sparsity.seed)
        return torch.from_numpy(order.astype(np.int64).reshape(-1, GROUP))

    def _fixed_sequence(self, index: int) -> Tensor | None:
        """The sequence of a block's attention where no ranking makes it."""
        groups = self.grid_groups if self.is_global[index] else self.window_groups
        if self.sparsity is None or groups is None or self.sparsity.ranking in ("group", "block"):
            return None
        sequence = stripes(groups, self.sparsity.layout)
        layout = self.layouts[index]
        if self.sparsity.ranking == "spread" and not layout.is_dense:
            spread = spread_sequence(sequence.numpy(), layout.num_bar_blocks, layout.block_kv)
            sequence = torch.from_numpy(spread)
        return sequence

    def to(self, device: torch.device | str) -> None:
        """Move the tables, and make the block masks there; before the first forward."""
        if self.grid_groups is not None and self.window_groups is not None:
            self.grid_groups = self.grid_groups.to(device)
            self.window_groups = self.window_groups.to(device)
        self.sequences = [None if x is None else x.to(device) for x in self.sequences]
        masks: dict[BlockLayout, Any] = {}
        for index, layout in enumerate(self.layouts):
            if self.is_global[index] and not layout.is_dense:
                if layout not in masks:
                    masks[layout] = block_mask(layout, device)
                self.masks[index] = masks[layout]

    def ranked(self, k: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention's ranked sequence [B, N], and all tokens by the importance of their groups."""
        assert self.sparsity is not None and groups is not None
        scores = group_scores(k, groups)
        ranked = groups[scores.argsort(dim=-1, descending=True, stable=True)]  # [B, G, 4]
        tokens = ranked.flatten(1)
        if self.sparsity.ranking != "block":
            return stripes(ranked, self.sparsity.layout), tokens
        sequence = stripes(groups, self.sparsity.layout)
        size = self.sparsity.block_size
        full = len(sequence) // size * size
        of_token = torch.empty_like(sequence)
        of_token[groups.flatten()] = torch.arange(len(sequence), device=k.device) // GROUP
        blocks = sequence[:full].reshape(-1, size)
        mean = scores[:, of_token[blocks]].mean(-1)  # [B, blocks]
        order = mean.argsort(dim=-1, descending=True, stable=True)
        tail = sequence[full:].expand(len(k), -1)
        return torch.cat([blocks[order].flatten(1), tail], -1), tokens


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
