"""`SamPredictor`: SAM's interface, static shapes, and what it says of bad input."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import SMALL, random_weights

from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.model import transforms
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.mask_decoder import MaskDecoder
from sparsesam_jax.predict import predictor as predictor_module
from sparsesam_jax.predict.embedding import Embedding

BOX = np.array([10.0, 20.0, 90.0, 70.0])
POINTS, LABELS = np.array([[40.0, 50.0], [80.0, 20.0]]), np.array([1, 0])


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Sam:
    return Sam.from_pretrained(
        random_weights(tmp_path_factory.mktemp("predictor") / "small.safetensors")
    )


def photo(height: int = 90, width: int = 120, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def predictor(sam: Sam) -> SamPredictor:
    predictor = SamPredictor(sam)
    predictor.set_image(photo())
    return predictor


def test_shapes_and_dtypes(predictor: SamPredictor):
    masks, iou, low_res = predictor.predict(POINTS, LABELS)
    assert masks.shape == (3, 90, 120)
    assert masks.dtype == bool
    assert iou.shape == (3,)
    assert low_res.shape == (3, 32, 32)
    masks, _, _ = predictor.predict(box=BOX, multimask_output=False, return_logits=True)
    assert masks.shape == (1, 90, 120)
    assert masks.dtype == np.float32
    masks, iou, low_res = predictor.predict(box=np.stack([BOX, BOX + 5, BOX - 5]))
    assert masks.shape == (3, 3, 90, 120)
    assert iou.shape == (3, 3)
    assert low_res.shape == (3, 3, 32, 32)


def test_many_prompts_are_the_prompts_one_by_one(predictor: SamPredictor):
    boxes = np.stack([BOX, BOX + 7, BOX - 9])
    together = predictor.predict(np.tile(POINTS, (3, 1, 1)), np.tile(LABELS, (3, 1)), boxes)
    for index, box in enumerate(boxes):
        alone = predictor.predict(POINTS, LABELS, box)
        np.testing.assert_allclose(together[2][index], alone[2], atol=1e-4)
        np.testing.assert_allclose(together[1][index], alone[1], atol=1e-5)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint64, np.float16, np.float64])
def test_the_labels_dtype_changes_nothing(sam: Sam, predictor: SamPredictor, dtype: type):
    """SAM adds a point of label -1, which a bool or an unsigned integer cannot hold."""
    expected = predictor.predict(POINTS, LABELS)
    labels = LABELS.astype(dtype)
    batch = predictor.predict_batch([POINTS], [labels])
    for got in (predictor.predict(POINTS, labels), [field[0] for field in batch]):
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    if dtype != np.float64:  # which JAX rounds
        image, points = jnp.asarray(photo()[None]), jnp.asarray(POINTS[None, None], jnp.float32)
        pure = [sam(image, points, jnp.asarray(x)[None, None]) for x in (labels, LABELS)]
        np.testing.assert_array_equal(pure[0].low_res_logits, pure[1].low_res_logits)


def test_a_previous_mask_is_a_prompt(predictor: SamPredictor):
    _, _, low_res = predictor.predict(box=BOX, multimask_output=False)
    again = predictor.predict(box=BOX, mask_input=low_res, multimask_output=False)
    assert np.abs(again[2] - low_res).max() > 1e-4
    batched = predictor.predict(
        box=np.stack([BOX] * 2), mask_input=np.stack([low_res] * 2), multimask_output=False
    )
    np.testing.assert_allclose(batched[2][1], again[2], atol=1e-4)


def test_batch_is_image_by_image(sam: Sam):
    """Images and prompts of different sizes and numbers share one call each."""
    images = [photo(), photo(200, 60, 1), photo(64, 64, 2)]
    predictor = SamPredictor(sam)
    predictor.set_image_batch(images)
    masks, iou, low_res = predictor.predict_batch(
        point_coords_batch=[POINTS, None, POINTS[:1]],
        point_labels_batch=[LABELS, None, LABELS[:1]],
        box_batch=[None, BOX[[1, 0, 3, 2]], np.stack([BOX / 2] * 2)],
    )
    assert [m.shape for m in masks] == [(3, 90, 120), (3, 200, 60), (2, 3, 64, 64)]
    alone = SamPredictor(sam)
    prompts = [
        {"point_coords": POINTS, "point_labels": LABELS},
        {"box": BOX[[1, 0, 3, 2]]},
        {
            "point_coords": POINTS[:1],
            "point_labels": LABELS[:1],
            "box": np.stack([BOX / 2] * 2),
        },
    ]
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        alone.set_image(image)
        expected = alone.predict(**prompt)
        np.testing.assert_allclose(low_res[index], expected[2], atol=1e-3)
        np.testing.assert_allclose(iou[index], expected[1], atol=1e-4)
        assert (masks[index] == expected[0]).mean() > 0.999


def test_bgr(sam: Sam):
    rgb, bgr = SamPredictor(sam), SamPredictor(sam)
    rgb.set_image(photo())
    bgr.set_image(photo()[..., ::-1], image_format="BGR")
    np.testing.assert_array_equal(rgb.get_image_embedding(), bgr.get_image_embedding())


def test_one_compilation_serves_all_photos_and_prompts(tmp_path, monkeypatch):
    """Counts tracings: Python runs the modules' `__call__` only while a function is traced."""
    traced = {"encoder": 0, "decoder": 0}
    for name, module, method in (
        ("encoder", ImageEncoder, "block_outputs"),
        ("decoder", MaskDecoder, "__call__"),
    ):
        original = getattr(module, method)

        def counted(*args, original=original, name=name, **kwargs):
            traced[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, method, counted)
    # Sizes of its own, so that no other test has compiled this model.
    config = dataclasses.replace(SMALL, decoder_mlp_dim=48)
    sam = Sam.from_pretrained(
        random_weights(tmp_path / "sam.safetensors", config),
        sparsity=Sparsity(0.37, block_size=16),
    )
    predictor = SamPredictor(sam)
    for size in ((90, 120), (300, 40), (256, 256), (1, 1)):
        predictor.set_image(photo(*size))
        predictor.predict(box=BOX)
        predictor.predict(POINTS, LABELS)
        predictor.predict(POINTS[:1], LABELS[:1], BOX)
    assert traced == {"encoder": 1, "decoder": 1}
    other = SamPredictor(sam)  # and a predictor of the same model compiles nothing
    other.set_image(photo())
    other.predict(box=BOX)
    assert traced == {"encoder": 1, "decoder": 1}


