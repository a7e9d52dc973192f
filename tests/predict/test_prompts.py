"""Prompts in every form in which SAM's users write them, beside Meta's package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hypothesis.strategies as st  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from hypothesis import given  # noqa: E402
from meta_sam import mask_iou, meta_sam  # noqa: E402
from models import random_weights  # noqa: E402

from sparsesam_jax import Sam, SamPredictor  # noqa: E402
from sparsesam_jax.checkpoints import convert_checkpoint  # noqa: E402
from sparsesam_jax.predict import predictor as predictor_module  # noqa: E402

IMAGE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
BOX = np.array([10.0, 20.0, 90.0, 70.0])
POINTS, LABELS = np.array([[40.0, 50.0], [80.0, 20.0]]), np.array([1, 0])


class Pair:
    """Our predictor and Meta's, with the same weights and image."""

    def __init__(self, folder: Any):
        weights = random_weights(folder / "small.safetensors")
        self.sam = Sam.from_pretrained(weights)
        self.ours = SamPredictor(self.sam)
        model = meta_sam(weights, folder)
        self.meta = type(self).predictor_of(model)
        self.ours.set_image(IMAGE)
        self.meta.set_image(IMAGE)

    @staticmethod
    def predictor_of(model: Any) -> Any:
        from segment_anything import SamPredictor as MetaPredictor

        return MetaPredictor(model)

    def check(self, **prompt: Any) -> None:
        """Same shapes, logits and masks, from `predict` and from `predict_batch`."""
        other = {
            name: None if value is None else np.asarray(value) for name, value in prompt.items()
        }
        expected = self.meta.predict(**other, return_logits=True)
        alone = self.ours.predict(**prompt, return_logits=True)
        batch = self.ours.predict_batch(
            **{f"{name}_batch": [value] for name, value in prompt.items()}, return_logits=True
        )
        for got in (alone, [field[0] for field in batch]):
            for one, two in zip(got, expected, strict=True):
                assert one.shape == two.shape
                # 1e-3: float32, summed in another order by another library.
                np.testing.assert_allclose(one, two, atol=1e-3 * np.abs(two).max())


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("prompts"))


@pytest.mark.parametrize(
    "box",
    [BOX, BOX[None], BOX[None, None], BOX.reshape(2, 2), BOX.tolist(), torch.tensor(BOX)[None]],
    ids=["4", "1x4", "1x1x4", "2x2", "list", "tensor"],
)
def test_one_box(pair: Pair, box):
    pair.check(box=box)
    pair.check(box=box, point_coords=POINTS, point_labels=LABELS)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int64, np.float16, np.float64])
def test_labels(pair: Pair, dtype):
    pair.check(point_coords=POINTS, point_labels=LABELS.astype(dtype))
    pair.check(point_coords=POINTS.tolist(), point_labels=LABELS.astype(dtype).tolist())
    labels = torch.tensor(LABELS.astype(dtype))
    pair.check(point_coords=torch.tensor(POINTS, requires_grad=True).detach(), point_labels=labels)
    points = torch.tensor(POINTS, requires_grad=True)
    got = pair.ours.predict(points, labels)  # pyright: ignore
    np.testing.assert_array_equal(got[2], pair.ours.predict(POINTS, LABELS)[2])


def test_no_prompt_and_no_points(pair: Pair):
    pair.check()
    pair.check(point_coords=np.zeros((0, 2)), point_labels=np.zeros(0))
    pair.check(point_coords=np.zeros((0, 2)), point_labels=np.zeros(0, int), box=BOX)
    pair.check(point_coords=POINTS, point_labels=np.array([-1, 1]))  # Meta's "no point"


