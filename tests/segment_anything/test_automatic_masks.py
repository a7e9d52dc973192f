"""The mask generator beside Meta's: the same masks, with the same records."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import scipy.ndimage  # noqa: E402
from meta_sam import import_meta, mask_iou, meta_sam  # noqa: E402
from models import random_weights  # noqa: E402
from pycocotools import mask as coco  # noqa: E402
from skimage import data  # noqa: E402

from sparsesam_jax import Sam as OurSam  # noqa: E402
from sparsesam_jax import SamPredictor, Sparsity  # noqa: E402
from sparsesam_jax.checkpoints.sources import locate  # noqa: E402
from sparsesam_jax.predict import automatic_masks, mask_measures, mask_pool  # noqa: E402
from sparsesam_jax.predict.automatic_masks import AutomaticMaskGenerator  # noqa: E402
from sparsesam_jax.predict.mask_measures import mask_box  # noqa: E402
from sparsesam_jax.segment_anything import SamAutomaticMaskGenerator  # noqa: E402
from sparsesam_jax.segment_anything.sam import Sam  # noqa: E402

# Random weights: small logits and low thresholds, or nothing would remain of the masks.
LOOSE: dict[str, Any] = {
    "points_per_side": 3,
    "pred_iou_thresh": 0.3,
    "stability_score_thresh": 0.5,
    "stability_score_offset": 0.1,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Sam, Any]:
    folder = tmp_path_factory.mktemp("automatic")
    weights = random_weights(folder / "small.safetensors")
    return Sam(OurSam.from_pretrained(weights)), meta_sam(weights, folder)


@pytest.fixture(autouse=True)
def small_programs(monkeypatch) -> None:
    """Those of a device measure up to 256 masks at once, which takes a CPU a while."""
    monkeypatch.setattr(mask_measures, "MEASURED_SLOTS", 2**18)


@pytest.fixture
def cv2(monkeypatch) -> None:
    """The one function of OpenCV that Meta's generator calls."""

    def components(mask: np.ndarray, connectivity: int) -> tuple:
        assert connectivity == 8
        labels, count = scipy.ndimage.label(mask, np.ones((3, 3)))
        sizes = np.bincount(labels.reshape(-1), minlength=count + 1)
        return count + 1, labels, sizes[:, None], None

    module = types.ModuleType("cv2")
    module.connectedComponentsWithStats = components  # pyright: ignore
    monkeypatch.setitem(sys.modules, "cv2", module)


def photo(height: int, width: int) -> np.ndarray:
    """Something with shapes: blurred noise."""
    noise = np.random.default_rng(height).normal(size=(height, width, 3))
    smooth = scipy.ndimage.gaussian_filter(noise, (6, 6, 0))
    return np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))


def pixels(record: dict) -> np.ndarray:
    return np.asarray(record["segmentation"], bool)


def check_records(mine: list[dict], metas: list[dict]) -> None:
    assert len(mine) == len(metas) > 0
    left = list(mine)
    for record in metas:
        best = max(left, key=lambda other: mask_iou(pixels(other), pixels(record)))
        assert mask_iou(pixels(best), pixels(record)) >= 0.99
        left = [other for other in left if other is not best]
        assert best.keys() == record.keys()
        assert best["crop_box"] == record["crop_box"]
        np.testing.assert_allclose(best["point_coords"], record["point_coords"])
        np.testing.assert_allclose(best["bbox"], record["bbox"], atol=2)
        assert best["area"] == pixels(best).sum()
        assert abs(best["predicted_iou"] - record["predicted_iou"]) < 2e-3
        assert abs(best["stability_score"] - record["stability_score"]) < 5e-3
        for name, value in record.items():
            assert type(best[name]) is type(value), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"box_nms_thresh": 0.3, "stability_score_offset": 0.05},
        {"crop_n_layers": 1, "crop_nms_thresh": 0.5},
        {
            "points_per_side": 4,
            "crop_n_layers": 2,
            "crop_n_points_downscale_factor": 2,
            "crop_overlap_ratio": 0.5,
        },
        {"min_mask_region_area": 60},
        {"points_per_side": None, "point_grids": [np.array([[0.2, 0.3], [0.9, 0.5]])]},
        {"points_per_batch": 2},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_records_are_metas(models, cv2, options: dict):
    size = (90, 120) if len(options) % 2 else (150, 70)
    image, options = photo(*size), {"points_per_batch": 4} | LOOSE | options
    metas = import_meta().SamAutomaticMaskGenerator(models[1], **options).generate(image)
    check_records(SamAutomaticMaskGenerator(models[0], **options).generate(image), metas)
    on_device = SamPredictor(models[0].sam, transforms="device")
    check_records(AutomaticMaskGenerator(on_device, **options).generate(image), metas)


