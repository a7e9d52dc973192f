"""Seven clients of Meta's package by import swap alone: the calls they make, masks beside Meta's.

A client here is a function of the package that it imports; what it does to the package and its
objects is what the named project does, written anew. Each runs once with `segment_anything` from
PyPI and once with `sparsesam_jax.segment_anything`, from the same `.pth`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from meta_sam import import_meta, mask_iou, meta_sam  # noqa: E402
from skimage import data  # noqa: E402

from sparsesam_jax import segment_anything as ours  # noqa: E402
from sparsesam_jax.checkpoints import convert_checkpoint  # noqa: E402
from sparsesam_jax.checkpoints.sources import locate  # noqa: E402

KIND = "vit_t"  # Meta's registry gets an entry of that name
IMAGE = np.ascontiguousarray(data.coffee()[:300:2, 100:500:2])  # [150, 200, 3]
BOXES = np.array([[20.0, 30.0, 120.0, 110.0], [60.0, 50.0, 180.0, 140.0]])
GENERATOR = {  # such that masks of this small model remain
    "points_per_side": 3,
    "pred_iou_thresh": 0.485,
    "stability_score_thresh": 0.18,
}


def samgeo(package: Any, checkpoint: str) -> list[np.ndarray]:
    """samgeo's SamGeo: a generator with options, and a predictor for points and for boxes."""
    sam = package.sam_model_registry[KIND](checkpoint=checkpoint)
    sam.to(device="cpu")
    generator = package.SamAutomaticMaskGenerator(
        sam, points_per_batch=16, crop_n_layers=0, min_mask_region_area=0, **GENERATOR
    )
    records = sorted(generator.generate(IMAGE), key=lambda record: record["area"], reverse=True)
    predictor = package.SamPredictor(sam)
    predictor.set_image(IMAGE, image_format="RGB")
    masks, _scores, logits = predictor.predict(
        np.array([[70, 60], [20, 20]]), np.array([1, 0]), None, None, True, return_logits=False
    )
    boxes = torch.tensor(BOXES, device=predictor.device)
    boxes = predictor.transform.apply_boxes_torch(boxes, IMAGE.shape[:2])
    many, _, _ = predictor.predict_torch(
        point_coords=None, point_labels=None, boxes=boxes, multimask_output=False
    )
    assert logits.shape == (3, 256, 256)
    return [r["segmentation"] for r in records] + [*masks, *many.squeeze(1).cpu().numpy()]


def label_studio(package: Any, checkpoint: str) -> list[np.ndarray]:
    """label-studio's SAM backend: a predictor whose state is kept by image and put back."""
    model = package.sam_model_registry[KIND](checkpoint=checkpoint)
    model.to(device="cpu")
    predictor = package.SamPredictor(model)
    kept = {}
    for name, image in (("a", IMAGE), ("b", IMAGE[:, ::-1].copy())):
        predictor.set_image(image)
        kept[name] = {
            "features": predictor.features,
            "original_size": predictor.original_size,
            "input_size": predictor.input_size,
            "is_image_set": predictor.is_image_set,
        }
    found = []
    for name in ("a", "b", "a"):
        predictor.reset_image()
        for attribute, value in kept[name].items():
            setattr(predictor, attribute, value)
        masks, scores, _ = predictor.predict(
            point_coords=np.array([[100, 75]]),
            point_labels=np.array([1]),
            box=BOXES[0],
            multimask_output=False,
        )
        assert scores.shape == (1,)
        found.append(masks[0].astype(np.uint8) > 0)
    return found


def grounded_sam(package: Any, checkpoint: str) -> list[np.ndarray]:
    """The Grounded-SAM demo: boxes of a detector, scaled to the photo, through tensors."""
    predictor = package.SamPredictor(package.sam_model_registry[KIND](checkpoint).to("cpu"))
    predictor.set_image(IMAGE)
    height, width = IMAGE.shape[:2]
    relative = torch.tensor([[0.35, 0.45, 0.5, 0.5], [0.6, 0.6, 0.6, 0.6]])  # centre and size
    boxes = relative * torch.tensor([width, height, width, height])
    boxes[:, :2] -= boxes[:, 2:] / 2
    boxes[:, 2:] += boxes[:, :2]
    transformed = predictor.transform.apply_boxes_torch(boxes.cpu(), IMAGE.shape[:2]).to("cpu")
    masks, _, _ = predictor.predict_torch(
        point_coords=None, point_labels=None, boxes=transformed.to("cpu"), multimask_output=False
    )
    assert masks.dtype == torch.bool and masks.shape == (2, 1, 150, 200)
    return [mask.cpu().numpy()[0] for mask in masks]


