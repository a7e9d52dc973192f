"""Photos and masks resized on the device, beside the same on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_weights
from PIL import Image

from sparsesam_jax import Sam, SamPredictor
from sparsesam_jax.model import transforms
from sparsesam_jax.predict import copying, device_transforms
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
@pytest.mark.parametrize("pixels", [(2**20, 2**23), (5008,)], ids=["at once", "in pieces"])
def test_resize_masks(size, pixels, monkeypatch):
    monkeypatch.setattr(device_transforms, "_MASK_PIXELS", pixels)
    monkeypatch.setattr(copying, "_BYTES", 999)  # so that several threads copy
    low_res = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    frame = ((128, 128), transforms.resized_shape(*size, 128), size)
    which = range(1, 4)
    want = transforms.resize_masks(low_res, which, *frame, return_logits=True)
    got = device_transforms.resize_masks(jnp.asarray(low_res), which, *frame, return_logits=True)
    assert got.shape == (3, 3, *size)
    np.testing.assert_allclose(got, want, atol=2e-6)
    masks = device_transforms.resize_masks(jnp.asarray(low_res), which, *frame)
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks[np.abs(want) > 1e-5], want[np.abs(want) > 1e-5] > 0)
    room = np.zeros((5, *masks.shape[1:]), bool)
    device_transforms.resize_masks(jnp.asarray(low_res), which, *frame, out=room[1:4])
    np.testing.assert_array_equal(room, np.pad(masks, ((1, 1), (0, 0), (0, 0), (0, 0))))
    rows = device_transforms.resize_masks(jnp.asarray(low_res), which, *frame, packing="rows")
    np.testing.assert_array_equal(rows, np.packbits(masks, axis=-1))
    columns = device_transforms.resize_masks(jnp.asarray(low_res), which, *frame, packing="columns")
    assert columns.shape[-1] % 8 == 0 and not (columns[..., -1] & 0x80).any()
    bits = np.unpackbits(columns, axis=-1, bitorder="little")
    np.testing.assert_array_equal(bits[..., : size[0]], masks.swapaxes(2, 3))
    assert not bits[..., size[0] :].any()
    host = transforms.resize_masks(low_res, which, *frame, packing="columns")
    assert host.shape == columns.shape and (host != columns).mean() < 1e-3


def test_matrix_taps_give_the_matrix_back():
    matrix = np.array([[0, 0.5, 0.5, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    first, weights = matrix_taps(matrix)
    again = np.zeros_like(matrix)
    np.put_along_axis(again, first[:, None] + np.arange(weights.shape[1]), weights, axis=1)
    np.testing.assert_array_equal(again, matrix)


def test_photos_of_all_sizes_share_twelve_programs(sam, monkeypatch):
    """Everything is counted that a predictor compiles from its first photo on."""
    compiled: list[str] = []

    def count(event: str, _seconds: float, **_details: str) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    # As many pixels for SMALL's 128 as the real steps are for SAM's 1024.
    monkeypatch.setattr(device_transforms, "_MASK_PIXELS", (2**14, 7 * 2**14, 2**18, 2**19, 2**20))
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    predictor = SamPredictor(sam, transforms="device")
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(12, 500, (60, 2)).tolist(), [500, 12], [12, 500], [500, 500]]
    for height, width in sizes:
        image = photo(height, width)
        predictor.set_image(image)
        masks, _, _ = predictor.predict(box=np.array([0, 0, width, height]))
        assert masks.shape == (3, height, width)
        padded, _ = device_transforms.resize_and_pad(image, 128)
        want, _ = transforms.resize_and_pad(image, 128)
        difference = np.abs(np.asarray(padded).astype(int) - want)
        assert difference.max() <= (1 if height > 2 * width else 0)
    assert 8 <= len(compiled) <= 12


def test_gigantic_photos_are_resized_on_the_host(monkeypatch):
    monkeypatch.setattr(device_transforms, "_INDICES", 3 * 256**2)
    image = photo(200, 300)
    want, resized = transforms.resize_and_pad(image, 128)
    got, got_size = device_transforms.resize_and_pad(image, 128)
    assert got_size == resized
    np.testing.assert_array_equal(got, want)


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
    got = device_transforms.resize_masks(jnp.asarray(low_res), range(3), *frame, return_logits=True)
    want = transforms.resize_masks(low_res, range(3), *frame, return_logits=True)
    np.testing.assert_allclose(got, want, atol=1e-5)
