"""The dense model against transformers' SamModel in PyTorch, float32, weights through `convert`."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import random_weights  # noqa: E402
from skimage import data  # noqa: E402

from sparsesam_jax import (  # noqa: E402
    PRESETS,
    ImageEncoderConfig,
    Sam,
    SamConfig,
    SamPredictor,
)
from sparsesam_jax.checkpoints import convert_checkpoint, locate  # noqa: E402
from sparsesam_jax.model.transforms import resized_shape  # noqa: E402

# Meta's decoder has torch's LayerNorm epsilon; transformers takes its configuration's.
DECODER_EPSILON = 1e-5


def torch_model(path: Path, folder: Path) -> transformers.SamModel:
    """transformers' model of the same weights."""
    config = convert_checkpoint(path, folder, to="huggingface", dtype="float32")
    kind = transformers.SamHQModel if config.hq else transformers.SamModel
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for module in model.mask_decoder.transformer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = DECODER_EPSILON
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


def to_image(
    logits: torch.Tensor, size: int, resized: tuple[int, int], original: tuple[int, int]
) -> torch.Tensor:
    """SAM's postprocessing: low-resolution logits at the image's size."""
    resize = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=False)
    return resize(resize(logits, (size, size))[..., : resized[0], : resized[1]], original)


def check_pipeline(
    path: Path, folder: Path, image: np.ndarray, multimask_outputs: tuple[bool, ...] = (False, True)
) -> None:
    """Encoder, and masks through SamPredictor, for a box and for points with a mask input."""
    sam, model = Sam.from_pretrained(path), torch_model(path, folder)
    size = sam.config.image_encoder.image_size
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
    for multimask in multimask_outputs:
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
                expected = to_image(out.pred_masks[0], size, resized, (height, width))[0].numpy()
            # 1e-3: two dozen float32 layers, summed in another order by another library.
            assert relative_difference(low_res, out.pred_masks[0, 0].numpy()) <= 1e-3
            assert np.abs(iou - out.iou_scores[0, 0].numpy()).max() <= 1e-3
            for mask, other in zip(masks > 0, expected > 0, strict=True):
                assert mask_iou(mask, other) >= 0.999
            mask_input = low_res[:1]


def test_embedded_weights_on_a_photo(tmp_path: Path):
    """Real weights, a non-square photo, 1024 x 1024, whose size is that of all presets."""
    check_pipeline(locate("vit_t"), tmp_path / "hf", data.coffee(), multimask_outputs=(True,))


SHALLOW = {"depth": 3, "global_attn_indexes": (1,)}


@pytest.mark.parametrize(
    ("preset", "changes", "multimask"),
    [
        ("vit_b", {}, False),
        ("vit_l", SHALLOW, True),
        ("vit_h", SHALLOW, False),
        ("vit_t", SHALLOW | {"embed_dim": 96, "num_heads": 3, "window_size": 5}, True),
    ],
    ids=["vit_b", "vit_l", "vit_h", "other"],
)
def test_random_weights(tmp_path: Path, preset: str, changes: dict[str, Any], multimask: bool):
    """ViT-B whole, the larger widths at reduced depth, and a shape of no preset, at 256 x 256.

    Random weights, so that no table of positions and no bias is zero.
    """
    encoder = dataclasses.replace(PRESETS[preset].image_encoder, image_size=256, **changes)
    config = dataclasses.replace(PRESETS[preset], image_encoder=encoder)
    path = random_weights(tmp_path / "sam.safetensors", config)
    check_pipeline(path, tmp_path / "hf", data.rocket()[:, :300], multimask_outputs=(multimask,))


def upscale_transformed_image(decoder: torch.nn.Module) -> None:
    """Have transformers' SAM-HQ upscale the image features that its two-way transformer returns.

    transformers 5.23 drops them and upscales those from before the transformer; SAM-HQ's own code
    upscales the transformed ones, as SAM does. A release that does so too is not changed by this.
    """
    transformed = {}
    decoder.transformer.register_forward_hook(
        lambda module, args, out: transformed.update(image=out[1])
    )
    decoder.upscale_conv1.register_forward_pre_hook(
        lambda module, args: transformed["image"].transpose(2, 3).reshape(args[0].shape)
    )


