"""Which key blocks each query block of a sparse attention computes: static, hashable, tiny."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np


def blocks_kept(density: float, num_blocks: int) -> int:
    """`floor(density * num_blocks)`, the product taken as exact decimals would give it."""
    # 0.58 * 50 is 28.999999999999996 in binary; nobody who asks for 0.58 means 28 blocks.
    return math.floor(density * num_blocks + 1e-9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """An A-shaped block layout: a bar of leading key blocks for all queries, plus the diagonal.

    Query block i computes key block j iff `j < num_bar_blocks`, or `diagonal` and the two blocks
    share a position of the sequence. Known when a function is traced; being hashable it can be a
    static argument of `jax.jit`.

    Attributes:
        seq_len: Tokens N of the sequence; the last block of either kind may be partial.
        num_bar_blocks: Key blocks at the head of the sequence that every query computes.
        diagonal: Whether a query block also computes the key blocks at its own positions.
        block_q: Queries in a block.
        block_kv: Keys in a block.
    """

    seq_len: int
    num_bar_blocks: int
    diagonal: bool
    block_q: int = 64
    block_kv: int = 64

    def __post_init__(self) -> None:
        for name in ("seq_len", "block_q", "block_kv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if max(self.block_q, self.block_kv) % min(self.block_q, self.block_kv):
            raise ValueError(
                "block_q and block_kv must be one a multiple of the other, "
                f"got {self.block_q} and {self.block_kv}"
            )
        if not 0 <= self.num_bar_blocks <= self.num_kv_blocks:
            raise ValueError(
                f"num_bar_blocks must lie in [0, {self.num_kv_blocks}], got {self.num_bar_blocks}"
            )
        if self.num_bar_blocks == 0 and not self.diagonal:
            raise ValueError("a layout needs a bar block or the diagonal, got neither")

    @classmethod
    def dense(cls, seq_len: int, *, block_q: int = 64, block_kv: int = 64) -> BlockLayout:
        """The layout that computes every block."""
        return cls(
            seq_len=seq_len,
            num_bar_blocks=math.ceil(seq_len / block_kv),
            diagonal=False,
            block_q=block_q,
            block_kv=block_kv,
        )

    @classmethod
    def a_shape(
        cls, seq_len: int, density: float, *, block_q: int = 64, block_kv: int = 64
    ) -> BlockLayout:
        """Global attention's layout: `floor(density * num_blocks)` bar blocks and the diagonal."""
        _check_density(density)
        num_blocks = math.ceil(seq_len / block_kv)
        bar = blocks_kept(density, num_blocks)
        return cls(
            seq_len=seq_len,
            num_bar_blocks=bar,
            diagonal=bar < num_blocks,
            block_q=block_q,
            block_kv=block_kv,
        )

    @classmethod
    def bar(
        cls, seq_len: int, density: float, *, block_q: int = 64, block_kv: int = 64
    ) -> BlockLayout:
        """Windowed attention's layout: `floor(density * num_blocks) + 1` bar blocks alone."""
        _check_density(density)
        num_blocks = math.ceil(seq_len / block_kv)
        return cls(
            seq_len=seq_len,
            num_bar_blocks=min(blocks_kept(density, num_blocks) + 1, num_blocks),
            diagonal=False,
            block_q=block_q,
            block_kv=block_kv,
        )

    @property
    def num_q_blocks(self) -> int:
        """Query blocks of the sequence, a partial one included."""
        return math.ceil(self.seq_len / self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        """Key blocks of the sequence, a partial one included."""
        return math.ceil(self.seq_len / self.block_kv)

    @property
    def bar_len(self) -> int:
        """Keys in the bar."""
        return min(self.num_bar_blocks * self.block_kv, self.seq_len)

    @property
    def is_dense(self) -> bool:
        """Whether every block is computed."""
        return self.num_bar_blocks == self.num_kv_blocks

    @property
    def density(self) -> float:
        """Computed blocks over all blocks."""
        return float(self.kv_num_blocks.sum()) / (self.num_q_blocks * self.num_kv_blocks)

    @functools.cached_property
    def block_mask(self) -> np.ndarray:
        """Computed blocks, bool, [num_q_blocks, num_kv_blocks]."""
        key_block = np.arange(self.num_kv_blocks)[None, :]
        mask = np.broadcast_to(
            key_block < self.num_bar_blocks, (self.num_q_blocks, self.num_kv_blocks)
        ).copy()
        if self.diagonal:
            query_block = np.arange(self.num_q_blocks)[:, None]
            mask |= (query_block * self.block_q < (key_block + 1) * self.block_kv) & (
                key_block * self.block_kv < (query_block + 1) * self.block_q
            )
        mask.setflags(write=False)
        return mask

    @functools.cached_property
    def kv_num_blocks(self) -> np.ndarray:
        """Number of key blocks each query block computes, int32, [num_q_blocks]."""
        return self.block_mask.sum(axis=1, dtype=np.int32)

    @functools.cached_property
    def kv_indices(self) -> np.ndarray:
        """Key blocks each query block computes, ascending, -1 after the last, int32.

        Shape [num_q_blocks, max(kv_num_blocks)].
        """
        indices = np.full((self.num_q_blocks, int(self.kv_num_blocks.max())), -1, np.int32)
        for row, mask in zip(indices, self.block_mask, strict=True):
            kept = np.flatnonzero(mask)
            row[: len(kept)] = kept
        return indices


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
