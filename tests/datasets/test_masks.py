"""`sparsesam segment-dataset` end to end, on drawn photos and a tiny model with random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from killed import contents, draw
from models import SMALL, random_weights
from PIL import Image
from pycocotools import mask as coco_mask

from sparsesam_jax import AutomaticMaskGenerator, Sam, SamPredictor
from sparsesam_jax.cli.app import main
from sparsesam_jax.datasets.prompt_files import read_prompts
from sparsesam_jax.datasets.store import Store

ENCODER = dataclasses.replace(SMALL.image_encoder, depth=2, global_attn_indexes=(0,))
COCO = {
    "images": [
        {"id": 70, "file_name": "00000.jpg", "width": 128, "height": 96},
        {"id": 71, "file_name": "00001.jpg", "width": 96, "height": 128},
    ],
    "annotations": [
        {"id": 1, "image_id": 71, "category_id": 3, "bbox": [5, 10, 30, 40]},
        {"id": 2, "image_id": 71, "category_id": 4, "bbox": [50, 20, 20, 60]},
        {"id": 3, "image_id": 70, "category_id": 3, "bbox": [15, 10, 30, 30]},
    ],
    "categories": [{"id": 3, "name": "a"}, {"id": 4, "name": "b"}],
}
CSV = """image,x0,y0,x1,y1,x,y,label,object,score
00000.jpg,15,10,45,40,,,,,0.5
00003.jpg,,,,,20,20,1,a,
00003.jpg,,,,,40,30,0,a,
00003.jpg,5,5,50,50,20,20,,b,
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = dataclasses.replace(SMALL, image_encoder=ENCODER)
    return str(random_weights(tmp_path_factory.mktemp("weights") / "small.safetensors", config))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw(folder / "photos", 5, broken=[2])
    (folder / "coco.json").write_text(json.dumps(COCO))
    found = [{**entry, "score": 0.25} for entry in COCO["annotations"]]
    (folder / "detections.json").write_text(json.dumps(found))
    (folder / "boxes.csv").write_text(CSV)
    return folder


def segment(data: Path, weights: str, store: Path, *args: str) -> int:
    options = ["--weights", weights, "--batch", "2", "--shard-size", "2", "--workers", "0"]
    return main(["segment-dataset", str(data / "photos"), "--out", str(store), *options, *args])


def results(store: Path) -> list[dict]:
    found = sorted((store / "results").iterdir())
    return [result for path in found for result in json.loads(path.read_text())]


def test_masks_of_boxes_are_the_predictors(tmp_path, data, weights, capsys) -> None:
    store = tmp_path / "store"
    assert segment(data, weights, store, "--prompts", str(data / "coco.json")) == 1
    found = results(store)
    assert [(r["image_id"], r["category_id"]) for r in found] == [(70, 3), (71, 3), (71, 4)]
    predictor = SamPredictor(Sam.from_pretrained(weights))
    for result, name, entry in zip(found, ("00000", "00001", "00001"), (2, 0, 1), strict=True):
        predictor.set_image(np.asarray(Image.open(data / "photos" / f"{name}.jpg")))
        x, y, width, height = COCO["annotations"][entry]["bbox"]
        box = np.array([x, y, x + width, y + height])
        masks, iou, _ = predictor.predict(box=box, multimask_output=False)
        # Another batch size: logits differ by some float32 epsilons, a pixel at the edge may.
        assert (coco_mask.decode(result["segmentation"]) == masks[0]).mean() > 0.999
        assert result["score"] == pytest.approx(float(iou[0]), abs=1e-4)
    index = Store(store).index().to_pylist()
    assert [(r["image_id"], r["masks"]) for r in index if not r["error"]] == [
        *((70, 1), (71, 2)),
        *((3, 0), (4, 0)),
    ]
    assert main(["store", "verify", str(store)]) == 0
    assert main(["store", "export", str(store), "--out", str(tmp_path / "all.json")]) == 0
    assert json.loads((tmp_path / "all.json").read_text()) == found
    path = store / "results" / "00000000.json"
    path.write_text(path.read_text().replace('"image_id": 71', '"image_id": 72', 1))
    assert main(["store", "verify", str(store)]) == 1
    assert "row 1 (00001.jpg): other masks" in capsys.readouterr().err