def test_sam_hq(tmp_path: Path):
    """SAM-HQ's token and convolutions: masks of both kinds, single and best of the proposals."""
    encoder = ImageEncoderConfig(
        embed_dim=64, depth=3, num_heads=2, global_attn_indexes=(1, 2), image_size=128
    )
    config = SamConfig(image_encoder=encoder, hq=True)
    path = random_weights(tmp_path / "hq.safetensors", config)
    model = torch_model(path, tmp_path / "hf")
    upscale_transformed_image(model.mask_decoder)
    image = data.coffee()[:, :400]
    predictor = SamPredictor(Sam.from_pretrained(path))
    predictor.set_image(image)
    box = np.array([[20.0, 30.0, 300.0, 350.0]])
    scale = 128 / max(image.shape)
    for multimask in (False, True):
        for token_only in (False, True):
            _, iou, low_res = predictor.predict(
                box=box[0], multimask_output=multimask, hq_token_only=token_only
            )
            with torch.inference_mode():
                out = model(
                    pixel_values=torch_pixels(image, 128),
                    input_boxes=torch.tensor(box[None] * scale).float(),
                    multimask_output=multimask,
                    hq_token_only=token_only,
                )
            # transformers returns all proposals, the best first; SAM-HQ's own code the best alone.
            assert relative_difference(low_res, out.pred_masks[0, 0, :1].numpy()) <= 1e-3
            assert np.abs(iou - out.iou_scores[0, 0, :1].numpy()).max() <= 1e-3


def tuned_sam(path: Path) -> Sam:
    """A small model after one step of gradient descent on all its parameters."""
    sam = Sam.from_pretrained(random_weights(path))
    size = sam.config.image_encoder.image_size
    images = jnp.asarray(np.random.default_rng(1).integers(0, 256, (1, size, size, 3), np.uint8))
    points = jnp.array([[[[20.0, 20.0], [90.0, 100.0]]]])
    labels = jnp.array([[[2, 3]]])

    def loss(model: Sam) -> jax.Array:
        logits = model(images, points, labels, return_logits=True).masks
        return jax.nn.softplus(-logits).mean()

    gradients = nnx.jit(nnx.grad(loss))(sam)
    parameters = nnx.state(sam, nnx.Param)
    # So far that no parameter with a gradient is what it was.
    nnx.update(sam, jax.tree.map(lambda value, slope: value - 0.05 * slope, parameters, gradients))
    return sam


def test_a_tuned_model_gives_the_same_masks_in_pytorch(tmp_path: Path):
    """`save_pretrained` to Meta's file, and that in PyTorch: not one pixel differs."""
    sam = tuned_sam(tmp_path / "before.safetensors")
    size = sam.config.image_encoder.image_size
    sam.save_pretrained(tmp_path / "tuned.pth")
    model = torch_model(tmp_path / "tuned.pth", tmp_path / "hf")
    image = data.rocket()[:, :300]
    height, width = image.shape[:2]
    resized = resized_shape(height, width, size)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    box = np.array([40.0, 30.0, 220.0, 280.0])
    scale = np.tile([resized[1] / width, resized[0] / height], 2)
    with torch.inference_mode():
        out = model(
            pixel_values=torch_pixels(image, size),
            input_boxes=torch.tensor((box * scale)[None, None]).float(),
            multimask_output=True,
        )
        expected = to_image(out.pred_masks[0], size, resized, (height, width))[0].numpy() > 0
    masks, _, _ = predictor.predict(box=box)
    assert masks.shape == expected.shape == (3, height, width)
    assert (masks != expected).sum() == 0
    assert all(0.02 < mask.mean() < 0.98 for mask in masks)
    before = SamPredictor(Sam.from_pretrained(tmp_path / "before.safetensors"))
    before.set_image(image)
    assert (before.predict(box=box)[0] != masks).mean() > 0.01
