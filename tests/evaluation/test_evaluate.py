"""`sparsesam evaluate` end to end, on drawn photos and a tiny model with random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from models import SMALL, random_weights
from PIL import Image

from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.checkpoints import native
from sparsesam_jax.cli.app import main
from sparsesam_jax.evaluation import runner
from sparsesam_jax.evaluation.datasets import folder_pairs, read_photo
from sparsesam_jax.evaluation.metrics import boundary_iou, iou
from sparsesam_jax.evaluation.protocols import make_protocol
from sparsesam_jax.evaluation.rows import RowFile
from sparsesam_jax.evaluation.sparsity_file import read_sparsity, write_sparsity
from sparsesam_jax.model.compiled import CompiledSam
from sparsesam_jax.sparsity.work import encoder_work

KEYS = [
    *("method", "density", "prompts", "protocol", "images", "miou", "boundary_iou"),
    *("miou_change", "agreement", "feature_error", "images_per_second", "gmacs"),
]
SIZES = [(60, 90), (90, 60), (64, 64), (50, 70), (70, 50)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_weights(tmp_path_factory.mktemp("weights") / "small.safetensors"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folders `images` and `masks` with five drawn photos of several sizes."""
    return draw_photos(tmp_path, SIZES)


def draw_photos(tmp_path: Path, sizes: list[tuple[int, int]]) -> Path:
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index, (height, width) in enumerate(sizes):
        mask = np.zeros((height, width), bool)
        mask[10:40, 15 + index : 45] = True
        image = rng.integers(0, 100, (height, width, 3)) + 120 * mask[..., None]
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(255 * mask.astype(np.uint8)).save(tmp_path / "masks" / f"{index}.png")
    return tmp_path


def evaluate(photos: Path, weights: str, *args: str) -> int:
    folders = ["--images", str(photos / "images"), "--masks", str(photos / "masks")]
    out = ["--weights", weights, "--batch", "2", "--out", str(photos / "out")]
    return main(["evaluate", *folders, *out, *args])


def summaries(photos: Path) -> list[dict]:
    return json.loads((photos / "out" / "summary.json").read_text())


def without_speed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def test_products_are_an_option_and_part_of_a_run(photos: Path, weights: str, capsys) -> None:
    assert evaluate(photos, weights, "--density", "1", "--products", "float8") == 0
    assert json.loads((photos / "out" / "run.json").read_text())["products"] == "float8"
    (pair, *_) = folder_pairs(photos / "images", photos / "masks")
    photo = read_photo(pair)
    query = make_protocol("sam", SMALL.image_encoder.image_size).query(photo, "box")
    masks = []
    for products in ("dtype", "float8"):
        predictor = SamPredictor(Sam.from_pretrained(weights, products=products))
        predictor.set_image(query.image)
        masks.append(predictor.predict(**query.prompt.arguments, multimask_output=False)[0][0])
    row = next(iter(RowFile(photos / "out" / "rows.csv", resume=True).found.values()))
    assert row.iou == pytest.approx(iou(masks[1], photo.mask), abs=1e-6)
    assert (masks[0] != masks[1]).any()
    assert evaluate(photos, weights, "--density", "1", "--resume") == 2
    assert "resume needs the products of the run" in capsys.readouterr().err


def test_numbers_are_the_predictors(photos: Path, weights: str, capsys) -> None:
    assert evaluate(photos, weights, "--density", "1.0", "0.3", "--method", "sparsesam") == 0
    found = summaries(photos)
    assert [list(row) for row in found] == [KEYS] * 2
    assert [(row["method"], row["density"]) for row in found] == [
        ("sparsesam", 1.0),
        ("sparsesam", 0.3),
    ]
    sam = Sam.from_pretrained(weights)
    sparsity = Sparsity(0.3)
    scores: dict[str, list] = {}
    features = []
    for model in (sam, sam.with_sparsity(sparsity)):
        predictor = SamPredictor(model)
        for index, (height, width) in enumerate(SIZES):
            image = np.asarray(Image.open(photos / "images" / f"{index}.png"))
            truth = np.asarray(Image.open(photos / "masks" / f"{index}.png")) > 128
            # Twice the same, because the program of a batch of two is compiled.
            predictor.set_image_batch([image] * 2)
            box = np.array([15 + index, 10, min(45, width), min(40, height)])
            (masks, _), _, _ = predictor.predict_batch(box_batch=[box] * 2, multimask_output=False)
            features.append(np.asarray(predictor.get_image_embedding()[0]))
            scores.setdefault("iou", []).append(iou(masks[0], truth))
            scores.setdefault("boundary", []).append(boundary_iou(masks[0], truth))
            scores.setdefault("masks", []).append(masks[0])
    dense, sparse = found
    # One pixel of the smallest photo's box is a thousandth.
    assert dense["miou"] == pytest.approx(np.mean(scores["iou"][:5]), abs=1e-3)
    assert sparse["miou"] == pytest.approx(np.mean(scores["iou"][5:]), abs=1e-3)
    assert sparse["boundary_iou"] == pytest.approx(np.mean(scores["boundary"][5:]), abs=2e-3)
    assert sparse["miou_change"] == pytest.approx(sparse["miou"] - dense["miou"])
    agreement = [iou(a, b) for a, b in zip(scores["masks"][:5], scores["masks"][5:], strict=True)]
    assert sparse["agreement"] == pytest.approx(np.mean(agreement), abs=1e-3)
    errors = [
        np.linalg.norm(a - b) / np.linalg.norm(a)
        for a, b in zip(features[:5], features[5:], strict=True)
    ]
    assert sparse["feature_error"] == pytest.approx(np.mean(errors), rel=1e-3)
    assert (dense["miou_change"], dense["agreement"], dense["feature_error"]) == (0, 1, 0)
    config = SMALL.image_encoder
    assert sparse["gmacs"] == encoder_work(config, sparsity).total / 1e9
    assert dense["gmacs"] == encoder_work(config).total / 1e9 > sparse["gmacs"]
    assert {row["images"] for row in found} == {5}
    assert all(row["images_per_second"] > 0 for row in found)
    assert "sparsesam" in capsys.readouterr().out
    names = {path.name for path in (photos / "out").iterdir()}
    assert names == {
        *("rows.csv", "summary.json", "problems.json", "run.json"),
        *("quality.png", "best_worst_sparsesam.png"),
    }
    assert len(RowFile(photos / "out" / "rows.csv", resume=True).found) == 10