def test_postprocessing_is_sams(predictor: SamPredictor):
    """The masks equal torch's two bilinear resizes with the crop between them."""
    torch = pytest.importorskip("torch")
    logits, _, low_res = predictor.predict(box=BOX, return_logits=True)
    resize = {"mode": "bilinear", "align_corners": False}
    full = torch.nn.functional.interpolate(torch.tensor(low_res[None]), (128, 128), **resize)
    cropped = full[..., :96, :128]
    expected = torch.nn.functional.interpolate(cropped, (90, 120), **resize)[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_preprocessing_inside_jit_is_the_hosts():
    """The jitted resize is within one level of Pillow's, for shrinking and enlarging."""

    for size in ((90, 120), (700, 500)):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        padded, resized = transforms.resize_and_pad(image, 256)
        host = transforms.normalise(jnp.asarray(padded[None]), jnp.array([resized]))
        inside = transforms.preprocess(jnp.asarray(image[None]), 256)
        level = 1 / transforms.PIXEL_STD.min()
        np.testing.assert_allclose(inside, host, atol=1.001 * level)
        # Pillow also rounds between its two passes, which moves one value in six by a level.
        assert np.abs(np.asarray(inside) - np.asarray(host)).mean() < 0.25 * level


def test_other_image_size(sam: Sam):
    predictor = SamPredictor(sam, image_size=192)
    predictor.set_image(photo())
    assert predictor.get_image_embedding().shape == (1, 12, 12, 32)
    assert predictor.predict(box=BOX)[0].shape == (3, 90, 120)
    with pytest.raises(ValueError, match="image_size must be a multiple of 16"):
        SamPredictor(sam, image_size=100)


def test_needs_an_image(sam: Sam, predictor: SamPredictor):
    empty = SamPredictor(sam)
    assert not empty.is_image_set
    for call in (empty.predict, empty.predict_batch, empty.get_image_embedding):
        with pytest.raises(RuntimeError, match="no image is set"):
            call()
    assert predictor.is_image_set
    predictor.reset_image()
    assert not predictor.is_image_set
    predictor.set_image_batch([photo(), photo()])
    with pytest.raises(RuntimeError, match="predict needs one image"):
        predictor.predict(box=BOX)


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.zeros((4, 4), np.uint8), r"uint8 \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8 \(4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
    ],
)
def test_bad_images(sam: Sam, image, got: str):
    check = predictor_module.check_image
    with pytest.raises(ValueError, match=f"image must .*{got}"):
        check(image)


