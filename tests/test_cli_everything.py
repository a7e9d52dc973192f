"""`sparsesam everything` on a tiny random model: the files of Meta's amg.py, and resuming."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import random_weights
from PIL import Image
from pycocotools import mask as coco

from sparsesam_jax import Sam
from sparsesam_jax.cli.app import main
from sparsesam_jax.predict.automatic_masks import AutomaticMaskGenerator

# What `amg.py` of facebookresearch/segment-anything writes.
HEADER = (
    "id,area,bbox_x0,bbox_y0,bbox_w,bbox_h,point_input_x,point_input_y,predicted_iou,"
    "stability_score,crop_box_x0,crop_box_y0,crop_box_w,crop_box_h"
)
OPTIONS: dict[str, Any] = {
    "points_per_side": 2,
    "pred_iou_thresh": 0.1,
    "stability_score_thresh": 0.1,
    "stability_score_offset": 0.1,
    "box_nms_thresh": 0.95,
}
ARGUMENTS = [
    text for name, x in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(x))
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(random_weights(tmp_path_factory.mktemp("everything") / "small.safetensors"))


@pytest.fixture
def photos(tmp_path) -> dict[str, np.ndarray]:
    """Two photos in the folder `photos`, by name."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    found = {}
    for name, size in (("a", (4, 6, 3)), ("b", (6, 4, 3))):
        small = Image.fromarray(rng.integers(0, 256, size, np.uint8))
        image = small.resize((size[1] * 15, size[0] * 15))
        image.save(tmp_path / "photos" / f"{name}.png")
        found[name] = np.asarray(image)
    return found


def everything(folder: Path, weights: str, *args: str) -> int:
    run = ["everything", str(folder / "photos"), "--out", str(folder / "out")]
    return main([*run, "--weights", weights, *ARGUMENTS, *args])


def test_files_are_metas(capsys, tmp_path, weights, photos):
    assert everything(tmp_path, weights) == 0
    assert "wrote" in capsys.readouterr().out
    generator = AutomaticMaskGenerator(Sam.from_pretrained(weights), **OPTIONS)
    for name, image in photos.items():
        folder, expected = tmp_path / "out" / name, generator.generate(image)
        assert expected
        lines = (folder / "metadata.csv").read_text().splitlines()
        assert lines[0] == HEADER
        rows = list(csv.reader(lines[1:]))
        assert len(rows) == len(expected) == len(list(folder.glob("*.png")))
        for index, (row, record) in enumerate(zip(rows, expected, strict=True)):
            picture = np.asarray(Image.open(folder / f"{index}.png"))
            np.testing.assert_array_equal(picture, 255 * np.uint8(record["segmentation"]))
            numbers = [record["area"], *record["bbox"], *record["point_coords"][0]]
            numbers += [record["predicted_iou"], record["stability_score"], *record["crop_box"]]
            np.testing.assert_allclose(np.array(row, float), [index, *numbers])


@pytest.mark.parametrize("overlay", [False, True])
def test_run_lengths(tmp_path, weights, photos, overlay: bool):
    more = ["--overlay"] if overlay else []
    assert everything(tmp_path, weights, "--convert-to-rle", *more) == 0
    generator = AutomaticMaskGenerator(Sam.from_pretrained(weights), **OPTIONS)
    for name, image in photos.items():
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        expected = generator.generate(image)
        for record, other in zip(found, expected, strict=True):
            mask = coco.decode(record.pop("segmentation"))
            np.testing.assert_array_equal(mask, other.pop("segmentation"))
            assert record == other
        path = tmp_path / "out" / f"{name}_overlay.png"
        assert path.exists() == overlay
        if overlay:
            assert np.asarray(Image.open(path)).shape == image.shape
            assert (np.asarray(Image.open(path)) != image).any()


def test_resumed(capsys, tmp_path, weights, photos):
    """What is whole stays, what is not is made anew, and a broken photo does not end the run."""
    assert everything(tmp_path, weights) == 0
    out, masks = tmp_path / "out", len(list((tmp_path / "out" / "b").glob("*.png")))
    (out / "a" / "0.png").unlink()
    (out / "b" / "metadata.csv").unlink()
    (out / "b" / "99.png").touch()
    (out / "b" / "note.png").touch()
    (tmp_path / "photos" / "c.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert everything(tmp_path, weights, "--resume") == 1
    said = capsys.readouterr()
    assert "1 of 3 photos are there already" in said.out
    assert "1 of 3 photos left out" in said.err
    assert not (out / "a" / "0.png").exists()
    assert (out / "b" / "metadata.csv").exists()
    assert len(list((out / "b").glob("*.png"))) == masks + 1
    (tmp_path / "photos" / "c.png").unlink()
    assert everything(tmp_path, weights, "--resume") == 0
    assert "2 of 2 photos are there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--points-per-side", "0"], "points_per_side must leave a point"),
        (["--density", "0"], "density must"),
        (["--out", "/dev/null/x"], "--out must be a folder"),
        (["{tmp}/other/a.jpg"], "images must have different names, got"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input(capsys, tmp_path, weights, photos, args: list[str], message: str):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other" / "a.jpg")
    assert everything(tmp_path, weights, *(arg.format(tmp=tmp_path) for arg in args)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
