"""The parts of an evaluation, each against its definition."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sparsesam_jax.choices import PromptKind, check_choice
from sparsesam_jax.evaluation import datasets, metrics, prompts, protocols
from sparsesam_jax.evaluation.rows import Row, RowFile
from sparsesam_jax.evaluation.summary import summarise


def disc(height: int, width: int, row: float, col: float, radius: float) -> np.ndarray:
    y, x = np.indices((height, width))
    return (y - row) ** 2 + (x - col) ** 2 < radius**2


def test_iou() -> None:
    a, b = np.zeros((2, 4, 4), bool)
    assert metrics.iou(a, b) == 1
    a[:2] = True
    b[1:3] = True
    assert metrics.iou(a, b) == pytest.approx(4 / 12)


@pytest.mark.parametrize("shape", [(40, 60), (150, 200)])
def test_boundary_is_mask_minus_erosions(shape: tuple[int, int]) -> None:
    mask = disc(*shape, 10, 20, 18) | disc(*shape, shape[0] - 12, 40, 9)
    inner = np.pad(mask, 1)
    for _ in range(max(1, round(0.02 * np.hypot(*shape)))):
        shifted = [np.roll(inner, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        inner = np.pad(np.logical_and.reduce(shifted)[1:-1, 1:-1], 1)
    band = metrics.boundary(mask)
    np.testing.assert_array_equal(band, mask & ~inner[1:-1, 1:-1])
    assert band[0].sum() == mask[0].sum() > 0  # beyond the image's edge is background
    assert metrics.boundary_iou(mask, mask) == 1
    assert metrics.boundary_iou(mask, np.roll(mask, 2, 1)) < metrics.iou(mask, np.roll(mask, 2, 1))


def test_relative_error_is_per_image() -> None:
    dense = np.ones((2, 3, 3, 4), np.float32)
    other = dense.copy()
    other[1] *= 1.5
    error = metrics.relative_error(jax.numpy.asarray(other), jax.numpy.asarray(dense))
    np.testing.assert_allclose(error, [0, 0.5], atol=1e-6)


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1, 400)
    low, high = metrics.bootstrap_interval(differences)
    assert (low, high) == metrics.bootstrap_interval(differences)
    # The normal theory's half width, which 10,000 draws know within some percent.
    half = 1.96 * differences.std() / 20
    assert (low, high) == pytest.approx(
        (differences.mean() - half, differences.mean() + half), abs=0.1 * half
    )


def test_prompts_lie_in_the_mask() -> None:
    mask = disc(50, 80, 20, 30, 15)
    rows, cols = mask.nonzero()
    box = prompts.mask_prompt(mask, "box")
    assert box.box is not None
    assert box.box.tolist() == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
    assert len(box.points) == 0
    inclusive = prompts.mask_box(mask, inclusive=True)
    assert inclusive.tolist() == [cols.min(), rows.min(), cols.max(), rows.max()]
    point = prompts.mask_prompt(mask, "point")
    np.testing.assert_allclose(point.points, [[30, 20]], atol=1)
    assert point.box is None
    points = prompts.mask_prompt(mask, "points3").points
    assert points[0].tolist() == point.points[0].tolist()
    assert all(mask[int(y), int(x)] for x, y in points)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    assert distances[np.triu_indices(3, 1)].min() > 5
    both = prompts.mask_prompt(mask, "box+point")
    assert both.box is not None
    assert len(both.points) == 1
    with pytest.raises(ValueError, match="prompts must be one of box, point, points3, box"):
        check_choice("prompts", "mask", PromptKind)


def photo(mask: np.ndarray) -> datasets.Photo:
    rng = np.random.default_rng(0)
    return datasets.Photo(
        name="a",
        image=rng.integers(0, 256, (*mask.shape, 3)).astype(np.uint8),
        mask=mask,
        grey_mask=mask.astype(np.uint8) * 255,
    )


@pytest.mark.parametrize("size", [(7, 5), (64, 100), (33, 80)])
def test_bilinear_is_jax_without_antialiasing(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(size=(33, 40, 2)).astype(np.float32)
    expected = jax.image.resize(values, (*size, 2), "linear", antialias=False)
    np.testing.assert_allclose(protocols.bilinear(values, *size), expected, atol=1e-5)


def test_protocols_differ_in_frame_and_resize() -> None:
    one = photo(disc(60, 90, 30, 50, 12))
    low_res = np.random.default_rng(1).normal(size=(32, 32)).astype(np.float32)
    square = protocols.bilinear(low_res, 128, 128)
    sam, hq, release = (protocols.make_protocol(n, 128) for n in ("sam", "hq44k", "release"))
    assert sam.query(one, "box").image is one.image
    query = hq.query(one, "box")
    assert query.image.shape == (128, 128, 3)
    assert query.prompt.box is not None
    np.testing.assert_allclose(
        query.prompt.box, np.array([39, 19, 61, 41]) * 128 / np.array([90, 60, 90, 60]), atol=2
    )
    direct = protocols.bilinear(low_res, 60, 90) > 0
    np.testing.assert_array_equal(hq.mask(one, square, low_res), direct)
    through = protocols.bilinear(square, 60, 90) > 0
    np.testing.assert_array_equal(release.mask(one, square, low_res), through)
    assert (direct != through).any()
    assert [p.mean_batch for p in (sam, hq, release)] == [None, None, 8]
    with pytest.raises(ValueError, match="protocol must be one of sam, hq44k, release; got 'hq'"):
        protocols.make_protocol("hq", 128)


def test_squashing_keeps_a_speck() -> None:
    mask = np.zeros((900, 1200), bool)
    mask[500, 700] = True
    box = protocols.make_protocol("hq44k", 128).query(photo(mask), "box").prompt.box
    assert box is not None
    np.testing.assert_allclose(
        box, np.array([700, 500, 700, 500]) * 128 / np.array([1200, 900] * 2), atol=1
    )


@pytest.mark.parametrize("name", list(datasets.LAYOUTS))
@pytest.mark.parametrize("skip", [0, 1])
def test_datasets_lie_where_sam_hq_puts_them(tmp_path: Path, name: str, skip: int) -> None:
    folder, images, masks = datasets.LAYOUTS[name]
    place = tmp_path.joinpath(*folder.split("/")[skip:])
    for kind, suffix in ((images, ".jpg"), (masks, ".png")):
        (place / kind).mkdir(parents=True)
        for stem in "ba":
            Image.new("L", (8, 6), 255).save(place / kind / f"{stem}{suffix}")
    pairs = datasets.dataset_pairs(name, tmp_path)
    assert [pair.name for pair in pairs] == ["a", "b"]
    assert datasets.read_photo(pairs[0]).size == (6, 8)


def test_datasets_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset must be one of dis5k, coift"):
        datasets.dataset_pairs("coco", tmp_path)
    with pytest.raises(ValueError, match="root must hold DIS5K/DIS-VD/im and DIS5K/DIS-VD/gt"):
        datasets.dataset_pairs("dis5k", tmp_path)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="equal stems, got none"):
        datasets.folder_pairs(tmp_path / "images", tmp_path / "masks")
    for suffix in (".jpg", ".png"):
        Image.new("L", (8, 6)).save(tmp_path / "images" / f"a{suffix}")
    with pytest.raises(ValueError, match=r"one file a stem, got a\.jpg and a\.png"):
        datasets.folder_pairs(tmp_path / "images", tmp_path / "masks")


ROW = Row(
    method="sparsesam",
    density=0.3,
    prompts="box",
    protocol="sam",
    image="a, b",
    iou=1 / 3,
    boundary_iou=0.1,
    agreement=0.5,
    feature_error=2e-7,
    seconds=0.25,
    compiled=True,
)


def test_rows_survive_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [dataclasses.replace(ROW, image=name) for name in ("a, b", "c", "d")]
    file = RowFile(path, resume=False)
    file.append(rows[:2])
    file.append(rows)
    whole = path.read_text()
    assert list(RowFile(path, resume=True).found.values()) == rows
    assert path.read_text() == whole
    path.write_text(whole[:-9])
    assert list(RowFile(path, resume=True).found.values()) == rows[:2]
    assert list(RowFile(path, resume=False).found.values()) == []
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns method, density"):
        RowFile(path, resume=True)


def test_summary_may_average_batches_first() -> None:
    rows = [
        dataclasses.replace(ROW, iou=float(i == 8), compiled=i == 0, seconds=1 + (i == 0))
        for i in range(9)
    ]
    dense = [dataclasses.replace(ROW, iou=1.0)] * 9
    options = {"method": "x", "density": 0.3, "gmacs": 1.0}
    whole = summarise(rows, dense, mean_batch=None, **options)
    assert whole["miou"] == pytest.approx(1 / 9)
    assert whole["miou_change"] == pytest.approx(1 / 9 - 1)
    assert whole["images_per_second"] == 1
    assert summarise(rows, dense, mean_batch=8, **options)["miou"] == pytest.approx(0.5)