@given(
    points=st.lists(st.tuples(st.floats(-50, 200), st.floats(-50, 200)), max_size=4),
    labels=st.lists(st.sampled_from([-1, 0, 1]), min_size=4, max_size=4),
    box=st.none() | st.tuples(*[st.floats(-50, 200)] * 4),
    dtype=st.sampled_from([np.int8, np.int64, np.float32, np.float64]),
    form=st.sampled_from(["array", "list", "tensor"]),
)
def test_any_prompt_is_metas(pair: Pair, points, labels, box, dtype, form):
    prompt: dict[str, Any] = {
        "point_coords": np.array(points).reshape(-1, 2),
        "point_labels": np.array(labels[: len(points)], dtype),
        "box": None if box is None else np.array(box),
    }
    if form != "array":
        make = np.ndarray.tolist if form == "list" else torch.tensor
        prompt = {name: None if x is None else make(x) for name, x in prompt.items()}
        if not points and form == "list":
            prompt["point_coords"] = np.zeros((0, 2))
    pair.check(**prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        {"box": np.zeros((0, 4))},
        {"box": np.zeros((1, 0, 4))},
        {"box": []},
        {"point_coords": np.zeros((0, 1, 2)), "point_labels": np.zeros((0, 1))},
        {"point_coords": np.zeros((0, 1, 2))},
        {"point_coords": POINTS, "point_labels": LABELS, "box": np.zeros((0, 4))},
        {"box": np.zeros((0, 4)), "mask_input": np.zeros((1, 32, 32))},
    ],
    ids=str,
)
@pytest.mark.parametrize("multimask", [True, False])
def test_no_prompts_give_empty_arrays(pair: Pair, prompt: dict, multimask: bool):
    count = 3 if multimask else 1
    shapes = [(0, count, 90, 120), (0, count), (0, count, 32, 32)]
    got = pair.ours.predict(**prompt, multimask_output=multimask)
    assert [x.shape for x in got] == shapes
    assert [x.dtype for x in got] == [bool, np.float32, np.float32]
    logits = pair.ours.predict(**prompt, multimask_output=multimask, return_logits=True)[0]
    assert logits.dtype == np.float32
    packed = pair.ours.predict(**prompt, multimask_output=multimask, mask_format="packed")[0]
    assert packed.shape == (0, count, 90, 15)
    assert pair.ours.predict(**prompt, mask_format="rle")[0] == []


def test_no_prompts_inside_a_batch(pair: Pair):
    predictor = SamPredictor(pair.sam)
    predictor.set_image_batch(np.stack([IMAGE, IMAGE, IMAGE]))
    mask = np.ones((1, 32, 32), np.float32)
    masks, iou, low_res = predictor.predict_batch(
        box_batch=[np.zeros((0, 4)), BOX, np.stack([BOX] * 6)],
        mask_input_batch=[None, mask, None],  # for some images only
    )
    assert [m.shape for m in masks] == [(0, 3, 90, 120), (3, 90, 120), (6, 3, 90, 120)]
    assert [x.shape for x in iou] == [(0, 3), (3,), (6, 3)]
    np.testing.assert_allclose(
        low_res[1], pair.ours.predict(box=BOX, mask_input=mask)[2], atol=1e-4
    )
    np.testing.assert_allclose(low_res[2][5], pair.ours.predict(box=BOX)[2], atol=1e-4)
    nothing = predictor.predict_batch(box_batch=[np.zeros((0, 4))] * 3)
    assert [x.shape for x in nothing[1]] == [(0, 3)] * 3


