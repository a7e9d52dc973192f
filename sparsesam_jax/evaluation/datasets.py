"""Photos with masks on disk: any two folders with equal stems, and HQ-44K's published layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from sparsesam_jax.predict.image_files import DEFAULT_READER, PhotoReader

_FOREGROUND = 128  # ground truth is what is brighter

# Images and masks below SAM-HQ's data folder (github SysCV/sam-hq, train/README.md).
LAYOUTS: dict[str, tuple[str, str, str]] = {
    "dis5k": ("DIS5K/DIS-VD", "im", "gt"),
    "coift": ("thin_object_detection/COIFT", "images", "masks"),
    "hrsod": ("thin_object_detection/HRSOD", "images", "masks_max255"),
    "thinobject5k": ("thin_object_detection/ThinObject5K", "images_test", "masks_test"),
}


class Pair(NamedTuple):
    """A photo and its mask on disk; `mask` is None where it is missing."""

    name: str
    image: Path | None
    mask: Path | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo and its ground truth, decoded once for all that is measured on it."""

    name: str
    image: UInt8[np.ndarray, "height width 3"]
    mask: Bool[np.ndarray, "height width"]
    grey_mask: UInt8[np.ndarray, "height width"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.mask.shape


def folder_pairs(images: Path, masks: Path) -> list[Pair]:
    """Photos and masks with equal stems, sorted by it; one without the other is in the list too.

    Raises:
        ValueError: A folder is missing or has two files of one stem, or no stem is in both.
    """
    image_of, mask_of = _by_stem("images", images), _by_stem("masks", masks)
    if not image_of.keys() & mask_of.keys():
        raise ValueError(
            f"images and masks must have files of equal stems, got none in {images} and {masks}"
        )
    names = sorted(image_of.keys() | mask_of.keys())
    return [Pair(name, image_of.get(name), mask_of.get(name)) for name in names]


def dataset_pairs(name: str, root: Path) -> list[Pair]:
    """One of HQ-44K's four evaluation sets.

    Args:
        name: `dis5k` (DIS5K-VD), `coift`, `hrsod` or `thinobject5k` (ThinObject5K-TE).
        root: SAM-HQ's data folder, or any folder on the way from it to the set's own.

    Raises:
        ValueError: There is no such set, or its folders are not there.
    """
    if name not in LAYOUTS:
        raise ValueError(f"dataset must be one of {', '.join(LAYOUTS)}; got {name!r}")
    folder, images, masks = LAYOUTS[name]
    parts = folder.split("/")
    places = [root.joinpath(*parts[skip:]) for skip in range(len(parts) + 1)]
    for place in places:
        if (place / images).is_dir() and (place / masks).is_dir():
            return folder_pairs(place / images, place / masks)
    raise ValueError(
        f"root must hold {folder}/{images} and {folder}/{masks} for {name}, got {str(root)!r}"
    )


def read_photo(pair: Pair, reader: PhotoReader = DEFAULT_READER) -> Photo:
    """Decode a photo and its mask; ground truth is above 128.

    Args:
        pair: Where they are.
        reader: How both are read.

    Raises:
        ValueError: One is missing or broken, their sizes differ, or the mask is empty.
    """
    if pair.image is None or pair.mask is None:
        missing = "image" if pair.image is None else "mask"
        raise ValueError(f"{pair.name} has no {missing}")
    # Ground truth is drawn on the stored pixels, so it is read as the photo is: upright.
    image = reader.read(pair.image)
    grey = np.asarray(Image.fromarray(reader.read(pair.mask)).convert("L"))
    if image.shape[:2] != grey.shape:
        raise ValueError(
            f"the mask of {pair.name} must have its photo's size {image.shape[:2]}, "
            f"got {grey.shape}"
        )
    mask = grey > _FOREGROUND
    if not mask.any():
        raise ValueError(f"the mask of {pair.name} must have foreground, got none above 128")
    return Photo(name=pair.name, image=image, mask=mask, grey_mask=grey)


def _by_stem(argument: str, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{argument} must be a folder, got {str(folder)!r}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.stem in found:
            raise ValueError(
                f"{argument} must have one file a stem, got {found[path.stem].name} and {path.name}"
            )
        found[path.stem] = path
    return found


def limited(pairs: Sequence[Pair], limit: int | None) -> list[Pair]:
    """The first so many pairs; all with None."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be positive, got {limit}")
    return list(pairs[:limit])
