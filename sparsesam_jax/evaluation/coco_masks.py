"""A method's masks of COCO images on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from sparsesam_jax.evaluation.results_file import ResultsFile

Detection = dict[str, Any]  # COCO's: image_id, category_id, score and bbox x y w h or segmentation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageMasks:
    """What a method says of one image.

    Attributes:
        image: The image's id.
        results: COCO results, one a detection.
        seconds: Wall time of encoding and of all prompts.
        compiled: Whether that time includes compilation.
    """

    image: Any
    results: list[Detection]
    seconds: float
    compiled: bool


class MaskFile(ResultsFile[ImageMasks]):
    """The masks that are found so far, one JSON object a line."""

    def key(self, result: ImageMasks) -> Any:
        """The image's id."""
        return result.image

    def line(self, result: ImageMasks) -> str:
        """The object."""
        return json.dumps(dataclasses.asdict(result), allow_nan=False) + "\n"

    def read(self, text: str) -> Iterator[ImageMasks]:
        """The objects."""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                yield ImageMasks(**json.loads(line))
            except (TypeError, ValueError) as error:
                place = f"{self.path}, line {number}"
                raise ValueError(f"{place}: no image of a run: {error}") from error