def test_crop_measures_what_a_cropping_predictor_finds(tmp_path: Path, monkeypatch, capsys) -> None:
    """Photos of one grid are encoded together, whatever stands between them."""
    encoder = dataclasses.replace(SMALL.image_encoder, image_size=256)
    config = dataclasses.replace(SMALL, image_encoder=encoder)
    weights = random_weights(tmp_path / "sam.safetensors", config)
    sizes = [(40, 90), (90, 40), (64, 64), (42, 88), (88, 42), (64, 60)]
    photos, crops = draw_photos(tmp_path, sizes), []
    encode = CompiledSam.encode_padded

    def noted(self, padded, sizes, crop=None):
        crops.append((len(padded), crop))
        return encode(self, padded, sizes, crop)

    monkeypatch.setattr(CompiledSam, "encode_padded", noted)
    args = ("--density", "1.0", "--method", "sparsesam", "--padding", "crop")
    assert evaluate(photos, str(weights), *args) == 0
    assert sorted(crops, key=str) == [(2, (128, 256)), (2, (256, 128)), (2, None)]
    predictor = SamPredictor(Sam.from_pretrained(weights), padding="crop")
    found = RowFile(photos / "out" / "rows.csv", resume=True).found
    scores = {row.image: row.iou for row in found.values()}
    for index, (height, width) in enumerate(sizes):
        image = np.asarray(Image.open(photos / "images" / f"{index}.png"))
        truth = np.asarray(Image.open(photos / "masks" / f"{index}.png")) > 128
        predictor.set_image_batch([image] * 2)
        box = np.array([15 + index, 10, min(45, width), min(40, height)])
        (masks, _), _, _ = predictor.predict_batch(box_batch=[box] * 2, multimask_output=False)
        assert scores[f"{index}"] == pytest.approx(iou(masks[0], truth), abs=2e-3)
    assert json.loads((photos / "out" / "run.json").read_text())["padding"] == "crop"


def test_a_killed_run_ends_with_the_same_numbers(photos, weights, monkeypatch, capsys) -> None:
    arguments = ("--density", "0.3", "--method", "sparsesam", "released")
    assert evaluate(photos, weights, *arguments) == 0
    whole = without_speed(summaries(photos))
    (photos / "out").rename(photos / "whole")

    class KilledError(BaseException):
        pass

    predict, calls = runner.predict, []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) > 4:
            raise KilledError
        return predict(*args, **kwargs)

    monkeypatch.setattr(runner, "predict", killed)
    with pytest.raises(KilledError):
        evaluate(photos, weights, *arguments)
    rows = photos / "out" / "rows.csv"
    assert rows.read_text().count("\n") == 1 + 2 * 3  # the first batch of dense and two others
    with open(rows, "a") as file:
        file.write("sparsesam,0.3,box,sam,4,0.5")  # a line cut in the middle
    calls.clear()
    monkeypatch.setattr(runner, "predict", lambda *a, **k: calls.append(a) or predict(*a, **k))
    assert evaluate(photos, weights, *arguments, "--resume") == 0
    # Two batches were left for three models, and two methods' pictures show 5 photos, 3 batches.
    assert len(calls) == 2 * 3 + 2 * 2 * 3
    assert without_speed(summaries(photos)) == whole
    # All is there now, also for a further method.
    calls.clear()
    assert evaluate(photos, weights, *arguments, "random", "--resume") == 0
    assert len(calls) == 2 * 3 + 3 * 2 * 3  # with dense, which it is compared with
    assert without_speed(summaries(photos))[:2] == whole
    capsys.readouterr()
    assert evaluate(photos, weights, *arguments, "--resume", "--prompts", "point") == 2
    assert "resume needs the prompts of the run" in capsys.readouterr().err