def micro_sam(package: Any, checkpoint: str) -> list[np.ndarray]:
    """micro-sam: embeddings as numpy arrays on disk, then prompts in batches, masks as input."""
    sam = package.sam_model_registry[KIND]()
    sam = package.sam_model_registry[KIND](checkpoint)
    sam.to(device=torch.device("cpu"))
    predictor = package.SamPredictor(sam)
    predictor.model_type = KIND
    predictor.set_image(IMAGE)
    features = predictor.get_image_embedding().cpu().numpy()
    sizes = predictor.original_size, predictor.input_size
    predictor = package.SamPredictor(sam)
    predictor.features = torch.from_numpy(features.copy()).to(predictor.device)
    predictor.original_size, predictor.input_size = (tuple(size) for size in sizes)
    predictor.is_image_set = True

    points = predictor.transform.apply_coords(BOXES.reshape(2, 2, 2)[:, :1], IMAGE.shape[:2])
    boxes = predictor.transform.apply_boxes(BOXES, IMAGE.shape[:2])
    points, boxes = (
        torch.as_tensor(x, dtype=torch.float, device=predictor.device) for x in (points, boxes)
    )
    labels = torch.ones((2, 1), dtype=torch.float)
    masks, scores, logits = predictor.predict_torch(
        point_coords=points, point_labels=labels, boxes=boxes, multimask_output=False
    )
    again, _, _ = predictor.predict_torch(
        points, labels, boxes=boxes, mask_input=logits, multimask_output=True, return_logits=True
    )
    assert scores.shape == (2, 1)
    best = (again > sam.mask_threshold).flatten(0, 1)
    return [*masks[:, 0].numpy(), *best.numpy()]


def autodistill(package: Any, checkpoint: str) -> list[np.ndarray]:
    """autodistill: a box of a detection at a time, the mask with the best score."""
    predictor = package.SamPredictor(
        package.sam_model_registry[KIND](checkpoint=checkpoint).to(device="cpu")
    )
    predictor.set_image(IMAGE[..., ::-1], image_format="BGR")
    found = []
    for box in BOXES:
        masks, scores, _ = predictor.predict(box=box, multimask_output=True)
        found.append(masks[np.argmax(scores)])
    return found


def inpaint_anything(package: Any, checkpoint: str) -> list[np.ndarray]:
    """Inpaint-Anything: one click, three masks, as pictures of 0 and 255 that are dilated."""
    sam = package.sam_model_registry[KIND](checkpoint=checkpoint)
    sam.to(device="cpu")
    predictor = package.SamPredictor(sam)
    predictor.set_image(IMAGE)
    masks, scores, logits = predictor.predict(
        point_coords=np.array([[90, 70]]), point_labels=[1], multimask_output=True
    )
    order = scores.argsort()
    scores.sort()  # results are the client's
    assert logits[order].shape == (3, 256, 256)
    return list(masks.astype(np.uint8) * 255 > 0)


def napari(package: Any, checkpoint: str) -> list[np.ndarray]:
    """napari-segment-anything: layers of points with boolean labels, a box, the last logits."""
    sam = package.sam_model_registry[KIND](checkpoint=checkpoint)
    sam.to("cpu")
    predictor = package.SamPredictor(sam)
    predictor.set_image(IMAGE)
    assert predictor.features is not None
    found, logits = [], None
    layers: list[tuple[Any, Any, Any]] = [
        (np.array([[70.0, 90.0]]), np.array([True]), None),
        (np.array([[70.0, 90.0], [20.0, 30.0]]), np.array([True, False]), None),
        (None, None, BOXES[1][None]),
    ]
    for points, labels, box in layers:
        mask, _, logits = predictor.predict(
            point_coords=None if points is None else np.flip(points, axis=-1),
            point_labels=labels,
            box=box,
            mask_input=logits,
            multimask_output=False,
        )
        found.append(mask[0])
    generator = package.SamAutomaticMaskGenerator(sam, output_mode="binary_mask", **GENERATOR)
    labels = np.zeros(IMAGE.shape[:2], int)
    for record in sorted(generator.generate(IMAGE), key=lambda r: r["area"], reverse=True):
        labels[record["segmentation"]] = 1
    return [*found, labels > 0]


CLIENTS = [samgeo, label_studio, grounded_sam, micro_sam, autodistill, inpaint_anything, napari]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("clients") / "sam_vit_t.pth"
    convert_checkpoint(locate(KIND), path, dtype="float32")
    return str(path)


@pytest.fixture(scope="module")
def metas(tmp_path_factory) -> Any:
    """Meta's package with an entry for the small model, which is built once."""
    folder: Path = tmp_path_factory.mktemp("meta")
    model = functools.cache(lambda: meta_sam(locate(KIND), folder))
    package = import_meta()
    package.sam_model_registry[KIND] = lambda checkpoint=None: model()
    yield package
    del package.sam_model_registry[KIND]


@pytest.fixture(scope="module", autouse=True)
def built_once() -> Any:
    """Ours from the `.pth` too, once for all clients."""
    built = functools.cache(ours.sam_model_registry[KIND])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ours.sam_model_registry, KIND, lambda checkpoint=None: built(checkpoint))
        yield


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_client(client: Callable, checkpoint: str, metas: Any):
    found = [client(package, checkpoint) for package in (ours, metas)]
    assert len(found[0]) == len(found[1]) > 0
    for mine, other in zip(*found, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape == (150, 200)
        assert mask_iou(mine, other) >= 0.999
    assert any(mask.any() for mask in found[1])