@given(
    dtype=st.sampled_from([np.uint8, np.int8, np.int64, np.uint16, bool, np.float16, np.float64]),
    sides=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    channels=st.sampled_from([(), (1,), (3,), (3,), (3,), (4,)]),
    layout=st.sampled_from(["c", "fortran", "reversed", "strided", "read-only"]),
)
def test_any_image_is_taken_or_refused(sam: Sam, dtype, sides, channels, layout):
    """What is no RGB of uint8 is refused in one line; how it lies in memory changes nothing."""
    image = np.random.default_rng(0).integers(0, 100, (*sides, *channels)).astype(dtype)
    other = {
        "c": image,
        "fortran": np.asfortranarray(image),
        "reversed": image[::-1].copy()[::-1],
        "strided": np.repeat(image, 2, 0)[::2],
        "read-only": image.copy(),
    }[layout]
    other.flags.writeable = layout != "read-only"
    predictor = SamPredictor(sam)
    if dtype != np.uint8 or channels != (3,) or not image.size:
        with pytest.raises(ValueError, match=r"^image must [^\n]*, got [^\n]*$"):
            predictor.set_image(other)
        return
    predictor.set_image(other)
    masks, scores, _ = predictor.predict(box=BOX)
    predictor.set_image(image)
    again = predictor.predict(box=BOX)
    assert masks.shape == (3, *sides)
    np.testing.assert_array_equal(masks, again[0])
    np.testing.assert_array_equal(scores, again[1])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_coords": POINTS}, "point_labels must be given"),
        ({"point_labels": LABELS}, "point_labels must come with point_coords"),
        ({"point_coords": POINTS, "point_labels": LABELS[:1]}, "must have the shape"),
        ({"point_coords": POINTS, "point_labels": LABELS + 5}, "point_labels must be 1 or 0"),
        ({"point_coords": POINTS[0], "point_labels": LABELS}, "point_coords must be"),
        ({"box": BOX[:3]}, "box must be"),
        ({"box": BOX, "mask_input": np.zeros((1, 9, 9), np.float32)}, "mask_input must be"),
        (
            {
                "point_coords": np.tile(POINTS, (3, 1, 1)),
                "point_labels": np.tile(LABELS, (3, 1)),
                "box": np.stack([BOX] * 2),
            },
            "as many prompts",
        ),
    ],
)
def test_bad_prompts(predictor: SamPredictor, prompt: dict, message: str):
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompt)


def test_bad_batches(sam: Sam):
    predictor = SamPredictor(sam)
    with pytest.raises(ValueError, match="images must hold at least one"):
        predictor.set_image_batch([])
    predictor.set_image_batch([photo(), photo()])
    with pytest.raises(ValueError, match=r"box_batch must have one entry an image \(2\)"):
        predictor.predict_batch(box_batch=[BOX])
    with pytest.raises(ValueError, match=r"images must be several images, got one of shape \(90, "):
        predictor.set_image_batch(photo())
    with pytest.raises(ValueError, match="images must hold at least one"):
        predictor.set_image_batch(image for image in [])
    assert predictor.is_image_set  # what failed has not touched the images that are set


@pytest.mark.parametrize("original", [(37, 61), (300, 200), (64, 64)])
def test_masks_are_resized_as_the_matrices_say(original: tuple[int, int]):
    resized = transforms.resized_shape(*original, 128)
    frame = ((128, 128), resized, original)
    logits = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    rows, cols = transforms.mask_resize_matrices((32, 32), *frame)
    out = transforms.resize_mask_logits(logits, *frame)
    assert out.shape == (2, 3, *original) and out.dtype == np.float32
    np.testing.assert_allclose(out, rows @ logits @ cols.T, atol=1e-5)


def test_crop_is_the_square_where_the_photo_is_one(sam: Sam):
    square, crop = SamPredictor(sam), SamPredictor(sam, padding="crop")
    for predictor in (square, crop):
        predictor.set_image(photo(64, 64))
    for one, other in zip(square.predict(box=BOX / 2), crop.predict(box=BOX / 2), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="padding must be one of square, crop; got 'none'"):
        SamPredictor(sam, padding="none")


