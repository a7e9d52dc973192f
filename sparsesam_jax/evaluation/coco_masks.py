"""A method's masks of COCO images on disk: a file that a killed run leaves usable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sparsesam_jax.checkpoints.atomic import atomic_path

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


class MaskFile:
    """The masks that are found so far, in memory and on disk, one JSON object a line.

    Args:
        path: The file.
        resume: Whether to keep what it holds. A last line that was cut is dropped.

    Raises:
        ValueError: The file holds something else.
    """

    def __init__(self, path: Path, *, resume: bool):
        self.path = path
        self.images: dict[Any, ImageMasks] = {}
        if resume and path.exists():
            self.images = {found.image: found for found in _read(path)}
        with atomic_path(path) as temporary:
            temporary.write_text("".join(map(_line, self.images.values())), "utf-8")

    def append(self, found: ImageMasks) -> None:
        """Add an image in one write."""
        self.images[found.image] = found
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(found))


def _line(found: ImageMasks) -> str:
    return json.dumps(dataclasses.asdict(found)) + "\n"


def _read(path: Path) -> list[ImageMasks]:
    text = path.read_text("utf-8")
    found = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            found.append(ImageMasks(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: no image of a run: {error}") from error
    return found
