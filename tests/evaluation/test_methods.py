"""The methods SparseSAM is compared with, each against a plain restatement of its definition."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SMALL, random_weights

from sparsesam_jax import Sam, Sparsity, methods
from sparsesam_jax.methods import sequences
from sparsesam_jax.methods.group_update import GroupUpdate
from sparsesam_jax.methods.kmeans import KMeans
from sparsesam_jax.methods.merging import Merged, TokenMerging
from sparsesam_jax.methods.pisa import PiecewiseAttention
from sparsesam_jax.methods.pitome import PiToMe
from sparsesam_jax.methods.sparge import SpargeAttention
from sparsesam_jax.methods.sparsesam import SparseSam
from sparsesam_jax.methods.structsam import StructSam
from sparsesam_jax.methods.tome import ToMe
from sparsesam_jax.sparsity.work import encoder_work

CLASSES = {
    "tome": ToMe,
    "pitome": PiToMe,
    "structsam": StructSam,
    "sparge": SpargeAttention,
    "pisa": PiecewiseAttention,
    "kmeans": KMeans,
}
MERGING = {name: cls for name, cls in CLASSES.items() if issubclass(cls, TokenMerging)}
CONFIG = SMALL.image_encoder
# A windowed and a global block, on a grid of two blocks of keys; a small program compiles fast.
TINY = dataclasses.replace(
    SMALL, image_encoder=dataclasses.replace(SMALL.image_encoder, depth=2, image_size=160)
)


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Sam:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return Sam.from_pretrained(str(random_weights(path, TINY)))


@functools.lru_cache
def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 160, 160, 3)).astype(np.float32)


def features(model: Sam) -> np.ndarray:
    return np.asarray(nnx.jit(lambda encoder, x: encoder(x))(model.image_encoder, pixels()))


@pytest.mark.parametrize("method", [*(cls(0.5) for cls in CLASSES.values()), GroupUpdate(0.5)])
def test_the_stream_keeps_its_dtype(method: methods.BlockMethod) -> None:
    sam = Sam.abstract(TINY, dtype="bfloat16", implementation="xla")
    graphdef, state = nnx.split(method.apply(sam).image_encoder)
    run = lambda state, x: nnx.merge(graphdef, state).block_outputs(x)  # noqa: E731
    for out in jax.eval_shape(run, state, pixels()):
        assert out.dtype == jnp.float16


@pytest.fixture(scope="module")
def dense(sam: Sam) -> np.ndarray:
    return features(sam)


def test_registry_knows_them_all() -> None:
    assert set(methods.NAMES) == {"sparsesam", "released", "random", *CLASSES}
    for name in methods.NAMES:
        made = methods.make(name, 0.5)
        assert type(made) is CLASSES.get(name, SparseSam)
        assert (made.as_sparsity() is None) == (name in CLASSES)
    with pytest.raises(ValueError, match="method must be one of sparsesam, released, random, tome"):
        methods.make("magic", 0.5)


@pytest.mark.parametrize("name", methods.NAMES)
def test_density_one_is_dense(sam: Sam, name: str) -> None:
    encoder = methods.apply(sam, name, 1.0).image_encoder
    assert type(encoder) is type(sam.image_encoder)  # the very same program
    assert encoder.sparsity is None
    assert methods.work(CONFIG, name, 1.0) == encoder_work(CONFIG)


@pytest.mark.parametrize("name", ["tome", "sparge", "kmeans"])
def test_at_density_one_the_method_itself_is_dense(sam: Sam, dense: np.ndarray, name: str) -> None:
    model = CLASSES[name](1.0).apply(sam)
    # Up to the order of sums.
    np.testing.assert_allclose(features(model), dense, atol=2e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_low_densities_are_cheaper_approximations(sam: Sam, dense: np.ndarray, name: str) -> None:
    found = features(methods.apply(sam, name, 0.5))
    error = np.linalg.norm(found - dense) / np.linalg.norm(dense)
    assert 1e-4 < error < 1
    config = TINY.image_encoder
    half, whole = (methods.work(config, name, density) for density in (0.5, 1.0))
    spent = [block.total - block.extra for block in half.blocks]
    assert sum(spent) + half.fixed < whole.total
    assert sum(block.extra for block in half.blocks) > 0


def test_random_is_sparsesam_without_a_ranking(sam: Sam) -> None:
    expected = sam.with_sparsity(Sparsity(0.5, split="equal", importance="random", ranking="none"))
    assert methods.apply(sam, "random", 0.5).image_encoder.sparsity == (
        expected.image_encoder.sparsity
    )


def tokens(rows: int, columns: int, batch: tuple[int, ...] = (2, 3)) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.normal(size=(*batch, rows * columns, 6)).astype(np.float32)


def match(method: TokenMerging, x: np.ndarray, grid: tuple[int, int]) -> Merged:
    return jax.jit(lambda x: method.match(x, grid))(x)


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_merged_tokens_are_means(name: str, density: float) -> None:
    method, grid = MERGING[name](density), (5, 5)
    x = tokens(*grid)

    @jax.jit
    def run(x):
        merged = method.match(x, grid)
        means = merged.merge(x)
        return merged, means, merged.unmerge(means)

    merged, means, restored = run(x)
    count = method.count(x.shape[-2], grid)
    assert merged.destination.shape == (2, 3, count)
    assert count >= round(density * x.shape[-2])
    slot, means = np.asarray(merged.slot), np.asarray(means)
    for image, head in np.ndindex(2, 3):
        for place in range(count):
            members = slot[image, head] == place
            if members.any():
                expected = x[image, head][members].mean(0)
                np.testing.assert_allclose(means[image, head, place], expected, atol=1e-5)
                if name != "kmeans":  # whose clusters move
                    assert members[merged.destination[image, head, place]]
    expected = np.take_along_axis(means, slot[..., None], axis=-2)
    np.testing.assert_array_equal(restored, expected)


def cosines(x: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return unit @ unit.T


def groups(merged: Merged) -> set[frozenset[int]]:
    """Sets of tokens that became one."""
    slot = np.asarray(merged.slot)
    found = (frozenset(np.flatnonzero(slot == place).tolist()) for place in np.unique(slot))
    return {group for group in found if len(group) > 1}


def bipartite(x: np.ndarray, sources: Any, targets: Any, removed: int) -> set[frozenset[int]]:
    """Greedy matching, restated with loops."""
    similarity = cosines(x)
    best = {a: max(targets, key=lambda b: similarity[a, b]) for a in sources}
    chosen = sorted(sources, key=lambda a: -similarity[a, best[a]])[:removed]
    found: dict[int, set[int]] = {}
    for a in chosen:
        found.setdefault(best[a], {best[a]}).add(a)
    return {frozenset(group) for group in found.values()}


def test_tome_matches_alternating_tokens() -> None:
    x = tokens(4, 6, ())
    merged = match(ToMe(0.7), x, (4, 6))
    assert groups(merged) == bipartite(x, range(0, 24, 2), range(1, 24, 2), 7)
    assert ToMe(0.3).count(24, (4, 6)) == 12
    assert ToMe(0.3).count(25, (5, 5)) == 13


def test_pitome_protects_tokens_that_are_alone() -> None:
    x = tokens(4, 6, ())
    similarity = cosines(x) - 0.5
    energy = np.where(similarity > 0, similarity, np.expm1(similarity)).mean(1)
    ranked = np.argsort(-energy, kind="stable")[:14].tolist()
    merged = match(PiToMe(0.7), x, (4, 6))
    assert groups(merged) == bipartite(x, ranked[::2], ranked[1::2], 7)


def test_structsam_merges_into_the_flattest_of_a_cell() -> None:
    x = tokens(4, 6, ())
    padded = np.pad(x.reshape(4, 6, -1), ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth, difference = np.array([1, 2, 1]), np.array([-1, 0, 1])
    energy = np.empty((4, 6))
    for i, j in np.ndindex(4, 6):
        patch = padded[i : i + 3, j : j + 3]
        across = np.einsum("a,b,abc->c", smooth, difference, patch)
        down = np.einsum("a,b,abc->c", difference, smooth, patch)
        energy[i, j] = np.hypot(across, down).mean()
    targets = []
    for i, j in np.ndindex(2, 3):
        cell = [(2 * i + a) * 6 + 2 * j + b for a in range(2) for b in range(2)]
        targets.append(min(cell, key=lambda token: energy.flat[token]))
    sources = [token for token in range(24) if token not in targets]
    merged = match(StructSam(0.7), x, (4, 6))
    assert groups(merged) == bipartite(x, sources, targets, 7)
    assert StructSam(0.1).count(24, (4, 6)) == 6
    assert StructSam(0.1).count(25, (5, 5)) == 9


def test_kmeans_finds_clusters() -> None:
    centres = 20 * np.eye(6)
    labels = np.repeat(np.arange(6), 4)  # so that an even spacing starts once in each
    x = (centres[labels] + np.random.default_rng(2).normal(size=(24, 6))).astype(np.float32)
    merged = match(KMeans(0.25), x, (4, 6))
    assert groups(merged) == {frozenset(np.flatnonzero(labels == i).tolist()) for i in range(6)}


def operands(rows: int, columns: int) -> sequences.Sequences:
    rng = np.random.default_rng(3)
    shape = (2, 2, rows * columns)
    q, k, v = (jnp.asarray(rng.normal(size=(*shape, 8)), jnp.float32) for _ in range(3))
    rel_h, rel_w = (
        jnp.asarray(rng.normal(size=(*shape, side)), jnp.float32) for side in (rows, columns)
    )
    return sequences.Sequences(q, k, v, rel_h, rel_w, jnp.ones((2, 1, 8)), (rows, columns))


def jitted(function: Callable[..., Any], *operands: sequences.Sequences) -> Any:
    """A function of sequences, jitted: op by op takes many times as long."""
    fields = [field.name for field in dataclasses.fields(sequences.Sequences)]
    arrays = [{name: getattr(x, name) for name in fields if name != "grid"} for x in operands]
    grids = [x.grid for x in operands]

    def run(*arrays: dict[str, jax.Array]) -> Any:
        given = zip(arrays, grids, strict=True)
        return function(*(sequences.Sequences(**x, grid=grid) for x, grid in given))

    return jax.jit(run)(*arrays)


def attend(method: sequences.SequenceMethod, x: sequences.Sequences) -> np.ndarray:
    return np.asarray(jitted(lambda x: method.attend(x, False, {}), x))


def logits(x: sequences.Sequences) -> np.ndarray:
    scores = np.einsum("shqd,shkd->shqk", x.q, x.k) / np.sqrt(8)
    return scores + np.asarray(x.rel_h)[..., x.rows] + np.asarray(x.rel_w)[..., x.cols]


def attention(scores: np.ndarray, v: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("shqk,shkd->shqd", weights / weights.sum(-1, keepdims=True), v)


def test_sparge_sees_the_most_similar_blocks() -> None:
    x = operands(14, 14)  # blocks of 64, 64, 64 and 4 keys, of 128 and 68 queries
    count = SpargeAttention(0.5).kept_blocks(196)
    assert count == 2
    scores = logits(x)
    q, k = np.asarray(x.q), np.asarray(x.k)
    for i in range(2):
        queries = slice(128 * i, 128 * (i + 1))
        means = np.stack([k[:, :, 64 * j : 64 * (j + 1)].mean(2) for j in range(4)], 2)
        pooled = np.einsum("shd,shjd->shj", q[:, :, queries].mean(2), means)
        best = np.argsort(-pooled, -1)[..., :count]
        seen = (np.arange(4)[:, None] == best[..., None, :]).any(-1)
        scores[:, :, queries] = np.where(
            seen[:, :, None, np.arange(196) // 64], scores[:, :, queries], -np.inf
        )
    found = attend(SpargeAttention(0.5), x)
    np.testing.assert_allclose(found, attention(scores, np.asarray(x.v)), atol=1e-5)


def test_pisa_is_exact_where_blocks_are_uniform() -> None:
    x = operands(14, 14)
    k = np.asarray(x.k).copy()
    for j in range(4):  # equal keys and, with no bias, equal logits in every block
        k[:, :, 64 * j : 64 * (j + 1)] = k[:, :, 64 * j : 64 * j + 1]
    zero = jnp.zeros_like(x.rel_h)
    uniform = sequences.Sequences(x.q, jnp.asarray(k), x.v, zero, zero, x.key_bias, x.grid)
    expected = attention(logits(uniform), np.asarray(x.v))
    for density in (0.3, 0.6):
        found = attend(PiecewiseAttention(density), uniform)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pisa_adds_means_and_slopes_of_the_other_blocks() -> None:
    x = operands(8, 16)  # two blocks of 64 keys: one is exact, the other is approximated
    q, k, v = (np.asarray(a)[0, 0].astype(np.float64) for a in (x.q, x.k, x.v))
    scale = 8**-0.5
    blocks = [slice(0, 64), slice(64, 128)]
    slopes = [(k[b] - k[b].mean(0)).T @ v[b] for b in blocks]
    spread = [np.linalg.norm(h - (slopes[0] + slopes[1]) / 2) for h in slopes]
    scores = logits(x)[0, 0].astype(np.float64)
    found = attend(PiecewiseAttention(0.5), x)[0, 0]
    for queries in blocks:
        pooled = [q[queries].mean(0) @ k[b].mean(0) * scale for b in blocks]
        best = int(np.argmax(pooled + np.log(np.array(spread) + 1e-5)))
        exact, other = blocks[best], blocks[1 - best]
        bias = scores[queries, other] - q[queries] @ k[other].T * scale
        near = np.exp(scores[queries, exact])
        far = np.exp(q[queries] @ k[other].mean(0) * scale + bias.mean(1))
        slope = q[queries] @ (slopes[0] + slopes[1]) * scale / 128
        numerator = near @ v[exact] + far[:, None] * (v[other].sum(0) + 64 * slope)
        expected = numerator / (near.sum(1) + 64 * far)[:, None]
        np.testing.assert_allclose(found[queries], expected, atol=1e-4)


def test_merged_keys_count_as_often_as_they_have_tokens() -> None:
    x = operands(4, 6)
    k, v = np.asarray(x.k).copy(), np.asarray(x.v).copy()
    # Pairs of equal tokens merge without loss, position bias aside.
    k[:, :, 1::2], v[:, :, 1::2] = k[:, :, ::2], v[:, :, ::2]
    zero_h, zero_w = jnp.zeros_like(x.rel_h), jnp.zeros_like(x.rel_w)
    pairs = sequences.Sequences(
        x.q, jnp.asarray(k), jnp.asarray(v), zero_h, zero_w, x.key_bias * 0, x.grid
    )
    method = ToMe(0.5)

    def run(pairs: sequences.Sequences, x: sequences.Sequences) -> tuple[jax.Array, ...]:
        state: sequences.State = {}
        found = method.attend(pairs, True, state)
        assert list(state) == ["merged True"]
        return found, method.attend(x, True, state), method.attend(x, True, {})

    found, again, alone = jitted(run, pairs, x)
    np.testing.assert_allclose(found, attention(logits(pairs), v), atol=1e-5)
    # A later block of the kind follows the first one.
    assert np.abs(again - alone).max() > 1e-3


def test_attention_in_chunks_is_attention() -> None:
    x = operands(20, 15)  # more than a chunk's 256 queries
    expected = attention(logits(x), np.asarray(x.v))
    np.testing.assert_allclose(jitted(sequences.dense_attention, x), expected, atol=1e-5)


def test_work_is_what_shapes_say() -> None:
    dense = encoder_work(CONFIG)
    half = methods.work(CONFIG, "tome", 0.5)
    tokens, d, head = 64, CONFIG.embed_dim, CONFIG.head_dim
    windows, each = 4, 25
    first, middle, last = half.blocks
    assert first.attention == last.attention == windows * d * (2 * each * 13 + each * 10)
    assert middle.attention == d * (2 * tokens * 32 + tokens * 16)
    assert (first.mlp, middle.mlp) == (dense.blocks[0].mlp // 2, dense.blocks[1].mlp)
    matching = 32 * 32 * d
    assert first.extra == matching + windows * CONFIG.num_heads * 13 * 12 * head
    assert last.extra == matching
    assert middle.extra == CONFIG.num_heads * 32 * 32 * head
    assert methods.work(CONFIG, "tome", 0.3) == half
    kmeans = methods.work(CONFIG, "kmeans", 0.5)
    assert kmeans.blocks[0].attention == dense.blocks[0].attention
    assert kmeans.blocks[0].extra == 5 * 64 * 32 * d
    sparge = methods.work(CONFIG, "sparge", 0.5)
    assert [block.mlp for block in sparge.blocks] == [block.mlp for block in dense.blocks]


def test_gradients_are_not_needed_but_dtypes_are(sam: Sam) -> None:
    x = operands(4, 6)
    low = sequences.Sequences(
        *(a.astype(jnp.bfloat16) for a in (x.q, x.k, x.v)),
        x.rel_h,
        x.rel_w,
        x.key_bias.astype(jnp.bfloat16),
        x.grid,
    )
    for cls in CLASSES.values():
        out = jax.eval_shape(lambda cls=cls: cls(0.5).attend(low, True, {}))
        assert (out.shape, out.dtype) == (x.q.shape, jnp.bfloat16)
