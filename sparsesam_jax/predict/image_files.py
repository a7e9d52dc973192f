"""Photos and masks on disk: read as upright RGB, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sparsesam_jax.checkpoints.atomic import atomic_path

MASK_FORMATS = ("PNG", "TIFF", "BMP")
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # one channel of more than 8 bits


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "height width 3"]:
    """Read a photo as upright 8-bit RGB.

    The EXIF orientation is applied; greyscale and palettes become RGB; 16-bit values keep their
    high byte; transparency is laid over white; of an animation the first frame is taken.

    Args:
        path: A file in any format that Pillow reads.

    Raises:
        ValueError: It is missing, no picture, a broken one, or has more than 16 bits a channel.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image must be a file, got {os.fspath(path)!r}, which is none")
    try:
        # Pillow warns long before a photo is too large to work with, and raises beyond.
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore")
            file.load()
            return np.asarray(_rgb(ImageOps.exif_transpose(file)))
    except (Image.DecompressionBombError, OSError, SyntaxError, EOFError, struct.error) as error:
        # PIL raises SyntaxError and struct.error on some broken files.
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"image must be a picture that Pillow reads: {path}: {what}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _WIDE_MODES:
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            span = f"{values.min()} to {values.max()}"
            raise ValueError(f"image must have 8 or 16 bits a channel, got values {span}")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("image must have 8 or 16 bits a channel, got floating-point values")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def picture_format(path: Path) -> str:
    """Pillow's name of the format that a file name's suffix stands for.

    Raises:
        ValueError: Pillow writes no such format.
    """
    name = Image.registered_extensions().get(path.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise ValueError(f"a picture's name must end in .png or the like, got {os.fspath(path)!r}")
    return name


def check_writable(path: Path, *, is_mask: bool = False) -> None:
    """Raise ValueError unless a picture can be written at `path`; nothing is written."""
    if picture_format(path) not in MASK_FORMATS and is_mask:
        raise ValueError(
            f"a mask needs a lossless format: .png, .tif or .bmp, got {os.fspath(path)!r}"
        )
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"output must lie in a folder that exists, got {os.fspath(path)!r}")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"output must be a file that can be written, got {os.fspath(path)!r}")


def write_images(pictures: Mapping[Path, Image.Image]) -> None:
    """Write pictures under temporary names, and give them their names once all are there.

    Raises:
        OSError: One cannot be written; then none is.
    """
    with contextlib.ExitStack() as stack:
        for path, picture in pictures.items():
            temporary = stack.enter_context(atomic_path(path))
            picture.save(temporary, format=picture_format(path))