def test_broken_images_are_reported_and_counted(photos: Path, weights: str, capsys) -> None:
    (photos / "images" / "0.png").write_bytes(b"no picture")
    Image.new("L", (9, 9), 255).save(photos / "masks" / "3.png")
    Image.new("L", SIZES[4][::-1]).save(photos / "masks" / "4.png")
    Image.new("L", (9, 9), 255).save(photos / "masks" / "5.png")
    assert evaluate(photos, weights, "--density", "0.5") == 1
    text = capsys.readouterr().err
    assert "left out: 0: image must be a picture" in text
    assert "left out: 3: the mask of 3 must have its photo's size (50, 70), got (9, 9)" in text
    assert "left out: 4: the mask of 4 must have foreground" in text
    assert "left out: 5: 5 has no image" in text
    assert "4 of 6 images left out" in text
    assert [row["images"] for row in summaries(photos)] == [2]
    problems = json.loads((photos / "out" / "problems.json").read_text())
    assert list(problems) == ["0", "3", "4", "5"]
    for name in "12":
        (photos / "images" / f"{name}.png").write_bytes(b"")
    assert evaluate(photos, weights, "--density", "0.5") == 2
    assert "at least one image must be usable" in capsys.readouterr().err


@pytest.mark.parametrize(("protocol", "prompts"), [("hq44k", "points3"), ("release", "box+point")])
def test_protocols_and_prompts(photos: Path, weights: str, protocol: str, prompts: str) -> None:
    arguments = ("--protocol", protocol, "--prompts", prompts, "--density", "0.5", "--limit", "2")
    assert evaluate(photos, weights, *arguments) == 0
    (row,) = summaries(photos)
    assert (row["protocol"], row["prompts"], row["images"]) == (protocol, prompts, 2)
    assert 0 <= row["miou"] <= 1
    run = json.loads((photos / "out" / "run.json").read_text())
    assert run["dtype"] == ("float16" if protocol == "release" else "float32")


def test_a_sparsity_of_ones_own(photos: Path, weights: str) -> None:
    sparsity = Sparsity((0.5, 1.0, 0.3), importance="dispersion")
    write_sparsity(photos / "mine.json", sparsity)
    assert read_sparsity(photos / "mine.json") == sparsity
    arguments = ("--sparsity", str(photos / "mine.json"), "--density", "1", "--limit", "2")
    assert evaluate(photos, weights, *arguments) == 0
    dense, mine = summaries(photos)
    assert (mine["method"], mine["density"]) == ("mine", pytest.approx(0.6))
    assert mine["gmacs"] == encoder_work(SMALL.image_encoder, sparsity).total / 1e9
    assert dense["gmacs"] > mine["gmacs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0.5", "1.5"], "density must lie in (0, 1], got 1.5"),
        (["--density", "0.5", "0.5"], "every method and density must be given once"),
        (["--method", "magic"], "method must be one of sparsesam, released"),
        (["--dataset", "dis5k", "--root", "."], "either --images and --masks or --dataset"),
        (["--batch", "0"], "batch must be positive, got 0"),
        (["--limit", "0"], "limit must be positive, got 0"),
        (["--prompts", "mask"], "'mask' is not one of"),
        (["--weights", "absent"], "weights must be the name of embedded ones"),
        (["--sparsity", "absent.json"], "sparsity must be a JSON file"),
        (["--out", "absent/out"], "out must be a folder"),
    ],
)
def test_wrong_arguments_write_nothing(photos, weights, arguments, message, capsys) -> None:
    assert evaluate(photos, weights, *arguments) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1
    assert not (photos / "out").exists()


def test_dataset_needs_its_root(weights: str, capsys) -> None:
    assert main(["evaluate", "--dataset", "coift", "--weights", weights]) == 2
    assert "--dataset needs --root" in capsys.readouterr().err


def test_nan_in_weights_is_named(photos: Path, weights: str, tmp_path: Path, capsys) -> None:
    config, arrays = native.read(weights)
    name = "image_encoder.neck.0.kernel"
    arrays[name] = np.full_like(arrays[name], np.nan)
    native.write(tmp_path / "nan.safetensors", config, arrays)
    assert evaluate(photos, str(tmp_path / "nan.safetensors"), "--density", "1") == 2
    assert f"NaN or an infinity in {name}" in capsys.readouterr().err
    assert not (photos / "out" / "summary.json").exists()