def test_a_trained_model_on_a_photo(tmp_path):
    """On the embedded weights, whose scores are lower than those of Meta's models."""
    image = data.coffee()[:400:2, 100:500:2]
    options = {"points_per_side": 4, "pred_iou_thresh": 0.485, "stability_score_thresh": 0.18}
    mine = AutomaticMaskGenerator(OurSam.from_pretrained("vit_t"), **options).generate(image)
    model = meta_sam(locate("vit_t"), tmp_path)
    check_records(mine, import_meta().SamAutomaticMaskGenerator(model, **options).generate(image))


@pytest.mark.parametrize(("transforms", "crops"), [("host", 1), ("device", 0), ("device", 1)])
@pytest.mark.parametrize("mode", ["uncompressed_rle", "coco_rle"])
def test_output_modes(models, mode: str, crops: int, transforms: Any):
    image, options = photo(90, 128), LOOSE | {"crop_n_layers": crops}
    predictor = SamPredictor(models[0].sam, transforms=transforms)
    plain = AutomaticMaskGenerator(predictor, **options).generate(image)
    mine = AutomaticMaskGenerator(predictor, output_mode=mode, **options).generate(image)  # pyright: ignore
    metas = import_meta().SamAutomaticMaskGenerator(models[1], output_mode=mode, **LOOSE)
    kinds = {type(r["segmentation"]["counts"]) for r in metas.generate(image)}
    for record, expected in zip(mine, plain, strict=True):
        assert record["area"] == expected["segmentation"].sum()
        run = json.loads(json.dumps(record))["segmentation"]
        assert kinds == {type(run["counts"])}
        if mode == "uncompressed_rle":
            run = coco.frPyObjects(run, *run["size"])
        np.testing.assert_array_equal(coco.decode(run), expected["segmentation"])


def test_nothing_found(models):
    options = {"points_per_side": 2, "pred_iou_thresh": 1e9, "crop_n_layers": 1}
    for more in ({}, {"min_mask_region_area": 9}):
        generator = AutomaticMaskGenerator(SamPredictor(models[0].sam), **options, **more)
        assert generator.generate(photo(60, 60)) == []


@pytest.mark.parametrize(("transforms", "padding"), [("host", "crop"), ("device", "square")])
def test_several_photos(models, transforms: Any, padding: Any):
    """As one by one, with a sparse encoder and photos of any sizes."""
    sam = models[0].sam.with_sparsity(Sparsity(0.5))
    predictor = SamPredictor(sam, transforms=transforms, padding=padding)
    generator = AutomaticMaskGenerator(predictor, **LOOSE, crop_n_layers=1)
    assert generator.generate_batch([]) == []
    images = [photo(90, 60), photo(9, 40)]
    found = generator.generate_batch(images)
    for records, image in zip(found, images, strict=True):
        check_records(records, generator.generate(image))
        assert all(record["segmentation"].shape == image.shape[:2] for record in records)