def test_transformers_shapes_and_padding(pair: Pair, tmp_path):
    """What transformers' processor makes of prompts of different length, label -10 included."""
    convert_checkpoint(
        random_weights(tmp_path / "w.safetensors"), tmp_path / "hf", to="huggingface"
    )
    model = transformers.SamModel.from_pretrained(tmp_path / "hf").eval()
    for module in model.mask_decoder.transformer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5  # Meta's, which transformers takes from elsewhere
    points = np.array([[[40.0, 50.0], [80.0, 20.0]], [[30.0, 30.0], [-10.0, -10.0]]])
    labels = np.array([[1, 0], [1, -10]])
    boxes = np.stack([BOX, BOX + 5])
    scale = np.array([128 / 120, 96 / 90])  # into the frame of the padded input
    features = np.asarray(pair.ours.get_image_embedding())
    for ours, theirs in (
        (
            {"point_coords": points[None], "point_labels": labels[None]},
            {
                "input_points": torch.tensor(points * scale)[None].float(),
                "input_labels": torch.tensor(labels)[None],
            },
        ),
        (
            {"box": boxes[None]},
            {"input_boxes": torch.tensor(boxes * np.tile(scale, 2))[None].float()},
        ),
    ):
        with torch.inference_mode():
            embeddings = torch.tensor(features).permute(0, 3, 1, 2)
            expected = model(image_embeddings=embeddings, **theirs)
        _, iou, low_res = pair.ours.predict(**ours)
        want = expected.pred_masks[0].numpy()
        np.testing.assert_allclose(low_res, want, atol=1e-3 * np.abs(want).max())
        np.testing.assert_allclose(iou, expected.iou_scores[0].numpy(), atol=1e-3)
    # The pure function too; of a square image, which it need not resize.
    square = np.resize(IMAGE, (128, 128, 3))
    predictor = SamPredictor(pair.sam)
    predictor.set_image(square)
    _, iou, low_res = predictor.predict(points, labels)
    pure = pair.sam(*(jnp.asarray(x)[None] for x in (square, points.astype(np.float32), labels)))
    np.testing.assert_allclose(pure.low_res_logits[0], low_res, atol=1e-4)
    np.testing.assert_allclose(pure.iou_predictions[0], iou, atol=1e-4)


def test_other_images_shapes_are_refused(pair: Pair):
    with pytest.raises(ValueError, match=r"point_coords must be .*\[1, P, T, 2\], got shape \(2, "):
        pair.ours.predict(np.zeros((2, 1, 1, 2)), np.zeros((2, 1, 1)))
    with pytest.raises(ValueError, match=r"box must be .*\[1, P, 4\], got shape \(2, 3, 4\)"):
        pair.ours.predict(box=np.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((POINTS, np.array([1, -7])), r"point_labels must be 1 or 0, got \[-7, 1\]$"),
        ((POINTS, np.array([1, 0.5])), r"point_labels must be 1 or 0, got \[0.5, 1.0\]$"),
        ((POINTS, ["a", "b"]), "point_labels must hold numbers, got <U1"),
        (([[1, 2], [3]], [1, 1]), "point_coords must be a rectangular array"),
        (([[1, np.nan]], [1]), "point_coords must be finite, got nan"),
        ((None, None, [1, 2, 3, np.inf]), "box must be finite, got inf"),
        ((None, None, BOX, np.full((1, 32, 32), np.nan)), "mask_input must be finite, got nan"),
        (
            (None, None, np.stack([BOX] * 3), np.zeros((2, 1, 32, 32))),
            "mask_input must be for 3 prompts, got 2",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_wrong_is_said_plainly(pair: Pair, prompt, message: str):
    with pytest.raises(ValueError, match=message):
        pair.ours.predict(*prompt)


@pytest.mark.parametrize("at_once", [1, 8, 64])
def test_many_prompts_are_metas_in_chunks(pair: Pair, at_once: int, monkeypatch):
    """More prompts than one call holds, and a remainder that is no power of two."""
    monkeypatch.setattr(predictor_module, "PROMPTS_ON_CPU", at_once)
    ours = SamPredictor(pair.sam)
    ours.embedding = pair.ours.embedding
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 60, (39, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 50, (39, 2))], 1)
    masks, _, low_res = ours.predict(box=boxes)
    for index in range(0, 39, 5):
        expected = pair.meta.predict(box=boxes[index])
        scale = 1e-3 * np.abs(expected[2]).max()
        np.testing.assert_allclose(low_res[index], expected[2], atol=scale)
        assert mask_iou(masks[index], expected[0]) >= 0.999


def test_results_are_the_callers(pair: Pair):
    masks, scores, logits = pair.ours.predict(box=BOX)
    scores.sort()
    masks[0] = False
    logits *= 2
    many = pair.ours.predict(box=np.stack([BOX] * 7))
    for array in many:
        assert array.flags.writeable
