"""Meta's `SamPredictor`: the predictor of this project with tensors where Meta has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparsesam_jax.predict import predictor
from sparsesam_jax.predict.embedding import Embedding
from sparsesam_jax.predict.prompt_arrays import ImagePrompt, ImageSizes
from sparsesam_jax.segment_anything.sam import Sam, metas_features
from sparsesam_jax.segment_anything.tensors import array, tensor
from sparsesam_jax.segment_anything.utils.transforms import ResizeLongestSide

if TYPE_CHECKING:
    import torch


class SamPredictor(predictor.SamPredictor):
    """`sparsesam_jax.SamPredictor`, all of it, and the methods and attributes that Meta's has.

    Args:
        sam_model: What a `sam_model_registry` entry returned.

    Attributes:
        model: The same.
        transform: Images and coordinates into the frame of the model's input.
    """

    def __init__(self, sam_model: Sam):
        self.model = sam_model
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)
        self._parts: dict[str, Any] = {}
        super().__init__(sam_model.sam)

    @property
    def device(self) -> torch.device:
        """Where tensors are returned."""
        return self.model.device

    def set_torch_image(
        self, transformed_image: torch.Tensor, original_image_size: tuple[int, ...]
    ) -> None:
        """Embed an image that `transform` has resized.

        Args:
            transformed_image: Pixels of 0 to 255, [1, 3, height, width], whose longest side is the
                model's.
            original_image_size: Height and width before.

        Raises:
            ValueError: The image has another shape.
        """
        shape, side = tuple(transformed_image.shape), self.transform.target_length
        if len(shape) != 4 or shape[:2] != (1, 3) or max(shape[2:]) != side:
            raise ValueError(
                f"transformed_image must be [1, 3, height, width] with a longest side of {side}, "
                f"got shape {shape}"
            )
        pixels = array(transformed_image)[0].transpose(1, 2, 0)
        height, width = original_image_size
        self.embedding = self.embed_resized_images([pixels], [(height, width)])

    def predict_torch(
        self,
        point_coords: torch.Tensor | None,
        point_labels: torch.Tensor | None,
        boxes: torch.Tensor | None = None,
        mask_input: torch.Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict masks for P prompts in the frame of the model's input, see `transform`.

        Args:
            point_coords: (x, y), [P, T, 2].
            point_labels: 1 foreground, 0 background, [P, T].
            boxes: (x0, y0, x1, y1), [P, 4].
            mask_input: Low-resolution logits of an earlier prediction, [P, 1, h, w].
            multimask_output: Whether to return the proposals instead of one mask a prompt.
            return_logits: Whether to return logits instead of boolean masks.

        Returns:
            Masks [P, K, height, width], predicted IoU [P, K] and low-resolution logits
            [P, K, h, w].

        Raises:
            RuntimeError: No image is set.
            ValueError: A prompt has the wrong shape or labels.
        """
        embedding = self.embedding
        prompt = ImagePrompt(point_coords, point_labels, boxes, mask_input)
        resized = embedding.sizes[0].resized
        low_res = (4 * embedding.features.shape[1], 4 * embedding.features.shape[2])
        arrays = prompt.arrays(ImageSizes(resized, resized), low_res)
        (result,) = self.predict_arrays(
            embedding, [arrays], multimask_output=multimask_output, return_logits=return_logits
        )
        masks, iou, logits = (tensor(field, str(self.device)) for field in result)
        return masks, iou, logits

    def get_image_embedding(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The features of the image that is set, [1, C, Gh, Gw].

        Raises:
            RuntimeError: No image is set.
        """
        return metas_features(self.embedding.features, str(self.device))

    def reset_image(self) -> None:
        """Forget the image."""
        super().reset_image()
        self._parts = {}

    # Clients that keep embeddings read these four and set them again, one after the other. The
    # image is set as soon as there are features and both sizes.

    @property
    def features(self) -> torch.Tensor | None:
        """The features as `get_image_embedding` returns them; None where no image is set."""
        return self.get_image_embedding() if self.is_image_set else self._parts.get("features")

    @features.setter
    def features(self, features: torch.Tensor | np.ndarray | None) -> None:
        self._set_part("features", features)

    @property
    def original_size(self) -> tuple[int, int] | None:
        """Height and width of the image that is set."""
        return (
            self.embedding.sizes[0].original if self._images else self._parts.get("original_size")
        )

    @original_size.setter
    def original_size(self, size: tuple[int, int] | None) -> None:
        self._set_part("original_size", size)

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Its height and width in the frame of the model's input."""
        return self._sizes.resized if self._images else self._parts.get("input_size")

    @input_size.setter
    def input_size(self, size: tuple[int, int] | None) -> None:
        self._set_part("input_size", size)

    @property
    def is_image_set(self) -> bool:
        """Whether an image has been embedded, or features and sizes have been set."""
        return self._images is not None

    @is_image_set.setter
    def is_image_set(self, is_set: bool) -> None:
        if not is_set:
            self.reset_image()

    @property
    def _sizes(self) -> ImageSizes:
        return self.embedding.sizes[0]

    def _set_part(self, name: str, value: Any) -> None:
        known = {
            "features": self.features,
            "original_size": self.original_size,
            "input_size": self.input_size,
        } | {name: value}
        if any(part is None for part in known.values()):
            super().reset_image()
            self._parts = known
            return
        original, resized = (
            (int(known[key][0]), int(known[key][1])) for key in ("original_size", "input_size")
        )
        features = array(known["features"]).transpose(0, 2, 3, 1)
        self.embedding = Embedding(
            features, None, (ImageSizes(original, resized),), self.fingerprint
        )
        self._parts = {}
