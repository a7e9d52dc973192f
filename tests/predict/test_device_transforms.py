"""Photos and masks resized on the device, beside the same on the host."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from models import random_weights
from PIL import Image

from sparsesam_jax import Sam, SamPredictor
from sparsesam_jax.model import transforms
from sparsesam_jax.predict import device_transforms
from sparsesam_jax.predict.device_transforms import matrix_taps, pillow_taps


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Sam:
    folder = tmp_path_factory.mktemp("device_transforms")
    return Sam.from_pretrained(random_weights(folder / "small.safetensors"))


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


def test_taps_are_pillows():
    for inputs, outputs in np.random.default_rng(0).integers(1, 400, (200, 2)).tolist():
        image = photo(1, inputs)[..., 0]
        first, weights = pillow_taps(inputs, outputs)
        place = np.minimum(first[:, None] + np.arange(weights.shape[1]), inputs - 1)
        levels = (image[0].astype(np.int64)[place] * weights).sum(1) + (1 << 21) >> 22
        want = Image.fromarray(image).resize((outputs, 1), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(levels, np.asarray(want)[0])


# Sizes that share a program and sizes that do not; smaller and larger than the input.
SIZES = [(60, 90), (61, 91), (90, 60), (128, 128), (33, 57), (1, 5), (500, 700), (300, 20)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resize_and_pad(size):
    image = photo(*size)
    want, resized = transforms.resize_and_pad(image, 128)
    got, got_size = device_transforms.resize_and_pad(image, 128)
    assert got_size == resized
    difference = np.abs(np.asarray(got).astype(int) - want)
    # Pillow 13 takes rows first where a photo is that much higher than wide.
    assert difference.max() <= (1 if size[0] > 2 * size[1] else 0)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("at_once", [2**28, 1], ids=["at once", "one by one"])
def test_resize_masks(size, at_once, monkeypatch):
    monkeypatch.setattr(device_transforms, "_MAX_PIXELS", at_once)
    low_res = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    frame = ((128, 128), transforms.resized_shape(*size, 128), size)
    want = transforms.resize_masks(low_res, 3, *frame, return_logits=True)
    got = device_transforms.resize_masks(jnp.asarray(low_res), 3, *frame, return_logits=True)
    assert got.shape == (3, 3, *size)
    np.testing.assert_allclose(got, want, atol=2e-6)
    masks = device_transforms.resize_masks(jnp.asarray(low_res), 3, *frame)
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks[np.abs(want) > 1e-5], want[np.abs(want) > 1e-5] > 0)


def test_matrix_taps_give_the_matrix_back():
    matrix = np.array([[0, 0.5, 0.5, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    first, weights = matrix_taps(matrix)
    again = np.zeros_like(matrix)
    np.put_along_axis(again, first[:, None] + np.arange(weights.shape[1]), weights, axis=1)
    np.testing.assert_array_equal(again, matrix)


def test_sizes_share_programs():
    frame = ((128, 128), (85, 128), (60, 90))
    low_res = jnp.zeros((1, 3, 32, 32))
    device_transforms.resize_masks(low_res, 1, *frame)
    device_transforms.resize_and_pad(photo(60, 90), 128)
    sizes = device_transforms._resize._cache_size(), device_transforms._resize_flat._cache_size()
    for height, width in ((60, 91), (59, 90), (61, 89)):
        resized = transforms.resized_shape(height, width, 128)
        device_transforms.resize_masks(low_res, 1, (128, 128), resized, (height, width))
        device_transforms.resize_and_pad(photo(height, width), 128)
    assert sizes == (
        device_transforms._resize._cache_size(),
        device_transforms._resize_flat._cache_size(),
    )


def test_predictor_on_the_device_equals_the_host(sam):
    photos = [photo(60, 90), photo(100, 40)]
    found = []
    for where in ("host", "device"):
        predictor = SamPredictor(sam, transforms=where)
        predictor.set_image_batch(photos)
        points = [np.array([[[20.0, 30.0]], [[8.0, 9.0]]]), np.array([[20.0, 30.0]])]
        labels = [np.ones((2, 1)), np.ones(1)]
        found.append(predictor.predict_batch(points, labels, return_logits=True))
    for host, device in zip(*found, strict=True):
        for one, other in zip(host, device, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def test_unknown_place(sam):
    with pytest.raises(ValueError, match="transforms must be one of auto, host, device; got 'gpu'"):
        SamPredictor(sam, transforms="gpu")  # pyright: ignore


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1200, 1800), (480, 640), (1000, 700)], ids=str)
def test_on_gpu(size):
    image = photo(*size)
    want, resized = transforms.resize_and_pad(image, 1024)
    np.testing.assert_array_equal(device_transforms.resize_and_pad(image, 1024)[0], want)
    low_res = np.random.default_rng(0).normal(size=(4, 3, 256, 256)).astype(np.float32)
    frame = ((1024, 1024), resized, size)
    got = device_transforms.resize_masks(jnp.asarray(low_res), 3, *frame, return_logits=True)
    want = transforms.resize_masks(low_res, 3, *frame, return_logits=True)
    np.testing.assert_allclose(got, want, atol=1e-5)