@pytest.mark.parametrize("transforms", ["host", "device"])
def test_crop_leaves_out_what_is_padding_alone(tmp_path, transforms):
    """Positions, prompts and masks are those of the square; a batch has one grid for all."""
    config = dataclasses.replace(
        SMALL, image_encoder=dataclasses.replace(SMALL.image_encoder, image_size=256)
    )
    sam = Sam.from_pretrained(random_weights(tmp_path / "sam.safetensors", config))
    predictor = SamPredictor(sam, padding="crop", transforms=transforms)
    predictor.set_image(photo(60, 120))
    assert predictor.get_image_embedding().shape == (1, 8, 16, 32)
    masks, iou, low_res = predictor.predict(POINTS, LABELS)
    assert (masks.shape, low_res.shape) == ((3, 60, 120), (3, 32, 64))
    again = predictor.predict(box=BOX[[0, 1, 2, 3]] / 2, mask_input=low_res[:1])
    assert again[2].shape == (3, 32, 64)
    # The pure function.
    images, points = jnp.asarray(photo(60, 120)[None]), jnp.asarray(POINTS[None, None], jnp.float32)
    pure = sam.compiled()(images, points, jnp.asarray(LABELS)[None, None], padding="crop")
    np.testing.assert_allclose(pure.low_res_logits[0, 0], low_res, atol=5e-2)
    np.testing.assert_allclose(pure.iou_predictions[0, 0], iou, atol=5e-2)
    # An embedding knows its frame, also from a file.
    predictor.embedding.save(tmp_path / "embedding.safetensors")
    other = SamPredictor(sam)
    other.embedding = Embedding.load(tmp_path / "embedding.safetensors")
    np.testing.assert_allclose(other.predict(POINTS, LABELS)[2], low_res, atol=1e-5)
    predictor.set_image_batch([photo(60, 120), photo(40, 120, 1)])
    assert predictor.get_image_embedding().shape == (2, 8, 16, 32)
    batch = predictor.predict_batch([POINTS, POINTS / 2], [LABELS, LABELS])
    np.testing.assert_allclose(batch[2][0], low_res, atol=1e-4)


def test_crop_encodes_images_of_one_grid_together(tmp_path, monkeypatch):
    """Results are those of one image after the other, in the caller's order."""
    config = dataclasses.replace(
        SMALL, image_encoder=dataclasses.replace(SMALL.image_encoder, image_size=256)
    )
    sam = Sam.from_pretrained(random_weights(tmp_path / "sam.safetensors", config))
    predictor = SamPredictor(sam, padding="crop")
    sizes = [(60, 120), (120, 60), (50, 120), (120, 120), (120, 50), (40, 120)]
    photos = [photo(*size, seed) for seed, size in enumerate(sizes)]
    boxes = [np.array([5.0, 6, 40, 30 + seed]) for seed in range(len(sizes))]
    boxes[2] = np.array([[1.0, 2, 30, 40], [5, 6, 20, 20]])
    singles = []
    for image, box in zip(photos, boxes, strict=True):
        predictor.set_image(image)
        singles.append((predictor.embedding, predictor.predict(box=box)))
    shapes = []
    encode = predictor.compiled.encode_padded
    monkeypatch.setattr(
        predictor.compiled,
        "encode_padded",
        lambda padded, sizes, crop: (
            shapes.append((len(padded), crop)) or encode(padded, sizes, crop)
        ),
    )
    predictor.set_image_batch(photos)
    # Three wide ones as two and one, two high ones, and a square.
    assert shapes == [(2, (128, 256)), (1, (128, 256)), (2, (256, 128)), (1, None)]
    results = zip(*predictor.predict_batch(box_batch=boxes), strict=True)
    for (wanted, single), own, result in zip(singles, predictor.embeddings, results, strict=True):
        assert own.sizes == wanted.sizes and own.frame == wanted.frame
        np.testing.assert_allclose(own.features, wanted.features, atol=1e-4)
        assert [field.shape for field in result] == [field.shape for field in single]
        np.testing.assert_allclose(result[1], single[1], atol=1e-4)
        np.testing.assert_allclose(result[2], single[2], atol=1e-4)
        assert (result[0] == single[0]).mean() > 0.999  # logits of nearly 0 may round either way
    with pytest.raises(RuntimeError, match=r"several grids are set .* `embeddings` has one an"):
        predictor.get_image_embedding()
    predictor.embedding = predictor.embeddings[4]
    np.testing.assert_allclose(predictor.predict(box=boxes[4])[2], singles[4][1][2], atol=1e-4)