@pytest.mark.parametrize("transforms", ["host", "device"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 300)], ids=str)
def test_tiny_photos(models, size: tuple[int, int], transforms: Any):
    options = LOOSE | {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    image = np.full((*size, 3), 200, np.uint8)
    predictor = SamPredictor(models[0].sam, transforms=transforms)
    mine = AutomaticMaskGenerator(predictor, **options).generate(image)
    if max(size) == 300:  # Meta's code makes it 0 pixels high, and fails
        assert mine and all(record["segmentation"].shape == size for record in mine)
        return
    metas = import_meta().SamAutomaticMaskGenerator(models[1], **options).generate(image)
    assert {tuple(record["bbox"]) for record in mine} == {tuple(r["bbox"]) for r in metas}
    assert len(mine) == len(metas)


@pytest.mark.parametrize("transforms", ["host", "device"])
def test_a_photo_of_48_megapixels(models, transforms: Any):
    """Its masks are those of the same photo at a tenth, where it is as coarse as that."""
    small = photo(60, 80)
    predictor = SamPredictor(models[0].sam, transforms=transforms)
    options: dict[str, Any] = {"points_per_side": 1, "box_nms_thresh": 1.0}
    options |= {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    few = AutomaticMaskGenerator(predictor, **options, output_mode="coco_rle")
    large = np.repeat(np.repeat(small, 100, 0), 100, 1)
    found, expected = few.generate(large), few.generate(small)
    assert len(found) == len(expected) > 0
    for record, other in zip(found, expected, strict=True):
        assert record["segmentation"]["size"] == [6000, 8000]
        assert coco.area(record["segmentation"]) == record["area"]
        assert abs(record["area"] / 1e4 - other["area"]) < 0.05 * small.size / 3
        assert abs(record["stability_score"] - other["stability_score"]) < 0.1


def test_equal_masks(models):
    """Of prompts that say the same one mask remains of each kind, as at Meta's."""
    options = LOOSE | {"points_per_side": None, "point_grids": [np.full((5, 2), 0.4)]}
    image = photo(90, 120)
    metas = import_meta().SamAutomaticMaskGenerator(models[1], **options).generate(image)
    for transforms in ("host", "device"):
        predictor = SamPredictor(models[0].sam, transforms=transforms)
        mine = AutomaticMaskGenerator(predictor, **options).generate(image)
        check_records(mine, metas)
        assert len(mine) <= 3


def test_many_masks_in_pools(models, monkeypatch):
    """More masks than a pool holds, and more than are taken at once, are the host's too."""
    monkeypatch.setattr(mask_pool, "POOL", 5)
    monkeypatch.setattr(mask_pool.DevicePool, "at_once", 3)
    options: dict[str, Any] = {"points_per_side": 3, "crop_n_layers": 1}
    options |= {name: 0.0 for name in ("pred_iou_thresh", "stability_score_thresh")}
    options |= {name: 1.0 for name in ("box_nms_thresh", "crop_nms_thresh")}
    image = photo(90, 120)
    found = [
        AutomaticMaskGenerator(SamPredictor(models[0].sam, transforms=transforms), **options)
        for transforms in ("device", "host")
    ]
    mine, expected = (generator.generate(image) for generator in found)
    assert len(mine) > 20
    check_records(mine, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points_per_side": None}, "points_per_side and point_grids must be given, got neither"),
        ({"point_grids": [np.zeros((1, 2))]}, "must be given, got both"),
        (
            {"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1},
            r"point_grids must have one grid a layer \(2\), got 1",
        ),
        ({"output_mode": "png"}, "output_mode must be one of binary_mask, .*; got 'png'"),
        (
            {"points_per_side": 3, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
            "points_per_side must leave a point in every layer, got none in layer 2",
        ),
        ({"points_per_batch": 0}, "points_per_batch must be positive, got 0"),
    ],
)
def test_bad_options(models, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SamAutomaticMaskGenerator(models[0], **options)


def test_bad_images(models):
    with pytest.raises(ValueError, match="image must be a uint8 array"):
        SamAutomaticMaskGenerator(models[0]).generate(np.zeros((9, 9), np.uint8))


def test_parts_are_metas(cv2):
    import_meta()
    from segment_anything.utils import amg

    for side in (1, 2, 7):
        np.testing.assert_allclose(automatic_masks.point_grid(side), amg.build_point_grid(side))
    for size, layers, ratio in (((90, 120), 2, 512 / 1500), ((31, 77), 3, 0.1)):
        boxes, depths = amg.generate_crop_boxes(size, layers, ratio)
        crops = automatic_masks.crop_boxes(size, layers, ratio)
        assert [(list(crop.box), crop.layer) for crop in crops] == list(
            zip(boxes, depths, strict=True)
        )
    rng = np.random.default_rng(0)
    for trial in range(60):
        mask = rng.random((17, 23)) < (0.02, 0.4, 0.7, 0.95, 1.0, 0.0)[trial % 6]
        for kind in ("holes", "islands"):
            got = automatic_masks.remove_small_regions(mask, 1 + trial % 9, kind)  # pyright: ignore
            want = amg.remove_small_regions(mask, 1 + trial % 9, kind)
            np.testing.assert_array_equal(got[0], want[0])
            assert got[1] == want[1]
        box = amg.batched_mask_to_box(torch.tensor(mask)[None])[0].tolist()
        assert list(mask_box(mask)) == box
