"""Many prompts in decoder calls of a few compiled sizes, and their results put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsesam_jax.model.transforms import Packing, mask_shape
from sparsesam_jax.predict.copying import copy
from sparsesam_jax.predict.mask_formats import MaskFormat, RunLengths, encode_packed
from sparsesam_jax.predict.prompt_arrays import PromptArrays, power_of_two

# Masks, scores and logits; masks are lists of run lengths if that is wanted.
Masks = tuple[Any, np.ndarray, np.ndarray]

# Prompts of one decoder call. On a CPU a call takes as long as its prompts do one by one, so that
# one compiled size serves any number; on a GPU 32 of float32 take a gigabyte at 1024 pixels.
PROMPTS_ON_CPU, PROMPTS = 1, 32

_PACKINGS: dict[MaskFormat, Packing | None] = {"binary": None, "packed": "rows", "rle": "columns"}


class Call(NamedTuple):
    """One call of the decoder: these images, and of each the prompts from `start` on."""

    image: int
    images: int
    start: int
    prompts: int


def calls(arrays: Sequence[PromptArrays], at_once: int) -> Iterator[Call]:
    """All images in one call if their prompts are few, else one after the other in chunks.

    The last chunk is filled up: whatever an image's prompts, there is one size to compile for.
    """
    counts = [a.num_prompts for a in arrays]
    together = power_of_two(max(counts))
    have_mask = {a.mask_input is not None for a in arrays if a.num_prompts}
    few = together == 1 or len(arrays) * together <= at_once
    if few and len(have_mask) == 1:
        yield Call(0, len(arrays), 0, together)
        return
    for image, count in enumerate(counts):
        for start in range(0, count, at_once):
            yield Call(image, 1, start, min(at_once, power_of_two(count)))


class Result:
    """The masks, scores and logits of one image's prompts, put together from several calls.

    Attributes:
        packing: How the masks come from where they are resized.
    """

    def __init__(
        self,
        prompts: int,
        masks: int,
        size: tuple[int, int],
        low_res: tuple[int, int],
        mask_format: MaskFormat,
        return_logits: bool,
    ):
        self.packing = _PACKINGS[mask_format]
        dtype = np.float32 if return_logits else np.uint8 if self.packing else np.bool_
        self._size = size
        self._shapes = ((masks, *mask_shape(size, self.packing)), (masks,), (masks, *low_res))
        self._dtypes = (dtype, np.float32, np.float32)
        self._prompts = prompts
        self._runs: list[list[RunLengths]] | None = [] if mask_format == "rle" else None
        self._arrays: list[np.ndarray | None] = [None, None, None]

    def room(self, start: int, count: int) -> np.ndarray | None:
        """Where the masks of these prompts are to be written; None: in an array of their own."""
        if self._runs is not None or count == self._prompts:
            return None
        return self._whole(0)[start : start + count]

    def put(self, start: int, masks: np.ndarray, iou: np.ndarray, low_res: np.ndarray) -> None:
        """Add the prompts from `start` on; their masks lie in their `room` already, if any."""
        if self._runs is not None:
            self._runs += [[encode_packed(mask, self._size) for mask in own] for own in masks]
        if len(iou) == self._prompts:
            self._arrays = [masks, iou, low_res]
            return
        for field, part in ((1, iou), (2, low_res)):
            copy(self._whole(field)[start : start + len(part)], part)

    def arrays(self) -> Masks:
        """What `SamPredictor.predict` returns for P prompts."""
        masks = self._whole(0) if self._runs is None else self._runs
        return masks, self._whole(1), self._whole(2)

    def _whole(self, field: int) -> np.ndarray:
        array = self._arrays[field]
        if array is None:
            array = np.empty((self._prompts, *self._shapes[field]), self._dtypes[field])
            self._arrays[field] = array
        return array
