"""NumPy oracle of SparseSAM's orders, ranks, importance scores and layouts: brute force, float64.

Written from the algorithm's description alone and sharing no code with the library, so that the
two can be tested against each other. `oracle_encoder.py` builds SAM's image encoder on it.

N tokens, G = N // 4 full groups. "Raster" is row-major order on the token grid, "sequence" the
permuted order in which attention runs.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

GROUP_SIZE = 4

Array = np.ndarray


# Orders


def morton_code(row: int, col: int) -> int:
    """Bits of row and column interleaved, the row's bit above the column's."""
    code = 0
    for bit in range(max(row, col).bit_length()):
        code |= ((row >> bit) & 1) << (2 * bit + 1)
        code |= ((col >> bit) & 1) << (2 * bit)
    return code


def hilbert_path(size: int) -> list[tuple[int, int]]:
    """Cells (row, col) of a power-of-two square along the curve from top left to top right."""
    if size == 1:
        return [(0, 0)]
    half = size // 2
    path = hilbert_path(half)
    top_left = [(c, r) for r, c in path]
    bottom_left = [(r + half, c) for r, c in path]
    bottom_right = [(r + half, c + half) for r, c in path]
    top_right = [(half - 1 - c, half - 1 - r + half) for r, c in path]
    return top_left + bottom_left + bottom_right + top_right


def curve_order(curve: str, height: int, width: int, permutation: Array | None = None) -> Array:
    """Raster indices of the grid's cells along a curve; `random` is the permutation handed in."""
    if curve == "random":
        if permutation is None:
            raise ValueError("the random curve needs its permutation")
        return np.asarray(permutation)
    cells = [(row, col) for row in range(height) for col in range(width)]
    if curve == "morton":
        cells.sort(key=lambda cell: morton_code(*cell))
    elif curve == "hilbert":
        enclosing = 1
        while enclosing < max(height, width):
            enclosing *= 2
        cells = [(r, c) for r, c in hilbert_path(enclosing) if r < height and c < width]
    elif curve != "raster":
        raise ValueError(f"unknown curve {curve!r}")
    return np.array([row * width + col for row, col in cells])


# Ranks and sequences


def rank(scores: Array) -> Array:
    """Indices by descending score, stable.

    Rounding makes ties of scores that differ in float64's last digits only: padded tokens are all
    alike, so the scores of their groups are equal as real numbers.
    """
    return np.argsort(-np.round(scores, 8), kind="stable")


def stripe_sequence(order: Array, group_rank: Array, layout: str) -> Array:
    """Raster indices in sequence order, of groups that `group_rank` lists best first.

    Tokens left over by the last full group are a short group that ranks last.
    """
    num_groups = len(order) // GROUP_SIZE
    groups = [list(order[GROUP_SIZE * g : GROUP_SIZE * (g + 1)]) for g in group_rank]
    leftover = list(order[GROUP_SIZE * num_groups :])
    if leftover:
        groups.append(leftover)
    if layout == "contiguous":
        return np.array([token for group in groups for token in group])
    if layout == "interleave":
        return np.array([group[m] for m in range(GROUP_SIZE) for group in groups if m < len(group)])
    raise ValueError(f"unknown layout {layout!r}")


def attention_sequence(
    order: Array, scores: Array, *, layout: str, ranking: str, block_size: int
) -> Array:
    """Raster indices in sequence order, with one score [G] for every full group of `order`."""
    num_groups = len(order) // GROUP_SIZE
    if ranking == "group":
        return stripe_sequence(order, rank(scores), layout)
    unranked = stripe_sequence(order, np.arange(num_groups), layout)
    if ranking == "none":
        return unranked
    if ranking != "block":
        raise ValueError(f"unknown ranking {ranking!r}")
    # A leftover token belongs to no full group, hence has no score to average.
    token_score = np.full(len(order), np.nan)
    token_score[order[: GROUP_SIZE * num_groups]] = np.repeat(scores, GROUP_SIZE)
    num_full = len(order) // block_size
    blocks = [unranked[block_size * b : block_size * (b + 1)] for b in range(num_full)]
    means = np.array([np.nanmean(token_score[block]) for block in blocks])
    ranked = [blocks[b] for b in rank(means)]
    return np.concatenate([*ranked, unranked[block_size * num_full :]])


