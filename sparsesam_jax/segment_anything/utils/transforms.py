"""`ResizeLongestSide`: images and coordinates in the frame of the model's input."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sparsesam_jax.model.transforms import resized_shape


class ResizeLongestSide:
    """Scales images, points and boxes so that the image's longest side is `target_length`.

    Args:
        target_length: Pixels of the longest side.
    """

    def __init__(self, target_length: int):
        self.target_length = target_length

    def apply_image(
        self, image: UInt8[np.ndarray, "height width channels"]
    ) -> UInt8[np.ndarray, "new_height new_width channels"]:
        """An image, resized as `SamPredictor.set_image` does it."""
        height, width = resized_shape(image.shape[0], image.shape[1], self.target_length)
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.array(resized)

    def apply_coords(
        self, coords: np.ndarray, original_size: tuple[int, ...]
    ) -> Float[np.ndarray, "*batch 2"]:
        """Points (x, y) of an image of `original_size` (height, width)."""
        return np.asarray(coords, np.float64) * self._scale(original_size)

    def apply_boxes(
        self, boxes: np.ndarray, original_size: tuple[int, ...]
    ) -> Float[np.ndarray, "P 4"]:
        """Boxes (x0, y0, x1, y1) of an image of `original_size` (height, width)."""
        corners = self.apply_coords(np.asarray(boxes).reshape(-1, 2, 2), original_size)
        return corners.reshape(-1, 4)

    def apply_image_torch(self, image: Any) -> Any:
        """Float images [B, C, height, width]; within a level of `apply_image`, not equal to it."""
        import torch

        size = resized_shape(image.shape[-2], image.shape[-1], self.target_length)
        return torch.nn.functional.interpolate(
            image, size, mode="bilinear", align_corners=False, antialias=True
        )

    def apply_coords_torch(self, coords: Any, original_size: tuple[int, ...]) -> Any:
        """`apply_coords` for a tensor, in float32."""
        import torch

        scale = torch.tensor(self._scale(original_size), device=coords.device)
        return coords.to(torch.float32) * scale

    def apply_boxes_torch(self, boxes: Any, original_size: tuple[int, ...]) -> Any:
        """`apply_boxes` for a tensor, in float32."""
        return self.apply_coords_torch(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """Height and width after scaling the longest side to `long_side_length`."""
        return resized_shape(oldh, oldw, long_side_length)

    def _scale(self, original_size: tuple[int, ...]) -> tuple[float, float]:
        """What x and y of an image are multiplied by."""
        height, width = original_size
        new_height, new_width = resized_shape(height, width, self.target_length)
        return new_width / width, new_height / height
