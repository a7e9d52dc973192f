"""`Sam.compiled()`: the model's methods with its parameters taken apart once."""

from __future__ import annotations

import copy
import pickle
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_weights

from sparsesam_jax import Sam, Sparsity

POINTS = np.array([[[[20.0, 10.0], [70.0, 55.0]]]], np.float32)
LABELS = np.array([[[2, 3]]], np.int32)


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Sam:
    return Sam.from_pretrained(random_weights(tmp_path_factory.mktemp("c") / "small.safetensors"))


@pytest.mark.parametrize("sparsity", [None, Sparsity(0.4, block_size=16)], ids=["dense", "sparse"])
@pytest.mark.parametrize("size", [(128, 128), (96, 160)], ids=str)
def test_methods_are_the_models(sam: Sam, sparsity: Sparsity | None, size: tuple[int, int]):
    sam = sam.with_sparsity(sparsity)
    run = sam.compiled()
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32))
    embedding, expected = run.encode(pixels), sam.encode(pixels)
    np.testing.assert_allclose(embedding.features, expected.features, atol=1e-4)
    points, labels = (np.repeat(x, 2, 0) for x in (POINTS, LABELS))
    low_res, iou = run.decode(expected, points, labels, multimask_output=False)
    want, want_iou = sam.decode(
        expected, jnp.asarray(points), jnp.asarray(labels), multimask_output=False
    )
    np.testing.assert_allclose(low_res, want, atol=1e-4)
    np.testing.assert_allclose(iou, want_iou, atol=1e-5)
    second, _ = run.decode(expected, points[1:], labels[1:], first=1, multimask_output=False)
    np.testing.assert_allclose(second[0], want[1], atol=1e-4)


def test_the_whole_model(sam: Sam):
    images = np.random.default_rng(0).integers(0, 256, (1, 60, 90, 3), np.uint8)
    got = sam.compiled()(images, POINTS, LABELS, return_logits=True)
    want = sam(*(jnp.asarray(x) for x in (images, POINTS, LABELS)), return_logits=True)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_keeps_its_parameters_pickles_and_copies(sam: Sam):
    pixels = np.zeros((1, 128, 128, 3), np.float32)
    mine = copy.deepcopy(sam)
    run = mine.compiled()
    expected = run.encode(pixels).features
    for other in (pickle.loads(pickle.dumps(run)), copy.deepcopy(run)):
        np.testing.assert_array_equal(other.encode(pixels).features, expected)
    nnx.update(mine, jax.tree.map(lambda x: x * 2, nnx.state(mine)))
    np.testing.assert_array_equal(run.encode(pixels).features, expected)
    assert not np.array_equal(mine.compiled().encode(pixels).features, expected)
    with pytest.raises(RuntimeError, match="this model has no image encoder"):
        run.without_encoder().encode(pixels)


def test_a_call_costs_what_a_bare_jit_does(sam: Sam):
    """At most 0.3 ms more than a jitted function of the flat list of parameters."""
    run = sam.compiled()
    pixels = jnp.zeros((1, 16, 16, 3))  # one patch: the time is that of the call
    leaves, tree = jax.tree.flatten(nnx.split(sam)[1])
    graphdef = nnx.split(sam)[0]

    @jax.jit
    def bare(leaves: list[jax.Array], pixels: jax.Array):
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves)).encode(pixels)

    def milliseconds(call) -> float:
        jax.block_until_ready(call())
        times = []
        for _ in range(200):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
        return 1e3 * min(times)

    assert milliseconds(lambda: run.encode(pixels)) <= (
        milliseconds(lambda: bare(leaves, pixels)) + 0.3
    )
