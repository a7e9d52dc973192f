"""Embeddings saved, loaded and set; predictors pickled, copied, shared by threads, refreshed."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from models import SMALL, random_weights
from safetensors.numpy import save_file

from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.predict.embedding import Embedding

BOX = np.array([10.0, 20.0, 60.0, 50.0])
HQ = dataclasses.replace(SMALL, hq=True)


def photo(height: int = 70, width: int = 90, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_weights(tmp_path_factory.mktemp("embedding") / "small.safetensors")


@pytest.fixture(scope="module")
def predictor(weights: Path) -> SamPredictor:
    predictor = SamPredictor(Sam.from_pretrained(weights))
    predictor.set_image(photo())
    return predictor


def assert_same(one: tuple, other: tuple) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [SMALL, HQ], ids=["sam", "hq"])
def test_saved_and_loaded(tmp_path, dtype, config):
    weights = random_weights(tmp_path / "w.safetensors", config)
    predictor = SamPredictor(Sam.from_pretrained(weights, dtype=dtype))
    predictor.set_image_batch([photo(), photo(40, 30, 1)])
    predictor.embedding.save(tmp_path / "e.safetensors")
    loaded = Embedding.load(tmp_path / "e.safetensors")
    assert loaded.features.dtype == dtype and loaded.sizes == predictor.embedding.sizes
    # With the decoder's weights alone.
    other = SamPredictor(Sam.decoder_from_pretrained(weights, dtype=dtype))
    assert not hasattr(other.sam, "image_encoder") and not other.compiled.has_encoder
    with pytest.raises(RuntimeError, match="no image is set"):
        other.predict()
    other.embedding = loaded
    boxes = [BOX, BOX / 2]
    for one, two in zip(
        predictor.predict_batch(box_batch=boxes), other.predict_batch(box_batch=boxes), strict=True
    ):
        assert_same(tuple(one), tuple(two))
    with pytest.raises(RuntimeError, match="this model has no image encoder"):
        other.set_image(photo())


def test_embeddings_cross_dtypes_and_densities(weights: Path, predictor: SamPredictor):
    """Encoded sparsely in bfloat16, decoded in float32: the decoder's weights are the same."""
    sam = Sam.from_pretrained(weights, dtype="bfloat16", sparsity=Sparsity(0.4, block_size=16))
    fast = SamPredictor(sam)
    fast.set_image(photo())
    other = SamPredictor(Sam.decoder_from_pretrained(weights))
    other.embedding = fast.embedding
    scores = other.predict(box=BOX)[1]
    np.testing.assert_allclose(scores, fast.predict(box=BOX)[1], atol=0.1)
    assert other.embedding.features.dtype == "float32"


def test_another_models_embedding_is_refused(tmp_path, predictor: SamPredictor):
    other = SamPredictor(Sam.from_pretrained(random_weights(tmp_path / "o.safetensors", seed=1)))
    with pytest.raises(ValueError, match="embedding must be for this predictor's decoder"):
        other.embedding = predictor.embedding
    assert not other.is_image_set


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "must be a file that Embedding.save wrote, got format None"),
        ({"format": "sparsesam_jax.embedding"}, "must have sizes, a fingerprint and a frame"),
    ],
)
def test_other_files_are_refused(tmp_path, metadata: dict, message: str):
    save_file({"features": np.zeros((1, 2, 2, 3), np.float32)}, tmp_path / "x.st", metadata)
    with pytest.raises(ValueError, match=message):
        Embedding.load(tmp_path / "x.st")
    with pytest.raises(ValueError, match="path must be a file, got"):
        Embedding.load(tmp_path / "none.st")
    with pytest.raises(ValueError, match="features must be"):
        Embedding(np.zeros((1, 2, 2, 3)), None, (), "")


def test_pickle_and_deepcopy(predictor: SamPredictor):
    expected = predictor.predict(box=BOX)
    for other in (pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor)):
        assert_same(other.predict(box=BOX), expected)
        other.set_image(photo(40, 40))
        assert other.predict(box=BOX)[0].shape == (3, 40, 40)
    assert predictor.embedding.sizes[0].original == (70, 90)
    sam = pickle.loads(pickle.dumps(predictor.sam))
    again = SamPredictor(sam)
    again.set_image(photo())
    assert_same(again.predict(box=BOX), expected)
    small = predictor.without_encoder()
    assert len(pickle.dumps(small)) < len(pickle.dumps(predictor))
    assert_same(small.predict(box=BOX), expected)


def _predict_in_worker(predictor: SamPredictor) -> tuple:
    return predictor.predict(box=BOX)


def test_travels_to_a_spawned_worker(predictor: SamPredictor):
    # An executor says so where a worker dies; a pool would wait for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        found = executor.submit(_predict_in_worker, predictor).result(timeout=300)
    for a, b in zip(found, predictor.predict(box=BOX), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_threads_never_mix_two_images(predictor: SamPredictor):
    """Whatever image another thread sets, masks have the size that their features have."""
    shared = copy.copy(predictor)
    photos = [photo(70, 90), photo(90, 70, 1)]
    expected = []
    for image in photos:
        shared.set_image(image)
        expected.append(shared.predict(box=BOX))
    by_shape = {masks.shape: result for result in expected for masks in result[:1]}
    stop = threading.Event()

    def set_images() -> None:
        while not stop.is_set():
            for image in photos:
                shared.set_image(image)

    setter = threading.Thread(target=set_images)
    setter.start()
    try:
        for _ in range(40):
            result = shared.predict(box=BOX)
            assert_same(result, by_shape[result[0].shape])
    finally:
        stop.set()
        setter.join()
    # And a copy has an image of its own.
    assert_same(predictor.predict(box=BOX), expected[0])


def test_refresh_takes_changed_parameters(weights: Path):
    sam = Sam.from_pretrained(weights)
    predictor = SamPredictor(sam)
    predictor.set_image(photo())
    before, name = predictor.predict(box=BOX), predictor.fingerprint
    other = Sam.from_pretrained(random_weights(weights.with_name("n.safetensors"), seed=3))
    nnx.update(sam, nnx.state(other))
    assert_same(predictor.predict(box=BOX), before)
    predictor.refresh()
    assert not predictor.is_image_set and predictor.fingerprint != name
    predictor.set_image(photo())
    assert not np.array_equal(predictor.predict(box=BOX)[2], before[2])
