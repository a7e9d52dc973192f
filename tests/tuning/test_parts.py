"""The parts of a step: what the photos become, where prompts fall, what the losses say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from tuning_cases import disc, discs, tiny_sam

from sparsesam_jax.config import Sparsity
from sparsesam_jax.evaluation.prompts import mask_box, mask_points
from sparsesam_jax.model.prompt_encoder import (
    ABSENT,
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    NOT_A_POINT,
)
from sparsesam_jax.model.transforms import PIXEL_MEAN, PIXEL_STD, preprocess
from sparsesam_jax.tuning.augment import STILL, Augmentation, Batch, augment
from sparsesam_jax.tuning.encoding import encode
from sparsesam_jax.tuning.losses import Losses, mask_losses
from sparsesam_jax.tuning.parameters import decayed, take_apart
from sparsesam_jax.tuning.prompting import Prompting, boxes, clicks, depth, first_prompts
from sparsesam_jax.tuning.validation import next_click, validate

PLAIN = Augmentation(flip=0, crop=0, colour=0, grey=0, paste=0)

# Compiled whole, which takes less time than every operation by itself.
seen = jax.jit(augment, static_argnums=(2, 3, 4))
clicked = jax.jit(clicks, static_argnums=3)
deep_in = jax.jit(depth)
judged = jax.jit(mask_losses, static_argnums=4)


def batch(count: int = 2, height: int = 40, width: int = 48) -> Batch:
    """Discs in squares of 48."""
    photos, labels = np.zeros((count, 48, 48, 3), np.uint8), np.zeros((count, 48, 48), np.uint8)
    for index in range(count):
        photos[index, :height, :width], mask = disc(index, height, width)
        labels[index, :height, :width] = mask
    members = np.zeros((count, 1, 256), bool)
    members[:, :, 1] = True
    return Batch(photos, np.full((count, 2), (height, width), np.int32), labels, members)


# --- augmentation ---


def test_an_unchanged_photo_is_sams_input():
    given = batch()
    example = seen(jax.random.key(0), given, 64, 16, PLAIN)
    expected = preprocess(jnp.asarray(given.photos[:, :40, :48]), 64)
    # SAM rounds to whole levels.
    np.testing.assert_allclose(example.pixels * PIXEL_STD, expected * PIXEL_STD, atol=0.51)
    assert example.inside[0].sum() == round(64 * 40 / 48 / 4) * 16
    grown = np.asarray(jax.image.resize(jnp.float32(given.labels), (2, 16, 16), "linear"))
    assert (np.asarray(example.masks[:, 0]) == (grown > 0.5)).mean() > 0.98


def test_masks_move_with_the_photo():
    example = seen(jax.random.key(1), batch(8), 64, 16, Augmentation(colour=0, grey=0, paste=0))
    grey = np.asarray(example.pixels * PIXEL_STD + PIXEL_MEAN).mean(-1)
    bright = grey.reshape(8, 16, 4, 16, 4).mean((2, 4)) > 110
    agreement = np.asarray(example.masks[:, 0] == bright) | ~np.asarray(example.inside)
    assert agreement.mean() > 0.96
    # Some are cropped, so that discs differ in size from those that are not.
    plain = seen(jax.random.key(1), batch(8), 64, 16, PLAIN)
    assert (np.asarray(example.masks.sum((1, 2, 3)) > 1.3 * plain.masks.sum((1, 2, 3)))).any()


def test_a_mirrored_photo_is_mirrored():
    plain, flipped = (
        seen(jax.random.key(0), batch(), 64, 16, Augmentation(**(vars(PLAIN) | {"flip": flip})))
        for flip in (0, 1)
    )
    np.testing.assert_allclose(plain.pixels[:, :, ::-1], flipped.pixels, atol=1e-4)
    np.testing.assert_array_equal(plain.masks[..., ::-1], flipped.masks)


def test_a_pasted_object_is_the_target_and_hides_what_is_behind_it():
    given = batch()
    plain = seen(jax.random.key(0), given, 64, 16, PLAIN)
    pasted = seen(jax.random.key(0), given, 64, 16, Augmentation(**(vars(PLAIN) | {"paste": 1})))
    np.testing.assert_array_equal(pasted.masks[0, 0], plain.masks[1, 0])
    inside = np.kron(np.asarray(ndimage.binary_erosion(plain.masks[1, 0])), np.ones((4, 4), bool))
    np.testing.assert_allclose(pasted.pixels[0][inside], plain.pixels[1][inside])
    outside = ~np.kron(ndimage.binary_dilation(plain.masks[1, 0]), np.ones((4, 4), bool))
    np.testing.assert_allclose(pasted.pixels[0][outside], plain.pixels[0][outside])


def test_augmentation_checks_itself():
    with pytest.raises(ValueError, match=r"flip must be in \[0, 1\], got 2"):
        Augmentation(flip=2)
    with pytest.raises(ValueError, match=r"stretch must be at least 1, got 0\.5"):
        Augmentation(stretch=0.5)
    assert STILL.crop == STILL.flip == STILL.paste == 0


# --- prompts ---


def masks() -> np.ndarray:
    """Four discs of 32 x 32 pixels, [2, 2, 32, 32]."""
    return np.stack([disc(seed, 32, 32)[1] for seed in range(4)]).reshape(2, 2, 32, 32)


def test_boxes_are_those_of_an_evaluation():
    found = np.asarray(jax.jit(boxes)(jnp.asarray(masks())))
    for mask, box in zip(masks().reshape(-1, 32, 32), found.reshape(-1, 4), strict=True):
        np.testing.assert_array_equal(box, mask_box(mask))
    assert (np.asarray(jax.jit(boxes)(jnp.zeros((1, 8, 8), bool))) == 0).all()


def test_depth_orders_pixels_by_their_distance_from_the_edge():
    mask = masks()
    found = np.asarray(deep_in(jnp.asarray(mask)))[0, 0]
    distance = ndimage.distance_transform_cdt(np.pad(mask[0, 0], 1), "chessboard")[1:-1, 1:-1]
    steps = np.cumsum((1, 1, 2, 4, 8, 16))
    expected = (distance[..., None] > steps).sum(-1)
    np.testing.assert_array_equal(found, expected)


def test_clicks_fall_into_their_region_and_deep_ones_far_from_its_edge():
    mask = masks()
    truth = np.roll(mask, 3, -1)
    wrong = mask ^ truth
    for deep in (False, True):
        options = {"deep": jnp.full((2, 2), deep), "within": jnp.full((2, 2, 2), 0.5)}
        points, labels = clicked(
            jax.random.key(0), jnp.asarray(wrong), jnp.asarray(truth), 4, **options
        )
        cells = (np.asarray(points) // 4).astype(int)
        for index in np.ndindex(2, 2):
            col, row = cells[index]
            assert wrong[index][row, col]
            assert labels[index] == (FOREGROUND if truth[index][row, col] else BACKGROUND)
            if deep:
                depths = np.asarray(deep_in(jnp.asarray(wrong)))[index]
                assert depths[row, col] == depths.max()
    # Without a fault, the object itself is clicked.
    points, labels = clicked(
        jax.random.key(0), jnp.zeros_like(wrong), jnp.asarray(truth), 4, **options
    )
    assert (np.asarray(labels) == FOREGROUND).all()


def test_first_prompts_are_boxes_points_or_both():
    many = jnp.asarray(np.tile(masks(), (50, 1, 1, 1)))
    prompting = Prompting(box=0.5, box_point=0.5, rounds=3)
    prompts = jax.jit(first_prompts, static_argnums=(2, 3))(jax.random.key(0), many, 4, prompting)
    labels, points = np.asarray(prompts.labels), np.asarray(prompts.points)
    assert labels.shape == (100, 2, 6)
    has_box = labels[..., 0] == BOX_TOP_LEFT
    assert (labels[..., 1] == np.where(has_box, BOX_BOTTOM_RIGHT, ABSENT)).all()
    assert (labels[..., 5] == np.where(has_box, ABSENT, NOT_A_POINT)).all()
    assert 0.4 < has_box.mean() < 0.6
    both = has_box & (labels[..., 2] == FOREGROUND)
    assert 0.15 < both.mean() < 0.35 and (labels[~has_box][:, 2] == FOREGROUND).all()
    exact = 4 * np.asarray(jax.jit(boxes)(many))
    error = points[:, :, :2].reshape(100, 2, 4) - exact
    sides = np.tile(exact[..., 2:] - exact[..., :2], 2)
    assert np.abs(error).max() <= 20 and 0.05 < (error / sides).std() < 0.2
    with pytest.raises(ValueError, match="rounds must be positive, got 0"):
        Prompting(rounds=0)


# --- losses ---


def test_losses_are_those_of_the_papers():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, 1, 2, 8, 8)).astype(np.float32) * 3
    mask, inside = rng.random((1, 1, 8, 8)) < 0.5, np.ones((1, 8, 8), bool)
    inside[:, 6:] = False
    predicted = np.array([[[0.3, 0.9]]], np.float32)
    found = judged(*map(jnp.asarray, (logits, predicted, mask, inside)), Losses())
    for index in range(2):
        x, t = logits[0, 0, index][:6], mask[0, 0][:6]
        p = 1 / (1 + np.exp(-x))
        right = np.where(t, p, 1 - p)
        focal = -np.where(t, 0.25, 0.75) * (1 - right) ** 2 * np.log(right)
        np.testing.assert_allclose(found["focal"][0, 0, index], focal.mean(), rtol=1e-5)
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        np.testing.assert_allclose(found["dice"][0, 0, index], dice, rtol=1e-5)
        iou = ((x > 0) & t).sum() / ((x > 0) | t).sum()
        np.testing.assert_allclose(found["true_iou"][0, 0, index], iou, rtol=1e-6)
        expected = (predicted[0, 0, index] - iou) ** 2
        np.testing.assert_allclose(found["iou"][0, 0, index], expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\), got 1"):
        Losses(alpha=1)


# --- model ---


def test_repeated_blocks_are_a_loop_with_the_same_features_and_gradients(tmp_path):
    sam = tiny_sam(tmp_path)
    pixels = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    parts = take_apart(sam, ["encoder"])

    def gradients(parts, run):
        def loss(tuned):
            return (run(parts.model(tuned), pixels).features ** 2).mean()

        return jax.jit(jax.value_and_grad(loss))(parts.tuned)

    assert "scan" in str(jax.make_jaxpr(lambda: encode(sam, pixels).features)())
    expected, grads = gradients(parts, lambda model, x: model.encode(x))
    sam.image_encoder.remat = True
    found, others = gradients(take_apart(sam, ["encoder"]), encode)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(others[name], grad, atol=1e-5 * np.abs(grad).max() + 1e-7)
    sparse = sam.with_sparsity(Sparsity(0.5, split="equal", block_size=4))
    assert "scan" not in str(jax.make_jaxpr(lambda: encode(sparse, pixels).features)())


def test_what_is_tuned_goes_by_names(tmp_path):
    sam = tiny_sam(tmp_path)
    parts = take_apart(sam, ["decoder", "image_encoder[.]neck[.].*"])
    assert all(
        name.startswith(("mask_decoder", "prompt_encoder", "image_encoder.neck"))
        for name in parts.tuned
    )
    assert any(name.startswith("image_encoder.blocks") for name in parts.fixed)
    # A buffer is no parameter.
    assert "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix" in parts.fixed
    marks = decayed(parts.tuned)
    assert marks["mask_decoder.transformer.layers.0.mlp.lin1.kernel"]
    assert not marks["mask_decoder.iou_token.embedding"]
    with pytest.raises(ValueError, match="train must match parameters, got lora"):
        take_apart(sam, ["all", "lora"])
    with pytest.raises(ValueError, match="or regular expressions, got '\\*'"):
        take_apart(sam, ["*"])


# --- validation ---


def test_the_next_click_is_deep_in_what_is_wrong():
    truth = disc(0)[1]
    point, label = next_click(np.zeros_like(truth), truth)
    np.testing.assert_array_equal(point, mask_points(truth, 1)[0])
    assert label == 1
    too_much = truth.copy()
    too_much[:8, :8] = True
    point, label = next_click(too_much, truth)
    assert label == 0 and (point <= 8).all()
    assert next_click(truth, truth)[1] == 1


def test_validation_measures_every_prompt(tmp_path):
    scores = validate(tiny_sam(tmp_path), discs(2))
    kinds = {"box", "point", "box+point", "point_best_of_3", "clicks3", "clicks5", "iou_error"}
    assert scores.keys() == kinds and all(0 <= value <= 1 for value in list(scores.values())[:3])
