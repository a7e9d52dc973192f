"""Areas and boxes of masks on a device, beside those that the host counts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from sparsesam_jax.model.transforms import mask_resize_matrices, resized_shape
from sparsesam_jax.predict import mask_measures
from sparsesam_jax.predict.mask_measures import measure_on_device, measure_on_host

SIDE = 128
LOW = (SIDE // 4, SIDE // 4)


def frame(size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return (SIDE, SIDE), resized_shape(*size, SIDE), size


@pytest.mark.parametrize(
    "size",
    [(90, 120), (150, 70), (1, 1), (3, 2), (1, 300), (300, 1), (33, 31), (700, 500)],
    ids=str,
)
def test_as_on_the_host(monkeypatch, size: tuple[int, int]):
    """Also in several programs, of many masks and of few, and where masks are empty or all."""
    rows, cols = mask_measures._cells(LOW, *frame(size))
    slots = len(rows.pixels) * len(cols.pixels)
    monkeypatch.setattr(mask_measures, "MEASURED_SLOTS", 8 * slots)
    noise = np.random.default_rng(0).normal(size=(4, 3, *LOW))
    low_res = 8 * scipy.ndimage.gaussian_filter(noise, (0, 0, 2, 2)).astype(np.float32)
    low_res[0, 1], low_res[1, 2] = -3, 3
    which = np.array([11, 1, 5, 0, 2, 3, 4, 6, 7, 8, 9])
    got = measure_on_device(jnp.asarray(low_res), which, *frame(size), offset=0.3)()
    want = measure_on_host(low_res, which, *frame(size), offset=0.3)()
    assert want.area[1] == 0 and want.area[2] == size[0] * size[1]
    # Sums in another order: a logit may fall on the other side of the threshold.
    for a, b in zip(got[:3], want[:3], strict=True):
        np.testing.assert_allclose(a, b, atol=1 + 1e-4 * size[0] * size[1])
    np.testing.assert_array_equal(got.boxes, want.boxes)


def test_no_masks():
    low_res = jnp.zeros((2, *LOW))
    got = measure_on_device(low_res, np.zeros(0, int), *frame((9, 9)), offset=1.0)()
    assert [len(x) for x in got] == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [(1200, 1800), (1365, 2048), (6000, 8000), (50, 4000)], ids=str)
def test_every_pixel_has_its_weights(size: tuple[int, int]):
    """At SAM's 1024: the three low-resolution pixels of a cell are all that its pixels need."""
    sizes = ((256, 256), (1024, 1024), resized_shape(*size, 1024), size)
    for cells, matrix in zip(
        mask_measures._cells(*sizes), mask_resize_matrices(*sizes), strict=True
    ):
        used = ~np.isnan(cells.weights[..., 0]).reshape(-1)
        assert cells.pixels[used].tolist() == list(range(len(matrix)))
        weights = cells.weights.reshape(-1, 3)[used]
        np.testing.assert_allclose(weights.sum(1), matrix.sum(1), atol=1e-6)
