"""`sparsesam evaluate-coco` end to end, on drawn images and a tiny model with random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from models import SMALL, random_weights
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.cli.app import main
from sparsesam_jax.evaluation import coco
from sparsesam_jax.sparsity.work import encoder_work

MODEL = dataclasses.replace(
    SMALL,
    image_encoder=dataclasses.replace(SMALL.image_encoder, depth=2, global_attn_indexes=(0,)),
)
SIZES = [(60, 90), (64, 64)]
BOXES = [[[15, 10, 30, 30], [50, 20, 20, 25]], [[8, 8, 40, 30]]]  # x y w h, of each image


def draw(folder: Path) -> list[str]:
    """Two images, their objects as COCO annotates them and boxes a detector would find."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    images, annotations, detections = [], [], []
    for index, (height, width) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        image = {"id": index + 7, "file_name": f"{index}.png", "height": height, "width": width}
        images.append(image)
        for x, y, w, h in BOXES[index]:
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            common = {"image_id": index + 7, "category_id": 3, "bbox": [x, y, w, h]}
            annotations.append(
                common
                | {"id": len(annotations) + 1, "iscrowd": 0}
                | {"area": w * h, "segmentation": [polygon]}
            )
            detections.append(common | {"score": 0.9 - 0.1 * len(detections)})
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "a"}]}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "boxes.json").write_text(json.dumps(detections))
    return [
        *("evaluate-coco", "--annotations", f"{folder}/truth.json"),
        *("--detections", f"{folder}/boxes.json", "--images", f"{folder}/images"),
        *("--out", f"{folder}/out"),
    ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_weights(tmp_path_factory.mktemp("weights") / "small.safetensors", MODEL))


def test_masks_are_the_predictors_and_ap_is_cocos(tmp_path: Path, weights: str, capsys) -> None:
    arguments = draw(tmp_path)
    assert main([*arguments, "--weights", weights, "--density", "0.3"]) == 0
    dense, sparse = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(s["method"], s["density"]) for s in (dense, sparse)] == [
        ("dense", 1.0),
        ("sparsesam", 0.3),
    ]
    assert (dense["images"], dense["detections"], dense["ap_change"]) == (2, 3, 0)
    assert sparse["ap_change"] == pytest.approx(sparse["ap"] - dense["ap"])
    config = MODEL.image_encoder
    assert sparse["gmacs"] == encoder_work(config, Sparsity(0.3)).total / 1e9 < dense["gmacs"]
    results = json.loads((tmp_path / "out" / "sparsesam_0.3.json").read_text())
    assert [result["score"] for result in results] == pytest.approx([0.9, 0.8, 0.7])
    predictor = SamPredictor(Sam.from_pretrained(weights).with_sparsity(Sparsity(0.3)))
    predictor.set_image(np.asarray(Image.open(tmp_path / "images" / "0.png")))
    x, y, w, h = BOXES[0][1]
    masks, _, _ = predictor.predict(box=np.array([x, y, x + w, y + h]), multimask_output=False)
    np.testing.assert_array_equal(coco_mask.decode(results[1]["segmentation"]), masks[0])
    assert "COCO segm AP, 2 images, 3 boxes" in capsys.readouterr().out


def without_speed(out: Path) -> list[dict]:
    summaries = json.loads((out / "summary.json").read_text())
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in summaries]


def test_a_killed_run_ends_with_the_same_masks(tmp_path, weights, monkeypatch, capsys) -> None:
    arguments = [*draw(tmp_path), "--weights", weights, "--density", "0.3"]
    assert main(arguments) == 0
    out, whole = tmp_path / "out", tmp_path / "whole"
    out.rename(whole)

    class KilledError(BaseException):
        pass

    segment, calls = coco.segment, []

    def killed(*args):
        calls.append(args)
        if len(calls) > 3:
            raise KilledError
        return segment(*args)

    monkeypatch.setattr(coco, "segment", killed)
    with pytest.raises(KilledError):
        main(arguments)
    masks = out / "sparsesam_0.3.jsonl"
    assert masks.read_text().count("\n") == 1
    with open(masks, "a") as file:
        file.write('{"image": 8, "resu')  # a line cut in the middle
    calls.clear()
    assert main([*arguments, "--resume"]) == 0
    assert len(calls) == 1
    assert without_speed(out) == without_speed(whole)
    for name in ("dense_1.json", "sparsesam_0.3.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    capsys.readouterr()
    assert main([*arguments, "--resume", "--min-score", "0.75"]) == 2
    assert "resume needs the min_score of the run" in capsys.readouterr().err
    masks.write_text("{}\n")
    assert main([*arguments, "--resume"]) == 2
    assert "sparsesam_0.3.jsonl, line 1: no image of a run" in capsys.readouterr().err


def test_ap_of_perfect_and_of_empty_masks(tmp_path: Path) -> None:
    draw(tmp_path)
    truth = COCO(tmp_path / "truth.json")
    truth.dataset["info"] = {}
    perfect = [
        {
            "image_id": a["image_id"],
            "category_id": 3,
            "score": 0.5,
            "segmentation": truth.annToRLE(a),
        }
        for a in truth.dataset["annotations"]
    ]
    assert coco.average_precision(truth, perfect, [7, 8])["ap"] == pytest.approx(1)
    # One of three objects is found, with certainty: precision 1 up to a recall of a third.
    one = coco.average_precision(truth, perfect[:1], [7, 8])
    assert (one["ap"], one["ap50"]) == pytest.approx((34 / 101, 34 / 101))
    assert coco.average_precision(truth, perfect[:1], [8])["ap"] == 0
    assert coco.average_precision(truth, [], [7, 8])["ap"] == 0


def test_broken_images_are_reported(tmp_path: Path, weights: str, capsys) -> None:
    arguments = [*draw(tmp_path), "--weights", weights, "--density", "1"]
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "1.png")
    assert main(arguments) == 1
    assert "1.png: must have its annotated size (64, 64), got (9, 9)" in capsys.readouterr().err
    (summary,) = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["detections"]) == (1, 2)
    (tmp_path / "images" / "0.png").unlink()
    assert main(arguments) == 2
    assert "at least one of 2 images must be usable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("truth.json", "[]", "annotations must be COCO's object"),
        ("truth.json", "{", "annotations must be a JSON file"),
        ("boxes.json", '[{"image_id": 7}]', "detections must be a JSON list of objects with bbox"),
        (
            "boxes.json",
            '[{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]',
            "detections must be of the annotations' images, got 1",
        ),
    ],
)
def test_wrong_files_write_nothing(tmp_path, weights, file, text, message, capsys) -> None:
    arguments = draw(tmp_path)
    (tmp_path / file).write_text(text)
    assert main([*arguments, "--weights", weights]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