def test_a_detectors_boxes_keep_their_score(tmp_path, data, weights, capsys) -> None:
    args = ["--prompts", str(data / "detections.json")]
    assert segment(data, weights, tmp_path / "store", *args) == 2
    assert "need --annotations" in capsys.readouterr().err
    args += ["--annotations", str(data / "coco.json")]
    assert segment(data, weights, tmp_path / "store", *args) == 1
    assert {result["score"] for result in results(tmp_path / "store")} == {0.25}


def test_points_and_boxes_of_a_table(tmp_path, data, weights) -> None:
    args = ["--prompts", str(data / "boxes.csv"), "--padding", "crop", "--image-size", "256"]
    assert segment(data, weights, tmp_path / "store", *args) == 1
    found = results(tmp_path / "store")
    assert [result["image_id"] for result in found] == [0, 3, 3]
    assert found[0]["score"] == 0.5
    predictor = SamPredictor(Sam.from_pretrained(weights), 256, padding="crop")
    predictor.set_image(np.asarray(Image.open(data / "photos" / "00003.jpg")))
    two = np.array([[20, 20], [40, 30]])
    asked = [
        {"point_coords": two, "point_labels": np.array([1, 0])},
        {"point_coords": two[:1], "point_labels": np.array([1]), "box": np.array([5, 5, 50, 50])},
    ]
    for result, prompt in zip(found[1:], asked, strict=True):
        masks, _, _ = predictor.predict(**prompt, multimask_output=False)
        assert (coco_mask.decode(result["segmentation"]) == masks[0]).mean() > 0.999
    # The same again with the other half first: the same bytes.
    for part in ("1/2", "0/2"):
        segment(data, weights, tmp_path / "parts", *args, "--shard", part)
    assert contents(tmp_path / "parts") == contents(tmp_path / "store")


def test_everything_is_the_generators(tmp_path, data, weights) -> None:
    options = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    args = [text for key, x in options.items() for text in ("--" + key.replace("_", "-"), str(x))]
    code = segment(data, weights, tmp_path / "store", "--everything", *args, "--limit", "2")
    assert code == 0
    generator = AutomaticMaskGenerator(
        Sam.from_pretrained(weights), output_mode="coco_rle", **options
    )
    found = results(tmp_path / "store")
    for row in range(2):
        masks = generator.generate(np.asarray(Image.open(data / "photos" / f"{row:05}.jpg")))
        mine = [result for result in found if result["image_id"] == row]
        assert [r["segmentation"] for r in mine] == [m["segmentation"] for m in masks]
        assert [r["bbox"] for r in mine] == [m["bbox"] for m in masks] != []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "photo,x,y\n", "columns image and x0, y0, x1, y1 or x, y, got photo, x, y"),
        ("a.csv", "image,x,y\na.jpg,1,z\n", "line 2: no prompt: could not convert"),
        ("a.csv", "image,x,y,label\na.jpg,1,2,3\n", "line 2: a prompt must have a box or points"),
        ("a.csv", "image,x0,y0,x1,y1\na.jpg,5,5,1,9\n", "a box must have x0 <= x1 and y0 <= y1"),
        ("a.csv", "image,x,y\na.jpg,1,2\n", r"prompts must be for photos of the source"),
        ("a.json", "{", "prompts must be COCO's JSON or a CSV"),
        ("a.json", '{"images": []}', "KeyError: 'annotations'"),
    ],
)
def test_wrong_prompts_write_nothing(tmp_path, data, weights, name, text, message, capsys) -> None:
    (tmp_path / name).write_text(text)
    assert segment(data, weights, tmp_path / "store", "--prompts", str(tmp_path / name)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_prompts_or_everything(tmp_path, data, weights, capsys) -> None:
    for args in ([], ["--everything", "--prompts", str(data / "coco.json")]):
        assert segment(data, weights, tmp_path / "store", *args) == 2
        assert "either --prompts or --everything" in capsys.readouterr().err


def test_names_of_prompts(data: Path) -> None:
    prompts = read_prompts(data / "coco.json")
    assert prompts.of("train/00001.jpg", 9)[0] == 71
    assert len(prompts.of("train/00001.jpg", 9)[1]) == 2
    assert prompts.of("00004.jpg", 9) == (9, [])
