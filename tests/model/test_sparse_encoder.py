"""The image encoder against the NumPy oracle: pieces first, then block by block in float32."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_encoder
import pytest
from flax import nnx

from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.sparsity.importance import block_importance, group_importance, rank
from sparsesam_jax.sparsity.orders import block_sequence, curve_order, stripe_sequence, token_order
from sparsesam_jax.sparsity.plan import attention_layout, num_routed_tokens
from sparsesam_jax.sparsity.split import block_densities

DENSITIES = (0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
GRIDS = ((14, 14), (16, 16), (32, 32), (64, 64), (9, 5), (3, 3))

# Largest difference over largest value, the encoder in float32 and the oracle in float64. Rounding
# (6e-8 an operation, sums of 32 to 4096 terms, up to five blocks) gives up to 1e-6; one key or
# token chosen otherwise gives 1e-2 and more.
TOLERANCE = 5e-6


def config_for(
    grid: int, *, window: int = 14, depth: int = 3, global_at=(1,)
) -> ImageEncoderConfig:
    return ImageEncoderConfig(
        embed_dim=32,
        depth=depth,
        num_heads=2,
        global_attn_indexes=global_at,
        image_size=4 * grid,
        patch_size=4,
        window_size=window,
        out_chans=16,
    )


def load(config: ImageEncoderConfig, sparsity: Sparsity | None, params: dict[str, np.ndarray]):
    """The encoder's graph, and its state with every one of the arrays under Meta's keys in it."""

    def make() -> ImageEncoder:
        return ImageEncoder(config, sparsity=sparsity, implementation="xla", rngs=nnx.Rngs(0))

    graph, state = nnx.split(nnx.eval_shape(make))
    unused = set(params)
    for path, variable in nnx.to_flat_state(state):
        *parents, leaf = map(str, path)
        name = ".".join(["image_encoder", *parents, leaf])
        name = name.removesuffix("kernel").removesuffix("scale")
        name = f"{name}weight" if name.endswith(".") else name
        array = params[name]
        unused.remove(name)
        if leaf == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        assert array.shape == variable.shape, name
        variable.set_value(jnp.asarray(array))
    assert not unused
    return graph, state


def check(
    config: ImageEncoderConfig,
    sparsity: Sparsity | None,
    *,
    batch: int = 1,
    oracle_sparsity: Sparsity | None = None,
    **random,
):
    """Every block's output and the features agree with the oracle's, image by image."""
    params = oracle_encoder.random_params(config, seed=0)
    shape = (batch, config.image_size, config.image_size, 3)
    pixels = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    graph, state = load(config, sparsity, params)

    # Nearly all of the time is compilation: the lowest level of optimisation halves it.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(state, pixels):
        encoder = nnx.merge(graph, state)
        blocks = encoder.block_outputs(pixels)
        return [*blocks, encoder.neck_features(blocks[-1])]

    outputs = [np.asarray(output) for output in run(state, pixels)]
    for image in range(batch):
        blocks, features, _ = oracle_encoder.encode(
            params, config, pixels[image], oracle_sparsity or sparsity, **random
        )
        errors = [
            np.abs(output[image] - expected).max() / np.abs(expected).max()
            for output, expected in zip(outputs, [*blocks, features], strict=True)
        ]
        assert max(errors) <= TOLERANCE, f"image {image}, blocks then features: {errors}"


# Pieces


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("curve", ["morton", "hilbert", "raster"])
def test_orders(curve, grid):
    np.testing.assert_array_equal(curve_order(curve, *grid), oracle.curve_order(curve, *grid))


@pytest.mark.parametrize("layout", ["interleave", "contiguous"])
@pytest.mark.parametrize("grid", [(14, 14), (9, 5)])
def test_sequences(layout, grid):
    rng = np.random.default_rng(0)
    order = oracle.curve_order("morton", *grid)
    # Multiples of 1/8, so that many groups tie and every mean is exact.
    scores = rng.integers(0, 8, (3, len(order) // 4)) / 8
    group_rank = np.stack([oracle.rank(row) for row in scores])
    np.testing.assert_array_equal(rank(jnp.asarray(scores)), group_rank)

    ours = stripe_sequence(order, group_rank, layout)
    expected = [oracle.stripe_sequence(order, row, layout) for row in group_rank]
    np.testing.assert_array_equal(ours, np.stack(expected))

    unranked = oracle.stripe_sequence(order, np.arange(len(order) // 4), layout)
    for block_size in (8, 64):
        block_rank = rank(block_importance(jnp.asarray(scores), order, unranked, block_size))
        ours = block_sequence(unranked, block_rank, block_size)
        options = {"layout": layout, "ranking": "block", "block_size": block_size}
        expected = [oracle.attention_sequence(order, row, **options) for row in scores]
        np.testing.assert_array_equal(ours, np.stack(expected))

    ours = token_order(order, jnp.asarray(group_rank))
    np.testing.assert_array_equal(ours, oracle.routed_tokens(order, scores, 1.0))


@pytest.mark.parametrize("importance", ["dispersion", "sobel", "uniform"])
@pytest.mark.parametrize("grid", [(14, 14), (9, 5)])
def test_importance(importance, grid):
    order = oracle.curve_order("morton", *grid)
    features = np.random.default_rng(0).standard_normal((*grid, 8)).astype(np.float32)
    features[grid[0] // 2 :, grid[1] // 2 :] = 0  # a window's padding
    features = features.reshape(-1, 8)
    ours = group_importance(jnp.asarray(features), order, grid=grid, importance=importance)
    expected = oracle.group_scores(importance, features.astype(np.float64), order, *grid)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)  # float32, unit scale


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("grid", [14, 16, 32, 64])
def test_layouts_and_routed_tokens(grid, density):
    config, sparsity = config_for(grid), Sparsity(density, split="equal")
    num_tokens = grid * grid
    for index, seq_len, oracle_mask in (
        (0, 196, oracle.window_mask),
        (1, num_tokens, oracle.global_mask),
    ):
        blocks = attention_layout(config, sparsity, index, (grid, grid)).block_mask
        expected = oracle_mask(seq_len, density)[::64, ::64]
        np.testing.assert_array_equal(blocks, expected)
    order = np.arange(num_tokens)
    routed = len(oracle.routed_tokens(order, np.zeros((1, num_tokens // 4)), density))
    counts = [num_routed_tokens(config, sparsity, index, (grid, grid)) for index in range(3)]
    assert counts[:2] == [None, None]
    assert (counts[2] or num_tokens) == routed


# The encoder


def test_dense():
    check(config_for(16), None)


@pytest.mark.parametrize(
    ("grid", "density"),
    [(14, 0.25), (14, 0.7), *((16, density) for density in DENSITIES), (64, 0.3)],
)
def test_released_preset(grid, density):
    check(config_for(grid), Sparsity.released(density))


def test_default_split():
    config, sparsity = config_for(32, depth=4, global_at=(1, 3)), Sparsity(0.4)
    attention, mlp = zip(*block_densities(config, sparsity), strict=True)
    explicit = dataclasses.replace(sparsity, attention_density=attention, mlp_density=mlp)
    assert attention[0] == 1 and attention[1] < 0.4
    check(config, sparsity, oracle_sparsity=explicit)


def test_every_image_of_a_batch_ranks_for_itself():
    check(config_for(32), Sparsity.released(0.4), batch=2)


def test_the_first_block_of_a_kind_ranks_and_global_may_come_first():
    check(config_for(32, depth=4, global_at=(0, 2)), Sparsity.released(0.3))


# Not on a grid of 16: its corner window holds 4 real tokens, the scores of whole blocks tie, and
# which comes first is up to float32's rounding.
@pytest.mark.parametrize(
    "options",
    [
        dict(density=0.4),
        dict(density=0.3, importance="sobel", features="input"),
        dict(density=0.4, importance="sobel", per_head=True),
        dict(density=0.5, importance="sobel", ranking="block", layout="contiguous"),
        dict(density=0.25, ranking="block", curve="hilbert", features="input"),
        dict(density=0.4, curve="hilbert", layout="contiguous", features="input"),
        dict(density=0.3, ranking="none", curve="raster", per_head=True),
        dict(density=0.7, ranking="none", layout="contiguous", importance="uniform"),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_variants_with_padded_windows(options):
    check(config_for(22), Sparsity(split="equal", **options))


def test_random_controls():
    sparsity = Sparsity(0.4, split="equal", curve="random", importance="random", seed=3)
    orders, scores = {}, {}
    for kind, side in {"windowed": 14, "global": 16}.items():
        orders[kind] = curve_order("random", side, side, sparsity.seed)
        assert sorted(orders[kind]) == list(range(side * side))
        scores[kind] = group_importance(
            jnp.zeros((side * side, 1)),
            orders[kind],
            grid=(side, side),
            importance="random",
            seed=sparsity.seed,
        )
        assert len(np.unique(scores[kind])) > side * side // 5
    check(config_for(16), sparsity, random_orders=orders, random_scores=scores)


@pytest.mark.parametrize("ranking", ["group", "block"])
def test_grids_whose_tokens_do_not_divide_into_groups(ranking):
    # 81 tokens, windows of 25, blocks of 8: a leftover token in both kinds, partial last blocks.
    check(config_for(9, window=5), Sparsity(0.3, split="equal", ranking=ranking, block_size=8))


def test_densities_by_block_and_a_later_start_of_routing():
    sparsity = Sparsity(
        1.0,
        attention_density=(0.25, 0.3, 0.5, 0.4, 0.7),
        mlp_density=(1.0, 0.2, 0.3, 0.4, 0.6),
        mlp_start=4,
        importance="sobel",
    )
    check(config_for(16, depth=5, global_at=(1, 3)), sparsity)


def test_block_ranking_by_sobel_on_the_full_grid():
    sparsity = Sparsity(0.4, split="equal", importance="sobel", features="input", ranking="block")
    check(config_for(64), sparsity)
