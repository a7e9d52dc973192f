"""Photos with masks and box prompts, read from two folders and a CSV manifest."""

from __future__ import annotations

import csv
import dataclasses
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

_BOX = ("box_x0", "box_y0", "box_x1", "box_y1")
_FOREGROUND = 128  # ground truth is what is brighter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo, decoded once for all that is measured on it."""

    name: str
    image: UInt8[np.ndarray, "height width 3"]
    mask: Bool[np.ndarray, "height width"]
    box: Float[np.ndarray, " 4"]


def read_photos(
    images: Path, masks: Path, manifest: Path, *, limit: int | None, pool: Executor
) -> list[Photo]:
    """The manifest's photos, in its order.

    Args:
        images: Folder of the photos; a file's stem is its id in the manifest.
        masks: Folder of the masks, named likewise; ground truth is above 128.
        manifest: CSV with the columns `id` and `box_x0, box_y0, box_x1, box_y1`, in pixels.
        limit: Only the first so many; None for all.
        pool: Decodes them.

    Raises:
        ValueError: The manifest lacks a column or has no rows, a photo or mask is missing or no
            image, or their sizes differ.
        OSError: A file or folder cannot be read.
    """
    with open(manifest, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:limit]
    if not rows:
        raise ValueError(f"{manifest} must have at least one row, got none")
    missing = [column for column in ("id", *_BOX) if column not in rows[0]]
    if missing:
        raise ValueError(f"{manifest} must have the columns {', '.join(missing)}; they are missing")
    image_of, mask_of = _by_stem(images), _by_stem(masks)

    def read(row: dict[str, str]) -> Photo:
        name = row["id"]
        if name not in image_of or name not in mask_of:
            folder = images if name not in image_of else masks
            raise ValueError(
                f"{folder} must have a file for every id of {manifest}; {name} is missing"
            )
        try:
            box = np.array([float(row[column]) for column in _BOX])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{manifest} must have numbers as box of {name}: {error}") from error
        with Image.open(image_of[name]) as file:
            image = np.asarray(file.convert("RGB"))
        with Image.open(mask_of[name]) as file:
            mask = np.asarray(file.convert("L")) > _FOREGROUND
        if image.shape[:2] != mask.shape:
            raise ValueError(
                f"the mask of {name} must have its photo's size {image.shape[:2]}, got {mask.shape}"
            )
        return Photo(name=name, image=image, mask=mask, box=box)

    return list(pool.map(read, rows))


def _by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.iterdir()}
