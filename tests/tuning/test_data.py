"""Photos with masks from disk: all forms of them give the same targets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tuning_cases import SIDE, disc, write_discs

from sparsesam_jax.tuning.data import find, label_map, load


def targets(photos) -> np.ndarray:
    """The first target of every photo."""
    members = photos.members[photos.first]
    return np.stack([row[labels] for row, labels in zip(members, photos.labels, strict=True)])


def test_masks_labels_and_coco_are_the_same(tmp_path):
    images, masks = write_discs(tmp_path, 3)
    from_masks = load(find(images, masks=masks), SIDE)
    labels = tmp_path / "labels"
    labels.mkdir()
    rows = []
    for path in sorted(masks.iterdir()):
        mask = np.asarray(Image.open(path)) > 128
        halves = np.where(np.arange(mask.shape[1]) < 24, 7, 9) * mask
        Image.fromarray(halves.astype(np.uint8)).save(labels / path.name)
        rows.append({"name": path.stem, "src": "discs", "targets": [[[7, 9], 1]]})
    (tmp_path / "targets.json").write_text(json.dumps(rows))
    named = find(images, labels=labels, targets=tmp_path / "targets.json")
    from_labels = load(named, SIDE, processes=1)
    np.testing.assert_array_equal(targets(from_masks), targets(from_labels))
    np.testing.assert_array_equal(from_masks.images, from_labels.images)
    assert len(load(find(images, labels=labels), SIDE).members) > 3  # every label by itself

    annotations = [
        {"image_id": i, "segmentation": runs(np.asarray(Image.open(path)) > 128)}
        for i, path in enumerate(sorted(masks.iterdir()))
    ]
    files = [{"id": i, "file_name": path.name} for i, path in enumerate(sorted(images.iterdir()))]
    (tmp_path / "coco.json").write_text(json.dumps({"images": files, "annotations": annotations}))
    from_coco = load(find(images, coco=tmp_path / "coco.json"), SIDE)
    np.testing.assert_array_equal(targets(from_masks), targets(from_coco))


def runs(mask: np.ndarray) -> dict:
    """A mask as COCO's uncompressed run lengths."""
    flat = mask.ravel(order="F").astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], ends, [flat.size]]))
    return {"counts": [0, *lengths] if flat[0] else list(map(int, lengths)), "size": mask.shape}


def test_polygons_are_filled(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    square = [5, 6, 14, 6, 14, 15, 5, 15]
    row = {"image_id": 1, "segmentation": [square]}
    data = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [row]}
    (tmp_path / "coco.json").write_text(json.dumps(data))
    mask = targets(load(find(tmp_path, coco=tmp_path / "coco.json"), 40))[0]
    expected = np.zeros((40, 40), bool)
    expected[6:16, 5:15] = True
    np.testing.assert_array_equal(mask, expected)


def test_overlapping_masks_come_back():
    rng = np.random.default_rng(0)
    masks = [rng.random((9, 7)) < 0.5 for _ in range(4)]
    labels, members = label_map(masks, (9, 7))
    found = [np.isin(labels, row) for row in members]
    for mask in masks:
        assert any(np.array_equal(mask, other) for other in found)


def test_more_sets_than_labels_drop_the_smallest():
    masks = [np.arange(400).reshape(20, 20) >> bit & 1 == 1 for bit in range(9)]
    labels, members = label_map(masks, (20, 20))
    assert len(members) == 7 and labels.max() < 256


def test_draws_repeat_and_follow_the_weights(tmp_path):
    images, masks = write_discs(tmp_path, 4)
    photos = load(find(images, masks=masks), SIDE)
    first, again, other = (photos.draw(1, step, 8, 2) for step in (3, 3, 4))
    np.testing.assert_array_equal(first.photos, again.photos)
    assert not np.array_equal(first.photos, other.photos)
    photos.shares[:] = [0, 0, 1, 0]
    drawn = photos.draw(0, 0, 5, 3)
    assert (drawn.photos == photos.images[2]).all() and drawn.members.shape == (5, 3, 256)


def test_large_photos_are_shrunk(tmp_path):
    images, masks = write_discs(tmp_path, 1)
    photos = load(find(images, masks=masks), 24)
    assert photos.sizes.tolist() == [[20, 24]]
    _, mask = disc(0)
    assert targets(photos)[0, :20].mean() == pytest.approx(mask.mean(), abs=0.02)


def test_what_is_wrong_is_said(tmp_path):
    images, masks = write_discs(tmp_path, 1)
    with pytest.raises(ValueError, match=r"exactly one of masks, labels and coco .* got none"):
        find(images)
    with pytest.raises(ValueError, match="images must be a folder"):
        find(tmp_path / "nothing", masks=masks)
    with pytest.raises(ValueError, match="masks must have masks of the photos"):
        find(images, masks=tmp_path)
    with pytest.raises(ValueError, match=r"weights must be of groups \(\), got cats"):
        load(find(images, masks=masks), SIDE, weights={"cats": 2.0})
    Image.new("L", (5, 5)).save(masks / "0.png")
    with pytest.raises(ValueError, match="must have its photo's size"):
        load(find(images, masks=masks), SIDE)
    (tmp_path / "coco.json").write_text("{}")
    with pytest.raises(ValueError, match="coco must be COCO's instances"):
        find(images, coco=tmp_path / "coco.json")
