"""The dense model against transformers' SamModel in PyTorch, float32, weights through `convert`."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from convert import convert_checkpoint  # noqa: E402
from skimage import data  # noqa: E402
from sparsesam_jax import PRESETS, Sam, SamConfig, SamPredictor, weights  # noqa: E402
from sparsesam_jax.sam import locate  # noqa: E402
from sparsesam_jax.transforms import resized_shape  # noqa: E402

# Meta's decoder has torch's LayerNorm epsilon; transformers takes its configuration's.
DECODER_EPSILON = 1e-5


def random_weights(path: Path, config: SamConfig, seed: int = 0) -> Path:
    """A weights file with every parameter drawn at random, position tables included."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, spec in weights.parameter_shapes(config).items():
        fan_in = np.prod(spec.shape[:-1]) if name.endswith("kernel") else 1
        scale = fan_in**-0.5 if name.endswith("kernel") else 0.1
        centre = 1.0 if name.endswith("scale") else 0.0
        if name.endswith("gaussian_matrix"):
            scale = 1.0
        arrays[name] = (centre + scale * rng.standard_normal(spec.shape)).astype(np.float32)
    weights.write(path, config, arrays)
    return path


def torch_model(path: Path, folder: Path) -> transformers.SamModel:
    """transformers' model of the same weights."""
    convert_checkpoint(path, folder, to="huggingface", dtype="float32")
    hq = weights.read(path)[0].hq
    kind = transformers.SamHQModel if hq else transformers.SamModel
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, module in model.mask_decoder.transformer.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = DECODER_EPSILON
        assert name is not None
    return model.eval()


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two boolean masks; two empty masks are equal."""
    union = (a | b).sum()
    return 1.0 if union == 0 else float((a & b).sum() / union)


def torch_pixels(image: np.ndarray, size: int) -> torch.Tensor:
    """SAM's preprocessing as transformers' processor does it, without its hub files."""
    processor = transformers.SamImageProcessorPil(
        size={"longest_edge": size}, pad_size={"height": size, "width": size}
    )
    return processor(image, return_tensors="pt")["pixel_values"]


def check_pipeline(path: Path, folder: Path, image: np.ndarray) -> None:
    """Encoder, and masks through SamPredictor, for a box and for points with a mask input."""
    size = weights.read(path)[0].image_encoder.image_size
    sam, model = Sam.from_pretrained(path), torch_model(path, folder)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    pixels = torch_pixels(image, size)
    with torch.inference_mode():
        theirs = model.get_image_embeddings(pixels)
    ours = np.asarray(predictor.get_image_embedding())[0]
    assert relative_difference(ours, theirs[0].permute(1, 2, 0).numpy()) <= 2e-4

    height, width = image.shape[:2]
    resized = resized_shape(height, width, size)
    scale = np.array([resized[1] / width, resized[0] / height])
    box = np.array([0.2 * width, 0.15 * height, 0.8 * width, 0.9 * height])
    points = np.array([[0.5 * width, 0.5 * height], [0.1 * width, 0.8 * height]])
    labels = np.array([1, 0])
    box_prompt = {"input_boxes": torch.tensor((box.reshape(2, 2) * scale).reshape(1, 1, 4)).float()}
    point_prompt = {
        "input_points": torch.tensor((points * scale)[None, None]).float(),
        "input_labels": torch.tensor(labels[None, None]),
    }
    for multimask in (False, True):
        mask_input = None
        for prompt, ours_prompt in (
            (box_prompt, {"box": box}),
            (point_prompt, {"point_coords": points, "point_labels": labels}),
        ):
            masks, iou, low_res = predictor.predict(
                **ours_prompt,
                mask_input=mask_input,
                multimask_output=multimask,
                return_logits=True,
            )
            with torch.inference_mode():
                out = model(
                    image_embeddings=theirs,
                    multimask_output=multimask,
                    input_masks=None if mask_input is None else torch.tensor(mask_input)[None],
                    **prompt,
                )
                expected = torch.nn.functional.interpolate(
                    out.pred_masks[0], (size, size), mode="bilinear", align_corners=False
                )[..., : resized[0], : resized[1]]
                expected = torch.nn.functional.interpolate(
                    expected, (height, width), mode="bilinear", align_corners=False
                )[0].numpy()
            # 1e-3: two dozen float32 layers, summed in another order by another library.
            assert relative_difference(low_res, out.pred_masks[0, 0].numpy()) <= 1e-3
            assert np.abs(iou - out.iou_scores[0, 0].numpy()).max() <= 1e-3
            for mask, other in zip(masks > 0, expected > 0, strict=True):
                assert mask_iou(mask, other) >= 0.999
            mask_input = low_res[:1]


def test_embedded_weights_on_a_photo(tmp_path: Path):
    """Real weights, a non-square photo, 1024 x 1024."""
    check_pipeline(locate("vit_t"), tmp_path / "hf", data.coffee())


def test_vit_b_random_weights(tmp_path: Path):
    """The published size with random weights, 1024 x 1024."""
    path = random_weights(tmp_path / "vit_b.safetensors", PRESETS["vit_b"])
    check_pipeline(path, tmp_path / "hf", data.coffee())
