"""Many prompts in decoder calls of a few compiled sizes, and their results put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsesam_jax.predict.mask_formats import MaskFormat, format_masks
from sparsesam_jax.predict.prompt_arrays import PromptArrays, power_of_two

# Masks, scores and logits; masks are lists of run lengths if that is wanted.
Masks = tuple[Any, np.ndarray, np.ndarray]

# Prompts of one decoder call. On a CPU a call takes as long as its prompts do one by one, so that
# one compiled size serves any number; on a GPU 32 of float32 take a gigabyte at 1024 pixels.
PROMPTS_ON_CPU, PROMPTS = 1, 32


class Call(NamedTuple):
    """One call of the decoder: these images, and of each the prompts from `start` on."""

    image: int
    images: int
    start: int
    prompts: int


def calls(arrays: Sequence[PromptArrays], at_once: int) -> Iterator[Call]:
    """All images in one call if their prompts are few, else one after the other in chunks."""
    counts = [a.num_prompts for a in arrays]
    together = power_of_two(max(counts))
    have_mask = {a.mask_input is not None for a in arrays if a.num_prompts}
    few = together == 1 or len(arrays) * together <= at_once
    if few and len(have_mask) == 1:
        yield Call(0, len(arrays), 0, together)
        return
    for image, count in enumerate(counts):
        for start in range(0, count, at_once):
            yield Call(image, 1, start, min(at_once, power_of_two(count - start)))


class Result:
    """The masks, scores and logits of one image's prompts, put together from several calls."""

    def __init__(
        self,
        prompts: int,
        masks: int,
        size: tuple[int, int],
        low_res: tuple[int, int],
        mask_format: MaskFormat,
    ):
        self._prompts = prompts
        self._format: MaskFormat = mask_format
        self._shapes = ((prompts, masks, *size), (prompts, masks), (prompts, masks, *low_res))
        self._runs: list[Any] = []
        self._arrays: list[np.ndarray | None] = [None, None, None]

    def put(self, start: int, masks: np.ndarray, iou: np.ndarray, low_res: np.ndarray) -> None:
        """Add the prompts from `start` on, behind those that are there."""
        parts = [format_masks(masks, self._format), iou, low_res]
        for field, part in enumerate(parts):
            if isinstance(part, list):
                self._runs += part
            elif len(part) == self._prompts:
                self._arrays[field] = part
            else:
                whole = self._arrays[field]
                if whole is None:
                    whole = np.empty((self._prompts, *part.shape[1:]), part.dtype)
                    self._arrays[field] = whole
                whole[start : start + len(part)] = part

    def arrays(self, return_logits: bool) -> Masks:
        """What `SamPredictor.predict` returns for P prompts."""
        dtypes = (np.float32 if return_logits else np.bool_, np.float32, np.float32)
        masks, iou, low_res = (
            np.empty(shape, dtype) if array is None else array
            for shape, dtype, array in zip(self._shapes, dtypes, self._arrays, strict=True)
        )
        if self._format == "rle":
            return self._runs, iou, low_res
        # Of no prompts nothing was put in, whatever the format.
        return (masks if self._prompts else format_masks(masks, self._format)), iou, low_res
