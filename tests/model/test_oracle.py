"""The oracle checked by hand, by definition, and (dense) against transformers' SAM encoder."""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import oracle
import oracle_encoder
import pytest

from sparsesam_jax.config import ImageEncoderConfig, Sparsity

# Windows of 4 reach past the border of a 6 x 6 grid; windowed and global blocks alternate.
TINY = ImageEncoderConfig(
    embed_dim=16,
    depth=5,
    num_heads=2,
    global_attn_indexes=(1, 3),
    image_size=24,
    patch_size=4,
    window_size=4,
    out_chans=8,
)


def pixels_for(config: ImageEncoderConfig, seed: int) -> np.ndarray:
    shape = (config.image_size, config.image_size, 3)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_morton_codes_and_order_of_a_4_by_4_grid_by_hand():
    codes = [[oracle.morton_code(row, col) for col in range(4)] for row in range(4)]
    assert codes == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    order = oracle.curve_order("morton", 4, 4)
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_hilbert_order_of_a_4_by_4_grid_by_hand():
    order = oracle.curve_order("hilbert", 4, 4)
    assert order.tolist() == [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]


@pytest.mark.parametrize("size", [2, 8, 64])
def test_hilbert_moves_to_a_neighbour_at_every_step(size):
    rows, cols = np.divmod(oracle.curve_order("hilbert", size, size), size)
    assert (np.abs(np.diff(rows)) + np.abs(np.diff(cols)) == 1).all()


@pytest.mark.parametrize("curve", ["morton", "hilbert", "raster"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (14, 14), (16, 16), (5, 9), (64, 64)])
def test_orders_are_permutations(curve, grid):
    order = oracle.curve_order(curve, *grid)
    assert sorted(order) == list(range(grid[0] * grid[1]))


def test_morton_of_14_by_14_is_that_of_16_by_16_with_the_absent_cells_left_out():
    rows, cols = np.divmod(oracle.curve_order("morton", 16, 16), 16)
    present = (rows < 14) & (cols < 14)
    expected = rows[present] * 14 + cols[present]
    np.testing.assert_array_equal(oracle.curve_order("morton", 14, 14), expected)


@pytest.mark.parametrize("curve", ["morton", "hilbert"])
@pytest.mark.parametrize("size", [4, 14, 64])
def test_groups_of_an_even_grid_are_2_by_2_neighbourhoods(curve, size):
    for group in oracle.curve_order(curve, size, size).reshape(-1, 4):
        corner = group.min()
        assert sorted(group - corner) == [0, 1, size, size + 1]


def test_random_curve_is_the_permutation_handed_in():
    assert oracle.curve_order("random", 2, 2, np.array([2, 0, 3, 1])).tolist() == [2, 0, 3, 1]


def test_stripe_sequence_by_hand():
    order = np.arange(100, 108)
    best_first = np.array([1, 0])
    interleaved = oracle.stripe_sequence(order, best_first, "interleave")
    assert interleaved.tolist() == [104, 100, 105, 101, 106, 102, 107, 103]
    contiguous = oracle.stripe_sequence(order, best_first, "contiguous")
    assert contiguous.tolist() == [104, 105, 106, 107, 100, 101, 102, 103]


def test_leftover_tokens_are_a_short_group_that_ranks_last():
    order = np.arange(100, 110)
    best_first = np.array([1, 0])
    interleaved = oracle.stripe_sequence(order, best_first, "interleave")
    assert interleaved.tolist() == [104, 100, 108, 105, 101, 109, 106, 102, 107, 103]
    contiguous = oracle.stripe_sequence(order, best_first, "contiguous")
    assert contiguous.tolist() == [104, 105, 106, 107, 100, 101, 102, 103, 108, 109]


def test_a_stripe_of_the_morton_order_is_the_image_at_half_resolution():
    order = oracle.curve_order("morton", 8, 8)
    sequence = oracle.stripe_sequence(order, np.arange(16), "interleave")
    rows, cols = np.divmod(sequence.reshape(4, 16), 8)
    for stripe, (row, col) in enumerate(itertools.product(range(2), range(2))):
        assert (rows[stripe] % 2 == row).all() and (cols[stripe] % 2 == col).all()


def test_rank_is_descending_and_stable():
    assert oracle.rank(np.array([1.0, 3.0, 1.0 + 1e-15, 2.0])).tolist() == [1, 3, 0, 2]


def test_block_ranking_by_hand():
    # Blocks of 4 of a contiguous sequence are the groups; the partial block stays last.
    order, scores = np.arange(14), np.array([1.0, 5.0, 3.0])
    sequence = oracle.attention_sequence(
        order, scores, layout="contiguous", ranking="block", block_size=4
    )
    assert sequence.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 12, 13]
    # Interleaved 0 4 8 12 1, 5 9 13 2 6, 10 3 7 11: means 10/4, 14/4 (12, 13 have no score).
    sequence = oracle.attention_sequence(
        order, scores, layout="interleave", ranking="block", block_size=5
    )
    assert sequence.tolist() == [5, 9, 13, 2, 6, 0, 4, 8, 12, 1, 10, 3, 7, 11]


