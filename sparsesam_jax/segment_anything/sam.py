"""Meta's `Sam`: the model that clients hand to a predictor, or call with a list of records."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sparsesam_jax.model.sam import SamModel
from sparsesam_jax.model.transforms import (
    MASK_THRESHOLD,
    PIXEL_MEAN,
    PIXEL_STD,
    resize_mask_logits,
)
from sparsesam_jax.predict.predictor import SamPredictor
from sparsesam_jax.predict.prompt_arrays import ImagePrompt, ImageSizes
from sparsesam_jax.segment_anything.tensors import array, tensor

if TYPE_CHECKING:
    import torch


class Sam:
    """A model with the methods of Meta's `Sam`.

    Args:
        sam: The model of this project.

    Attributes:
        sam: The same.
        image_encoder: The image encoder, see `ImageEncoder`.
    """

    mask_threshold: float = MASK_THRESHOLD
    image_format: str = "RGB"

    def __init__(self, sam: SamModel):
        self.sam = sam
        self.image_encoder = ImageEncoder(self)
        self._device = "cpu"

    @property
    def device(self) -> torch.device:
        """Where tensors are returned; the model computes where JAX does."""
        import torch

        return torch.device(self._device)

    def to(self, device: Any = None, **options: Any) -> Self:
        """Return tensors on another device from now on.

        Raises:
            ValueError: It is no device; the dtype is chosen where the model is built.
        """
        import torch

        if options or isinstance(device, torch.dtype):
            got = device if not options else ", ".join(options)
            raise ValueError(
                f"to takes a device alone, got {got}; the dtype is a keyword of the registry's "
                "entries: sam_model_registry['vit_b'](checkpoint, dtype='bfloat16')"
            )
        if device is not None:
            try:
                self._device = str(torch.device(device))
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device must be one of PyTorch's, got {device!r}") from error
        return self

    def cpu(self) -> Self:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self, device: int | None = None) -> Self:
        """`to("cuda")`."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def eval(self) -> Self:
        """The model itself, which has no other mode."""
        return self

    def __call__(
        self, batched_input: Sequence[dict[str, Any]], multimask_output: bool
    ) -> list[dict[str, torch.Tensor]]:
        """Masks for images and prompts that are already in the frame of the model's input.

        Args:
            batched_input: For each image a record with `image` [3, height, width], resized but not
                normalised, and `original_size`; and prompts, if any: `point_coords` [P, T, 2],
                `point_labels` [P, T], `boxes` [P, 4], `mask_inputs` [P, 1, h, w].
            multimask_output: Whether to return the proposals instead of one mask a prompt.

        Returns:
            For each image `masks` [P, K, height, width], `iou_predictions` [P, K] and
            `low_res_logits` [P, K, h, w].
        """
        predictor = self._predictor
        embedding = predictor.embed_resized_images(
            [_pixels(record["image"]) for record in batched_input],
            [record["original_size"] for record in batched_input],
        )
        low_res_size = (4 * embedding.features.shape[1], 4 * embedding.features.shape[2])
        arrays = []
        for record, sizes in zip(batched_input, embedding.sizes, strict=True):
            names = ("point_coords", "point_labels", "boxes", "mask_inputs")
            prompt = ImagePrompt(*(record.get(name) for name in names))
            arrays.append(prompt.arrays(ImageSizes(sizes.resized, sizes.resized), low_res_size))
        results = predictor.predict_arrays(embedding, arrays, multimask_output=multimask_output)
        names = ("masks", "iou_predictions", "low_res_logits")
        return [
            {name: tensor(field, self._device) for name, field in zip(names, result, strict=True)}
            for result in results
        ]

    forward = __call__

    def preprocess(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise images [..., 3, height, width] of 0 to 255, and pad them to the input."""
        import torch

        mean, std = (
            torch.tensor(values, device=x.device).view(3, 1, 1)
            for values in (PIXEL_MEAN, PIXEL_STD)
        )
        height, width = (self.image_encoder.img_size - side for side in x.shape[-2:])
        return torch.nn.functional.pad((x - mean) / std, (0, width, 0, height))

    def postprocess_masks(
        self,
        masks: torch.Tensor,
        input_size: tuple[int, ...],
        original_size: tuple[int, ...],
    ) -> torch.Tensor:
        """Low-resolution logits [..., h, w] at the photo's size, without the padding."""
        side = self.image_encoder.img_size
        frame = ((side, side), tuple(input_size), tuple(original_size))
        resized = resize_mask_logits(array(masks).astype(np.float32), *frame)  # pyright: ignore
        return tensor(resized, str(masks.device))

    @functools.cached_property
    def _predictor(self) -> SamPredictor:
        return SamPredictor(self.sam)


class ImageEncoder:
    """The image encoder of a `Sam`, from and to Meta's layout.

    Attributes:
        img_size: Side of the padded input in pixels.
    """

    def __init__(self, sam: Sam):
        self._sam = sam
        self.img_size = sam.sam.config.image_encoder.image_size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised, padded images [B, 3, side, side] to features [B, C, side/16, side/16]."""
        pixels = array(x).transpose(0, 2, 3, 1).astype(np.float32)
        features = self._sam._predictor.compiled.encode(pixels).features
        return metas_features(features, self._sam._device)


def metas_features(features: Any, device: str) -> torch.Tensor:
    """Features [B, Gh, Gw, C] as Meta's tensor [B, C, Gh, Gw], float32."""
    return tensor(np.asarray(features, np.float32).transpose(0, 3, 1, 2).copy(), device)


def _pixels(image: Any) -> np.ndarray:
    """An image [3, height, width] as [height, width, 3]."""
    return array(image).transpose(1, 2, 0)