def routed_tokens(order: Array, scores: Array, density: float) -> Array:
    """Raster indices of the tokens whose MLP runs, from each head's scores [heads, G]."""
    num_groups = len(order) // GROUP_SIZE
    # The sum of places orders groups as the mean does, and is exact.
    places = np.zeros(num_groups, np.int64)
    for head_scores in scores:
        for place, group in enumerate(rank(head_scores)):
            places[group] += place
    best_first = np.argsort(places, kind="stable")
    sequence = stripe_sequence(order, best_first, "contiguous")
    return sequence[: max(1, round(density * len(order)))]


# Importance: features [N, C] in raster order -> one score for every full group [G]


def _zscore(x: Array) -> Array:
    if len(x) < 2:
        return np.zeros_like(x)
    return (x - x.mean()) / (x.std(ddof=1) + 1e-6)


def dispersion(x: Array, order: Array) -> Array:
    """z(spread inside the group) + z(-cosine similarity of its mean to the other groups' means)."""
    num_groups = len(order) // GROUP_SIZE
    groups = x[order[: GROUP_SIZE * num_groups]].reshape(num_groups, GROUP_SIZE, -1)
    spread = groups.std(axis=1, ddof=1).mean(axis=1)
    means = groups.mean(axis=1)
    norms = np.linalg.norm(means, axis=1)
    # A zero vector has no direction: its similarity to anything is taken as 0.
    units = means / np.where(norms > 0, norms, 1.0)[:, None]
    cosines = np.einsum("ic,jc->ij", units, units)
    np.fill_diagonal(cosines, 0.0)
    similarity = cosines.sum(axis=1) / max(num_groups - 1, 1)
    return _zscore(spread) + _zscore(-similarity)


SOBEL_X = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])


def sobel(x: Array, order: Array, height: int, width: int) -> Array:
    """Sobel magnitude, mean over channels and over the group's members; edges replicated."""
    grid = x.reshape(height, width, -1)
    padded = np.pad(grid, ((1, 1), (1, 1), (0, 0)), mode="edge")
    grad_x, grad_y = np.zeros_like(grid), np.zeros_like(grid)
    for i in range(3):
        for j in range(3):
            shifted = padded[i : i + height, j : j + width]
            grad_x = grad_x + SOBEL_X[i, j] * shifted
            grad_y = grad_y + SOBEL_X.T[i, j] * shifted
    magnitude = np.sqrt(grad_x**2 + grad_y**2).mean(axis=-1).reshape(-1)
    num_groups = len(order) // GROUP_SIZE
    return magnitude[order[: GROUP_SIZE * num_groups]].reshape(num_groups, GROUP_SIZE).mean(axis=1)


def group_scores(importance: str, x: Array, order: Array, height: int, width: int) -> Array:
    """Scores [G] of the groups of `order` by features x [N, C]; equal for `uniform`."""
    if importance == "dispersion":
        return dispersion(x, order)
    if importance == "sobel":
        return sobel(x, order, height, width)
    if importance == "uniform":
        return np.zeros(len(order) // GROUP_SIZE)
    raise ValueError(f"unknown importance {importance!r}")


# Layouts: boolean masks [N, N] on the sequence, query by key


def blocks_kept(density: float, num_blocks: int) -> int:
    """floor(density * num_blocks) with the density as the decimal number it is written as."""
    return math.floor(Fraction(str(density)) * num_blocks)


def global_mask(seq_len: int, density: float, block_size: int = 64) -> Array:
    """Key block j is computed for query block i iff j < floor(r nb) or j == i."""
    kept = blocks_kept(density, math.ceil(seq_len / block_size))
    mask = np.zeros((seq_len, seq_len), bool)
    for query in range(seq_len):
        own_block = query // block_size
        mask[query, : kept * block_size] = True
        mask[query, own_block * block_size : (own_block + 1) * block_size] = True
    return mask


def window_mask(seq_len: int, density: float, block_size: int = 64) -> Array:
    """Key block j is computed for every query iff j < floor(r nb) + 1."""
    kept = blocks_kept(density, math.ceil(seq_len / block_size)) + 1
    mask = np.zeros((seq_len, seq_len), bool)
    mask[:, : kept * block_size] = True
    return mask


def raster_mask(mask: Array, sequence: Array) -> Array:
    """The mask between tokens in raster order, of a mask between positions of the sequence."""
    position = np.empty(len(sequence), np.int64)
    position[sequence] = np.arange(len(sequence))
    return mask[position[:, None], position[None, :]]