def test_routed_tokens_by_hand():
    order = np.array([3, 2, 1, 0, 7, 6, 5, 4, 8, 9, 10, 11, 12])
    # Places: head 0 puts group 1, 2, 0 and head 1 puts group 2, 0, 1: sums 3, 2, 1.
    scores = np.array([[0.0, 2.0, 1.0], [1.0, 0.0, 2.0]])
    everything = oracle.routed_tokens(order, scores, 1.0).tolist()
    assert everything == [8, 9, 10, 11, 7, 6, 5, 4, 3, 2, 1, 0, 12]
    # round(0.5 * 13) = 6 (half to even) and max(1, round(0.01 * 13)) = 1.
    assert oracle.routed_tokens(order, scores, 0.5).tolist() == everything[:6]
    assert oracle.routed_tokens(order, scores, 0.01).tolist() == everything[:1]
    # Equal places keep the curve's order.
    tied = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    assert oracle.routed_tokens(order, tied, 0.6).tolist() == [3, 2, 1, 0, 7, 6, 5, 4]


def test_dispersion_by_its_definition():
    rng = np.random.default_rng(0)
    order, x = rng.permutation(22), rng.standard_normal((22, 3))
    groups = [[x[token] for token in order[4 * g : 4 * g + 4]] for g in range(5)]
    spread, similarity = [], []
    for g in range(5):
        spread.append(np.mean([np.std([t[c] for t in groups[g]], ddof=1) for c in range(3)]))
        mean = np.mean(groups[g], axis=0)
        cosines = []
        for other in set(range(5)) - {g}:
            vector = np.mean(groups[other], axis=0)
            cosines.append(mean @ vector / np.sqrt((mean @ mean) * (vector @ vector)))
        similarity.append(np.mean(cosines))
    expected = 0.0
    for values in (np.array(spread), -np.array(similarity)):
        expected = expected + (values - np.mean(values)) / (np.std(values, ddof=1) + 1e-6)
    np.testing.assert_allclose(oracle.dispersion(x, order), expected, rtol=1e-12, atol=1e-12)


def test_dispersion_of_zero_and_equal_groups_is_finite_and_tied():
    x = np.zeros((16, 5))
    x[:4] = np.random.default_rng(1).standard_normal((4, 5))
    scores = oracle.dispersion(x, np.arange(16))
    assert np.isfinite(scores).all()
    assert oracle.rank(scores).tolist() == [0, 1, 2, 3]


def test_sobel_of_a_ramp_by_hand():
    # 8 a column inside, half of it at the replicated left and right edges, nothing along the rows.
    ramp = np.tile(np.arange(4.0), (4, 1)).reshape(16, 1)
    scores = oracle.sobel(np.concatenate([ramp, 2 * ramp], axis=1), np.arange(16), 4, 4)
    np.testing.assert_allclose(scores, np.full(4, 1.5 * (4 + 8 + 8 + 4) / 4))
    transposed = ramp.reshape(4, 4).T.reshape(16, 1)
    np.testing.assert_allclose(oracle.sobel(transposed, np.arange(16), 4, 4), [4.0, 8.0, 8.0, 4.0])


@pytest.mark.parametrize(
    ("density", "kept"),
    [
        (0.2, 64),
        *((density, 128) for density in (0.25, 0.3, 0.4, 0.49)),
        *((density, 192) for density in (0.5, 0.7, 0.74)),
        *((density, 196) for density in (0.75, 1.0)),
    ],
)
def test_keys_that_a_window_keeps(density, kept):
    mask = oracle.window_mask(196, density)
    assert (mask.sum(axis=1) == kept).all() and mask[:, :kept].all()


@pytest.mark.parametrize(
    ("density", "bar"), [(0.01, 0), (0.25, 16), (0.3, 19), (0.4, 25), (0.5, 32), (0.7, 44), (1, 64)]
)
def test_blocks_that_the_global_grid_keeps(density, bar):
    blocks = oracle.global_mask(4096, density)[::64, ::64]
    expected = np.eye(64, dtype=bool)
    expected[:, :bar] = True
    np.testing.assert_array_equal(blocks, expected)


def test_global_mask_with_a_partial_last_block():
    mask = oracle.global_mask(196, 0.3)
    assert (mask[:64].sum(axis=1) == 64).all()
    assert (mask[64:192].sum(axis=1) == 128).all()
    assert (mask[192:].sum(axis=1) == 68).all()


def test_blocks_kept_takes_the_density_as_a_decimal():
    assert 0.58 * 50 < 29 and oracle.blocks_kept(0.58, 50) == 29


