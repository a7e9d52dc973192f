"""The XLA attention against softmax over a full mask, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockLayout, reference

BATCH, SIDE, HEADS, DIM = 2, 12, 3, 8
SEQ_LEN = SIDE * SIDE
# float32 rounding of a few hundred sums of terms of size 1.
TOLERANCE = 2e-5


def inputs(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, SEQ_LEN, HEADS, size) for size in (DIM, DIM, DIM, SIDE, SIDE)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def masked_attention(q, k, v, rel_h, rel_w, rows, cols, mask):
    q, k, v, rel_h, rel_w = (np.float64(x.swapaxes(1, 2)) for x in (q, k, v, rel_h, rel_w))
    rows, cols = (np.broadcast_to(x, (BATCH, HEADS, SEQ_LEN))[:, :, None] for x in (rows, cols))
    bias = np.take_along_axis(rel_h, rows, -1) + np.take_along_axis(rel_w, cols, -1)
    logits = np.where(mask, q @ k.swapaxes(2, 3) / np.sqrt(DIM) + bias, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2)


def token_mask(layout: BlockLayout) -> np.ndarray:
    blocks = np.ones((layout.block_q, layout.block_kv), bool)
    return np.kron(layout.block_mask, blocks)[: layout.seq_len, : layout.seq_len]


BLOCKS = [(16, 16), (32, 16), (16, 32), (64, 64)]


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(
    ("order", "blocks"),
    [*(("shared", blocks) for blocks in BLOCKS), ("per_image", (32, 16)), ("per_head", (16, 32))],
)
def test_stripe_attention(density: float, blocks: tuple[int, int], order: str):
    layout = BlockLayout.a_shape(SEQ_LEN, density, block_q=blocks[0], block_kv=blocks[1])
    rng = np.random.default_rng(1)
    permutation = {
        "shared": lambda: rng.permutation(SEQ_LEN),
        "per_image": lambda: rng.permuted(np.tile(np.arange(SEQ_LEN), (BATCH, 1)), axis=1),
        "per_head": lambda: rng.permuted(np.tile(np.arange(SEQ_LEN), (BATCH, HEADS, 1)), axis=2),
    }[order]()
    rows, cols = permutation // SIDE, permutation % SIDE
    args = inputs()
    out = jax.jit(lambda *args: reference.stripe_attention(*args, rows, cols, layout=layout))(*args)
    if order == "per_image":
        rows, cols = rows[:, None], cols[:, None]
    expected = masked_attention(*args, rows, cols, token_mask(layout))
    np.testing.assert_allclose(out, expected, atol=TOLERANCE)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_block_order(density: float, blocks: tuple[int, int]):
    """The bar is the blocks that rank first; each query also keeps its own block."""
    layout = BlockLayout.a_shape(SEQ_LEN, density, block_q=blocks[0], block_kv=blocks[1])
    rng, full = np.random.default_rng(2), SEQ_LEN // layout.block_kv
    partial = np.arange(full, layout.num_kv_blocks)
    block_order = np.stack([np.r_[rng.permutation(full), partial] for _ in range(BATCH)])
    rows, cols = np.divmod(np.arange(SEQ_LEN), SIDE)
    args = inputs()

    @jax.jit
    def attend(block_order, *args):
        return reference.stripe_attention(*args, rows, cols, layout=layout, block_order=block_order)

    out = attend(block_order, *args)
    position = np.arange(SEQ_LEN)
    unit = max(blocks)
    own = position[:, None] // unit == position // unit
    in_bar = [np.isin(position // blocks[1], b[: layout.num_bar_blocks]) for b in block_order]
    mask = np.stack(in_bar)[:, None, None] | own
    np.testing.assert_allclose(out, masked_attention(*args, rows, cols, mask), atol=TOLERANCE)


def test_gradient_equals_the_dense_formula():
    """The chunked, rematerialised attention differentiates like the formula."""
    layout = BlockLayout.a_shape(SEQ_LEN, 0.3, block_q=16, block_kv=16)
    rows, cols = np.divmod(np.random.default_rng(3).permutation(SEQ_LEN), SIDE)
    args = [jnp.asarray(x) for x in inputs()]
    weight = np.random.default_rng(4).standard_normal(args[0].shape).astype(np.float32)

    def formula(q, k, v, rel_h, rel_w):
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(DIM)
        bias = rel_h[..., rows] + rel_w[..., cols]
        logits = logits + bias.transpose(0, 2, 1, 3)
        weights = jax.nn.softmax(jnp.where(token_mask(layout), logits, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    def sparse(*args):
        return reference.stripe_attention(*args, rows, cols, layout=layout)

    expected, out = (
        jax.jit(jax.grad(lambda args, f=f: (f(*args) * weight).sum()))(args)
        for f in (formula, sparse)
    )
    for a, b in zip(out, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_accumulates_in_float32(dtype):
    """Inputs rounded to 16 bits, everything between in float32: errors stay at the rounding's."""
    layout = BlockLayout.a_shape(SEQ_LEN, 0.5, block_q=16, block_kv=16)
    rows, cols = np.divmod(np.arange(SEQ_LEN), SIDE)
    args = [jnp.asarray(x, dtype) for x in inputs()]
    out = jax.jit(lambda *args: reference.stripe_attention(*args, rows, cols, layout=layout))(*args)
    expected = masked_attention(
        *(np.asarray(x, np.float32) for x in args), rows, cols, token_mask(layout)
    )
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert out.dtype == dtype
    assert error < {jnp.bfloat16: 5e-3, jnp.float16: 1e-3}[dtype]


@pytest.mark.parametrize("grid", [(14, 14), (5, 9), (16, 30)], ids=str)
def test_window_partition_round_trip(grid: tuple[int, int]):
    x = np.random.default_rng(0).standard_normal((2, *grid, 3, 4)).astype(np.float32)
    windows = reference.window_partition(jnp.asarray(x), 7)
    down, across = -(-grid[0] // 7), -(-grid[1] // 7)
    assert windows.shape == (2 * down * across, 49, 3, 4)
    back = reference.window_unpartition(windows, 7, (2, *grid))
    np.testing.assert_array_equal(back, x)
    padding = windows.size - x.size
    assert (np.asarray(windows) == 0).sum() >= padding
