"""How a photo gets into the model and a mask out of it, as three published evaluations do it."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Num, UInt8

from sparsesam_jax.choices import PromptKind, ProtocolName, check_choice
from sparsesam_jax.evaluation.datasets import Photo
from sparsesam_jax.evaluation.prompts import mask_prompt
from sparsesam_jax.model.transforms import MASK_THRESHOLD
from sparsesam_jax.predict.prompts import Prompt


class Query(NamedTuple):
    """What the predictor is asked for one photo."""

    image: UInt8[np.ndarray, "height width 3"]
    prompt: Prompt


class Protocol(NamedTuple):
    """One way to evaluate.

    - `sam`: Meta's: the longest side to the model's size, padded; mask logits through the padded
      input to the photo.
    - `hq44k`: SAM-HQ's paper: the photo squashed to the model's square, the box from the squashed
      ground truth; mask logits straight to the photo.
    - `release`: the authors' released code: as `hq44k`, but mask logits through the square to the
      photo, and quality averaged over batches of 8 first (it also computes in float16).

    Attributes:
        name: Which of them.
        image_size: Side of the model's input.
    """

    name: ProtocolName
    image_size: int

    @property
    def mean_batch(self) -> int | None:
        """Images whose mean is taken first when quality is averaged; None averages images."""
        return 8 if self.name == "release" else None

    def query_size(self, photo: Photo) -> tuple[int, int]:
        """Height and width of the image that `query` makes."""
        return photo.size if self.name == "sam" else (self.image_size, self.image_size)

    def query(self, photo: Photo, kind: PromptKind) -> Query:
        """The image and the prompt, both in the frame that the predictor takes."""
        if self.name == "sam":
            return Query(photo.image, mask_prompt(photo.mask, kind))
        size = self.query_size(photo)
        squashed = bilinear(photo.image, *size).astype(np.uint8)
        mask = bilinear(photo.grey_mask, *size) > 128
        if not mask.any():  # a speck that squashing has blurred away
            mask[_nearest(photo.mask, self.image_size)] = True
        return Query(squashed, mask_prompt(mask, kind, inclusive=True))

    def mask(
        self,
        photo: Photo,
        logits: Float[np.ndarray, "query_height query_width"],
        low_res: Float[np.ndarray, "h w"],
    ) -> Bool[np.ndarray, "height width"]:
        """The mask at the photo's size.

        Args:
            photo: What was segmented.
            logits: The predictor's logits at the size of the query's image.
            low_res: Its low-resolution logits.
        """
        if self.name == "hq44k":
            logits = bilinear(low_res, *photo.size)
        elif self.name == "release":
            logits = bilinear(logits, *photo.size)
        return logits > MASK_THRESHOLD


def make_protocol(name: str, image_size: int) -> Protocol:
    """The protocol of a name.

    Raises:
        ValueError: There is none.
    """
    check_choice("protocol", name, ProtocolName)
    return Protocol(cast(ProtocolName, name), image_size)


def bilinear(
    values: Num[np.ndarray, "height width *C"], height: int, width: int
) -> Float[np.ndarray, "new_height new_width *C"]:
    """Bilinear resize without antialiasing, half-pixel centres, the edge replicated; float32."""
    resized = values.astype(np.float32)
    for axis, size in ((0, height), (1, width)):
        length = values.shape[axis]
        source = np.maximum((np.arange(size) + 0.5) * length / size - 0.5, 0)
        left = np.minimum(source.astype(int), length - 1)
        fraction = (source - left).astype(np.float32)
        fraction = fraction.reshape(-1, *[1] * (values.ndim - 1 - axis))
        low = resized.take(left, axis)
        high = resized.take(np.minimum(left + 1, length - 1), axis)
        resized = low + fraction * (high - low)
    return resized


def _nearest(mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the square that the mask's pixels fall on."""
    rows, cols = mask.nonzero()
    return rows * size // mask.shape[0], cols * size // mask.shape[1]