def transformers_name(name: str) -> str:
    """The encoder's key in transformers for one of Meta's."""
    rules = [
        (r"^image_encoder\.", ""),
        (r"^blocks\.", "layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"^patch_embed\.proj", "patch_embed.projection"),
        (r"^neck\.0", "neck.conv1"),
        (r"^neck\.1", "neck.layer_norm1"),
        (r"^neck\.2", "neck.conv2"),
        (r"^neck\.3", "neck.layer_norm2"),
    ]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize("window_size", [4, 3])
def test_dense_encoder_is_that_of_transformers(window_size):
    torch = pytest.importorskip("torch")
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    config = dataclasses.replace(TINY, window_size=window_size)
    params, pixels = oracle_encoder.random_params(config, 0), pixels_for(config, 1)
    peer_config = sam.SamVisionConfig(
        hidden_size=config.embed_dim,
        output_channels=config.out_chans,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        window_size=config.window_size,
        global_attn_indexes=list(config.global_attn_indexes),
        mlp_dim=config.mlp_dim,
        layer_norm_eps=1e-6,
    )
    peer = sam.SamVisionEncoder(peer_config).double().eval()
    state = {transformers_name(name): torch.tensor(array) for name, array in params.items()}
    peer.load_state_dict(state, strict=True)
    outputs = []
    for layer in peer.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        features = peer(torch.tensor(pixels).double().permute(2, 0, 1)[None]).last_hidden_state
    ours = oracle_encoder.encode(params, config, pixels)
    assert len(ours.blocks) == len(outputs) == config.depth
    # transformers may take its softmax in float32: 1e-7 an operation, 1e-5 leaves room.
    for block, expected in zip(ours.blocks, outputs, strict=True):
        expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()[0]
        assert np.abs(block - expected).max() <= 1e-5 * np.abs(expected).max()
    expected = features.numpy()[0].transpose(1, 2, 0)
    assert np.abs(ours.features - expected).max() <= 1e-5 * np.abs(expected).max()


def test_random_parameters_keep_activations_of_order_one_and_let_positions_matter():
    params, pixels = oracle_encoder.random_params(TINY, 2), pixels_for(TINY, 3)
    encoded = oracle_encoder.encode(params, TINY, pixels)
    assert all(0.3 < block.std() < 10 for block in encoded.blocks)
    for name in params:
        if "rel_pos" in name:
            params[name] = np.zeros_like(params[name])
    without = oracle_encoder.encode(params, TINY, pixels)
    assert np.abs(encoded.features - without.features).mean() > 0.02


@pytest.mark.parametrize(
    ("ranking", "per_head"), [("group", True), ("group", False), ("block", False), ("none", False)]
)
def test_density_one_is_the_dense_encoder(ranking, per_head):
    params, pixels = oracle_encoder.random_params(TINY, 4), pixels_for(TINY, 5)
    sparsity = Sparsity(1.0, ranking=ranking, per_head=per_head, block_size=8)
    dense = oracle_encoder.encode(params, TINY, pixels)
    sparse = oracle_encoder.encode(params, TINY, pixels, sparsity)
    for block, expected in zip(sparse.blocks, dense.blocks, strict=True):
        np.testing.assert_allclose(block, expected, rtol=1e-10, atol=1e-10)


def test_routing_changes_its_share_of_tokens_and_only_after_the_first_global_block():
    params, pixels = oracle_encoder.random_params(TINY, 6), pixels_for(TINY, 7)
    for name in params:
        if ".attn.proj." in name:
            params[name] = np.zeros_like(params[name])
    blocks = oracle_encoder.encode(params, TINY, pixels, Sparsity(0.3)).blocks
    changed = [(b != a).any(axis=-1).sum() for a, b in itertools.pairwise(blocks)]
    # Blocks 1 to 4: global, windowed and routed (round(0.3 * 36) = 11), global, routed.
    assert changed == [36, 11, 36, 11]
    later = oracle_encoder.encode(params, TINY, pixels, Sparsity(0.3, mlp_start=3)).blocks
    assert [(b != a).any(axis=-1).sum() for a, b in itertools.pairwise(later)] == [36, 36, 36, 11]


def test_every_attention_density_reaches_only_its_own_block():
    params, pixels = oracle_encoder.random_params(TINY, 8), pixels_for(TINY, 9)
    sparsity = Sparsity(1.0, attention_density=(1.0, 1.0, 0.3, 1.0, 1.0), block_size=4)
    dense = oracle_encoder.encode(params, TINY, pixels).blocks
    sparse = oracle_encoder.encode(params, TINY, pixels, sparsity).blocks
    gaps = [np.abs(a - b).max() for a, b in zip(dense, sparse, strict=True)]
    assert max(gaps[:2]) < 1e-10 and min(gaps[2:]) > 1e-3
