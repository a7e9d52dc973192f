"""Packed bits and run lengths, beside numpy and pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from models import random_weights
from pycocotools import mask as coco

from sparsesam_jax import Sam, SamPredictor
from sparsesam_jax.predict.mask_formats import (
    encode_packed,
    encode_rle,
    packed_run_lengths,
    rle_text,
    run_lengths,
)


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_run_lengths_are_pycocotools(mask: np.ndarray):
    assert encode_rle(mask) == coco.encode(np.asfortranarray(mask.astype(np.uint8)))


def packed_by_columns(mask: np.ndarray) -> np.ndarray:
    height, width = mask.shape
    lines = np.zeros((width, 64 * (height // 64 + 1)), bool)
    lines[:, :height] = mask.T
    return np.packbits(lines, axis=1, bitorder="little")


@given(
    hnp.arrays(bool, st.tuples(st.sampled_from([1, 5, 63, 64, 65, 128]), st.integers(1, 9))),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_packed_masks_have_the_same_run_lengths(mask: np.ndarray, corner: tuple[int, int]):
    packed = packed_by_columns(mask)
    assert encode_packed(packed, mask.shape) == encode_rle(mask)
    whole = np.pad(mask, ((corner[1], 1), (corner[0], 2)))
    lengths = packed_run_lengths(packed, whole.shape, corner)
    assert lengths.tolist() == run_lengths(whole).tolist()


def test_long_runs():
    mask = np.zeros((3000, 2000), bool)
    mask[100:2900, 3:1990] = True
    mask[::7, 1000] = False
    assert encode_rle(mask) == coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode_rle(~mask) == coco.encode(np.asfortranarray((~mask).astype(np.uint8)))


@given(st.lists(st.integers(0, 2**29), min_size=1, max_size=9))
def test_text_of_any_lengths(lengths: list[int]):
    expected = coco.frPyObjects({"size": [1, sum(lengths)], "counts": lengths}, 1, sum(lengths))
    assert rle_text(np.array(lengths)) == expected["counts"]


def test_run_lengths_begin_with_zeros():
    assert run_lengths(np.array([[True, False]])).tolist() == [0, 1, 1]
    assert run_lengths(np.array([[False], [True]])).tolist() == [1, 1]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> SamPredictor:
    path = random_weights(tmp_path_factory.mktemp("formats") / "small.safetensors")
    predictor = SamPredictor(Sam.from_pretrained(path))
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (90, 123, 3), np.uint8))
    return predictor


@pytest.mark.parametrize("count", [1, 2, 7])  # one prompt, one call, several calls
def test_predictors_formats(predictor: SamPredictor, count: int):
    boxes = np.array([[10.0, 20.0, 90.0, 70.0]]) + np.arange(count)[:, None]
    masks, scores, logits = predictor.predict(box=boxes)
    packed, *others = predictor.predict(box=boxes, mask_format="packed")
    np.testing.assert_array_equal(np.unpackbits(packed, axis=-1, count=123), masks)
    runs, *more = predictor.predict(box=boxes, mask_format="rle")
    flat = runs if count == 1 else [run for prompt in runs for run in prompt]
    for run, mask in zip(flat, masks.reshape(-1, 90, 123), strict=True):
        np.testing.assert_array_equal(coco.decode(run), mask)
    for scores_too, logits_too in (others, more):
        np.testing.assert_array_equal(scores_too, scores)
        np.testing.assert_array_equal(logits_too, logits)
    batch = predictor.predict_batch(box_batch=[boxes], mask_format="rle")
    assert batch[0][0] == runs


def test_unknown_format(predictor: SamPredictor):
    with pytest.raises(ValueError, match="mask_format must be one of binary, packed, rle; got 'x'"):
        predictor.predict(mask_format="x")  # pyright: ignore
    with pytest.raises(ValueError, match="mask_format must be 'binary' with return_logits"):
        predictor.predict(mask_format="rle", return_logits=True)
