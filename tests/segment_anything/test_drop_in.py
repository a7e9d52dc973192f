"""Every method and attribute of the drop-in module beside Meta's package, on a small model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from meta_sam import import_meta, meta_sam  # noqa: E402
from models import random_weights  # noqa: E402

from sparsesam_jax import Sam as OurSam  # noqa: E402
from sparsesam_jax import segment_anything as ours  # noqa: E402
from sparsesam_jax.checkpoints import convert_checkpoint  # noqa: E402
from sparsesam_jax.checkpoints.sources import locate  # noqa: E402
from sparsesam_jax.segment_anything.sam import Sam  # noqa: E402
from sparsesam_jax.segment_anything.utils.transforms import ResizeLongestSide  # noqa: E402

IMAGE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
BOX = np.array([10.0, 20.0, 90.0, 70.0])
POINTS, LABELS = np.array([[40.0, 50.0], [80.0, 20.0]]), np.array([1, 0])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Sam, Any]:
    folder = tmp_path_factory.mktemp("drop_in")
    weights = random_weights(folder / "small.safetensors")
    return Sam(OurSam.from_pretrained(weights)), meta_sam(weights, folder)


@pytest.fixture
def predictors(models) -> list[Any]:
    predictors = [ours.SamPredictor(models[0]), import_meta().SamPredictor(sam_model=models[1])]
    for predictor in predictors:
        predictor.set_image(IMAGE)
    return predictors


def assert_close(one: Any, other: Any) -> None:
    """Same kind, shape and dtype; values of float32 that another library has summed."""
    assert type(one) is type(other)
    assert tuple(one.shape) == tuple(other.shape) and one.dtype == other.dtype
    one, other = (np.asarray(x) for x in (one, other))
    if one.dtype == bool:
        assert (one == other).mean() > 0.999
    else:
        np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(other).max())


def test_names():
    meta = import_meta()
    assert set(meta.sam_model_registry) <= set(ours.sam_model_registry)
    for name in ("build_sam", "build_sam_vit_b", "build_sam_vit_l", "build_sam_vit_h",
                 "SamPredictor", "SamAutomaticMaskGenerator"):  # fmt: skip
        assert hasattr(meta, name) and hasattr(ours, name)
    for kind in (meta, ours):
        assert kind.build_sam is kind.sam_model_registry["default"]


def test_attributes(predictors):
    for name in ("original_size", "input_size", "is_image_set", "device"):
        assert getattr(predictors[0], name) == getattr(predictors[1], name), name
    for name in ("mask_threshold", "image_format", "device"):
        assert getattr(predictors[0].model, name) == getattr(predictors[1].model, name), name
    mine, metas = predictors
    assert mine.model.image_encoder.img_size == metas.model.image_encoder.img_size
    assert mine.transform.target_length == metas.transform.target_length
    assert_close(mine.features, metas.features)
    assert_close(mine.get_image_embedding(), metas.get_image_embedding())
    for predictor in predictors:
        predictor.reset_image()
        assert not predictor.is_image_set and predictor.features is None
        with pytest.raises(RuntimeError):
            predictor.predict(box=BOX)
        with pytest.raises(RuntimeError):
            predictor.predict_torch(None, None)
        with pytest.raises(RuntimeError):
            predictor.get_image_embedding()


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_predict(predictors, image_format):
    for predictor in predictors:
        predictor.set_image(IMAGE, image_format)
    for prompt in (
        {"box": BOX[None]},
        {"point_coords": POINTS, "point_labels": LABELS.astype(bool), "multimask_output": False},
        {"point_coords": POINTS, "point_labels": LABELS, "box": BOX, "return_logits": True},
    ):
        found = [predictor.predict(**prompt) for predictor in predictors]
        for one, other in zip(*found, strict=True):
            assert_close(one, other)
        mask = found[1][2][:1]
        found = [predictor.predict(**prompt, mask_input=mask) for predictor in predictors]
        for one, other in zip(*found, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("return_logits", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_predict_torch(predictors, count: int, return_logits: bool):
    size = IMAGE.shape[:2]
    boxes = torch.tensor(BOX + np.arange(count)[:, None])
    points = torch.tensor(POINTS).repeat(count, 1, 1)
    labels = torch.tensor(LABELS).repeat(count, 1)
    found = []
    for predictor in predictors:
        transform = predictor.transform
        box = transform.apply_boxes_torch(boxes, size)
        at = transform.apply_coords_torch(points, size)
        low = predictor.predict_torch(None, None, box, multimask_output=False)[2]
        options = {"multimask_output": True, "return_logits": return_logits}
        found.append([
            *predictor.predict_torch(point_coords=None, point_labels=None, boxes=box, **options),
            *predictor.predict_torch(at, labels, **options),
            *predictor.predict_torch(at, labels, box, low, **options),
        ])  # fmt: skip
    for one, other in zip(*found, strict=True):
        assert_close(one, other)
    none = predictors[0].predict_torch(None, None, torch.zeros(0, 4))
    assert [tuple(x.shape) for x in none] == [(0, 3, 90, 120), (0, 3), (0, 3, 32, 32)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_set_torch_image(predictors, dtype):
    found = []
    for predictor in predictors:
        resized = predictor.transform.apply_image(IMAGE)
        image = torch.as_tensor(resized).to(dtype).permute(2, 0, 1)[None]
        predictor.reset_image()
        predictor.set_torch_image(image, IMAGE.shape[:2])
        found.append([predictor.features, *predictor.predict(box=BOX)])
        assert predictor.input_size == (96, 128) and predictor.original_size == (90, 120)
    for one, other in zip(*found, strict=True):
        assert_close(one, other)
    with pytest.raises(ValueError, match=r"transformed_image must be .* got shape \(1, 3, 9, 9\)"):
        predictors[0].set_torch_image(torch.zeros(1, 3, 9, 9), (9, 9))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)], ids=str)
@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_kept_features_are_set_again(predictors, order, kind):
    """As clients that keep embeddings do it, whatever the order, an image set before or not."""
    mine, metas = predictors
    expected = mine.predict(box=BOX)
    names = ("features", "original_size", "input_size", "is_image_set")
    kept = {name: getattr(mine, name) for name in names}
    for other in (kept, {name: getattr(metas, name) for name in names}):
        values = dict(other)
        if kind is np.ndarray:
            values["features"] = values["features"].numpy()
        for predictor in (mine, ours.SamPredictor(mine.model)):
            if predictor is mine:
                predictor.set_image(IMAGE[:50])
            for place in order:
                setattr(predictor, names[place], values[names[place]])
            for one, two in zip(predictor.predict(box=BOX), expected, strict=True):
                assert_close(one, two)
    mine.is_image_set = False
    assert not mine.is_image_set


def test_call_with_records(models):
    found = []
    for model in models:
        transform = ResizeLongestSide(128)
        records = []
        for size, prompts in (((90, 120), ("points",)), ((60, 40), ("boxes", "masks"))):
            image = IMAGE[: size[0], : size[1]]
            record: dict[str, Any] = {
                "image": torch.as_tensor(transform.apply_image(image)).permute(2, 0, 1),
                "original_size": size,
            }
            if "points" in prompts:
                record["point_coords"] = torch.tensor(POINTS * 1.1)[None].float()
                record["point_labels"] = torch.tensor(LABELS)[None]
            if "boxes" in prompts:
                record["boxes"] = torch.tensor(np.stack([BOX / 2, BOX / 3])).float()
                record["mask_inputs"] = torch.ones(2, 1, 32, 32)
            records.append(record)
        found.append(model(records, multimask_output=True))
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name])


def test_steps(models):
    image = torch.tensor(IMAGE).permute(2, 0, 1)
    pixels = [model.preprocess(image) for model in models]
    assert_close(*pixels)
    with torch.no_grad():
        assert_close(*(model.image_encoder(pixels[1][None]) for model in models))
    masks = torch.randn(2, 3, 32, 32)
    assert_close(*(model.postprocess_masks(masks, (96, 128), (90, 120)) for model in models))


def test_transform():
    import_meta()
    from segment_anything.utils.transforms import ResizeLongestSide as MetasTransform

    mine, metas = ResizeLongestSide(128), MetasTransform(128)
    for size in ((90, 120), (300, 41), (7, 5)):
        image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
        assert_close(mine.apply_image(image), metas.apply_image(image))
        assert_close(mine.apply_coords(POINTS, size), metas.apply_coords(POINTS, size))
        assert_close(mine.apply_boxes(BOX[None], size), metas.apply_boxes(BOX[None], size))
        for name, value in (("coords", torch.tensor(POINTS)), ("boxes", torch.tensor(BOX[None]))):
            one, two = (getattr(x, f"apply_{name}_torch")(value, size) for x in (mine, metas))
            assert_close(one, two)
        assert mine.get_preprocess_shape(*size, 128) == metas.get_preprocess_shape(*size, 128)
        batch = torch.tensor(image).permute(2, 0, 1)[None].float()
        resized = mine.apply_image_torch(batch)[0].permute(1, 2, 0).numpy()
        assert np.abs(resized - mine.apply_image(image)).max() <= 1.5


def test_to(models):
    model = models[0]
    assert model.to("cpu") is model and model.to(device=torch.device("cpu")) is model
    assert model.eval() is model and model.cpu() is model
    predictor = ours.SamPredictor(Sam(model.sam).to("meta"))  # a device that any PyTorch has
    predictor.set_image(IMAGE)
    assert predictor.device == torch.device("meta")
    assert {x.device.type for x in predictor.predict_torch(None, None)} == {"meta"}
    assert isinstance(predictor.predict()[0], np.ndarray)
    for wrong in (torch.float16, "nowhere"):
        with pytest.raises(ValueError, match="device"):
            model.to(wrong)


def test_pickle_and_deepcopy(predictors):
    for predictor in predictors:
        for other in (pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor)):
            assert_close(other.predict(box=BOX)[2], predictor.predict(box=BOX)[2])
            assert other.model.image_encoder.img_size == 128


def test_registry(tmp_path):
    with pytest.raises(ValueError, match="checkpoint must be given for vit_h, got None"):
        ours.sam_model_registry["default"]()
    path = tmp_path / "vit_t.pth"
    convert_checkpoint(locate("vit_t"), path)
    with pytest.raises(ValueError, match=r"checkpoint must be of vit_b, got .*vit_t.pth', vit_t"):
        ours.sam_model_registry["vit_b"](checkpoint=path)
    small = tmp_path / "small.pth"
    convert_checkpoint(random_weights(tmp_path / "small.safetensors"), small)
    with pytest.raises(ValueError, match=r"must be of vit_l, got .*small.pth', one of width 32"):
        ours.build_sam_vit_l(small)
    from sparsesam_jax import Sparsity

    options = {"sparsity": Sparsity(0.4), "dtype": "bfloat16", "implementation": "xla"}
    sam = ours.sam_model_registry["vit_t"](checkpoint=str(path), **options).sam
    assert sam.image_encoder.sparsity == Sparsity(0.4)
    assert sam.mask_decoder.dtypes.compute == "bfloat16"
    assert sam.image_encoder.implementation == "xla"
