"""Photos and masks on disk: read as upright RGB, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import math
import os
import struct
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sparsesam_jax.checkpoints.atomic import atomic_path, check_file

MASK_FORMATS = ("PNG", "TIFF", "BMP")
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # one channel of more than 8 bits
_SCALED_FORMATS = ("JPEG2000", "PPM")  # whose values Pillow scales to 16 bits by the file's range
_BITS_PER_SAMPLE, _MIN_SAMPLE, _MAX_SAMPLE = 258, 280, 281  # TIFF's tags
_PILLOWS_LIMIT = threading.Lock()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotoReader:
    """Reads photos as upright 8-bit RGB.

    The EXIF orientation is applied; greyscale and palettes become RGB; transparency is laid over
    white; of an animation the first frame is taken. Values of more than 8 bits are scaled by what
    the file says: 16-bit values keep their high byte, and TIFF may say fewer bits or a range. Where
    the file leaves open what is white (values of 12 bits in 16, 32 bits, floats), an option must
    say it.

    Attributes:
        bits: Bits of a value, 1 to 32, of greyscale photos of more than 8 bits.
        value_range: Instead, the values that become black and white; values beyond are clipped.
        max_pixels: Pixels of the largest photo; None is Pillow's limit, twice
            `PIL.Image.MAX_IMAGE_PIXELS`.
        max_side: Longest side of a photo in pixels; None has no limit.

    Raises:
        ValueError: An option is not as said.
    """

    bits: int | None = None
    value_range: tuple[float, float] | None = None
    max_pixels: int | None = None
    max_side: int | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and not 1 <= self.bits <= 32:
            raise ValueError(f"bits must lie in 1 to 32, got {self.bits}")
        if self.value_range is not None:
            low, high = self.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"value_range must be LO HI with LO < HI, got {low:g} {high:g}")
            if self.bits is not None:
                raise ValueError("bits or value_range may be given, got both")
        for name in ("max_pixels", "max_side"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be positive, got {limit}")

    def read(self, path: str | os.PathLike[str]) -> UInt8[np.ndarray, "height width 3"]:
        """Read a photo.

        Args:
            path: A file in any format that Pillow reads.

        Raises:
            ValueError: It is missing, no picture, a broken one or too large, or it leaves open what
                its values mean.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"image must be a file, got {os.fspath(path)!r}, which is none")
        return self._read(path, path)

    def read_bytes(
        self, data: bytes, name: str | os.PathLike[str]
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Read a photo from what its file holds; `name` is what a message calls it.

        Raises:
            ValueError: As `read`.
        """
        return self._read(io.BytesIO(data), name)

    def _read(
        self, source: Path | io.BytesIO, path: str | os.PathLike[str]
    ) -> UInt8[np.ndarray, "height width 3"]:
        try:
            # Pillow warns long before a photo is too large to work with, and raises beyond.
            with warnings.catch_warnings(), self._opened(source) as file:
                warnings.simplefilter("ignore")
                if self.max_side is not None and max(file.size) > self.max_side:
                    raise ValueError(
                        f"image must have sides of at most max_side (--max-side) {self.max_side} "
                        f"pixels, got {path} with {file.width} x {file.height}"
                    )
                return np.asarray(self._rgb(file))
        except Image.DecompressionBombError as error:
            text = str(error).split(",")[0]
            raise ValueError(
                f"image must be smaller or max_pixels (--max-pixels N) given: {path}: {text}"
            ) from error
        except (OSError, SyntaxError, EOFError, struct.error) as error:
            # PIL raises SyntaxError and struct.error on some broken files.
            text = str(error).replace(f" {source!r}", "") if source is not path else str(error)
            what = " ".join(text.split()) or type(error).__name__
            raise ValueError(
                f"image must be a picture that Pillow reads: {path}: {what}"
            ) from error

    @contextlib.contextmanager
    def _opened(self, path: Path | io.BytesIO) -> Iterator[Image.Image]:
        if self.max_pixels is None:
            with Image.open(path) as file:
                yield file
            return
        with _PILLOWS_LIMIT:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                opened = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        with opened as file:
            if file.width * file.height > self.max_pixels:
                raise ValueError(
                    f"image must have at most max_pixels ({self.max_pixels}) pixels, got "
                    f"{_name(file)} with {file.width} x {file.height}"
                )
            yield file

    def _rgb(self, file: Image.Image) -> Image.Image:
        of_high_bytes = any(";16" in str(tile[3]) for tile in getattr(file, "tile", ()))
        file.load()
        image = ImageOps.exif_transpose(file)
        if image.mode in _WIDE_MODES:
            return Image.fromarray(self._scaled(np.asarray(image), file)).convert("RGB")
        # Of colours of 16 bits Pillow keeps the high byte.
        if of_high_bytes and self.bits != 16:
            high = np.asarray(image.convert("RGB")).max()
            if self.bits is not None or self.value_range is not None or 0 < high < 128:
                raise ValueError(
                    f"image must use all 16 bits of its colours, got {_name(file)} with high bytes "
                    f"up to {high}: bits 16 (--bits 16) takes them as they are"
                )
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

    def _scaled(self, values: np.ndarray, file: Image.Image) -> UInt8[np.ndarray, "height width"]:
        """Values of more than 8 bits as 8 bits."""
        bits, value_range = self.bits, self.value_range
        if bits is None and value_range is None:
            bits, value_range = _declared(values, file)
        if value_range is not None:
            low, high = value_range
            filled = np.nan_to_num(values.astype(np.float64), nan=low)
            scaled = (filled - low) * (255 / (high - low))
            return np.clip(np.round(scaled), 0, 255).astype(np.uint8)
        assert bits is not None
        if values.dtype.kind == "f" or values.min() < 0 or int(values.max()) >> bits:
            raise ValueError(
                f"image must have values of {bits} bits, got {_name(file)} with {_span(values)}: "
                "value_range (--value-range LO HI) says what is black and white"
            )
        values = values.astype(np.int64)
        return (values >> bits - 8 if bits >= 8 else values * 255 // (2**bits - 1)).astype(np.uint8)


def _declared(
    values: np.ndarray, file: Image.Image
) -> tuple[int | None, tuple[float, float] | None]:
    """Bits or range of the values as the file says them.

    Raises:
        ValueError: It leaves them open.
    """
    tags = getattr(file, "tag_v2", {})
    if _MAX_SAMPLE in tags:
        low, high = (float(np.ravel(tags.get(tag, 0))[0]) for tag in (_MIN_SAMPLE, _MAX_SAMPLE))
        if low < high:
            return None, (low, high)
    stored = int(np.ravel(tags.get(_BITS_PER_SAMPLE, 16))[0])
    if stored < 16:
        return stored, None
    # Values that use the highest of 16 bits are of 16 bits; black is black in any range.
    top = values.max()
    fits = values.dtype.kind != "f" and values.min() >= 0 and top <= 0xFFFF
    if fits and (top >= 0x8000 or top == 0 or file.format in _SCALED_FORMATS):
        return 16, None
    raise ValueError(
        f"image must say which value is white, got {_name(file)} with {_span(values)}: "
        "bits (--bits N) or value_range (--value-range LO HI) decides"
    )


def _span(values: np.ndarray) -> str:
    return f"{values.dtype.name} values from {values.min():g} to {values.max():g}"


def _name(file: Image.Image) -> str:
    return os.fspath(getattr(file, "filename", None) or "a photo")


DEFAULT_READER = PhotoReader()


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "height width 3"]:
    """Read a photo as `PhotoReader` does without options."""
    return DEFAULT_READER.read(path)


def find_photos(arguments: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The photos that files, folders and glob patterns stand for, each once, in their order.

    A folder stands for the files in it whose names end as pictures do, a pattern (`*`, `?`,
    `[...]`, `**` for any folders) for the files that it matches; both are sorted, hidden files left
    out.

    Raises:
        ValueError: A folder or a pattern has no photo. A single file may be missing.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            suffixes = Image.registered_extensions()
            matches = [p for p in path.iterdir() if p.suffix.lower() in suffixes]
        elif glob.has_magic(os.fspath(argument)) and not path.exists():
            matches = [Path(p) for p in glob.glob(os.fspath(argument), recursive=True)]
        else:
            found.setdefault(path)
            continue
        matches = sorted(p for p in matches if p.is_file() and not p.name.startswith("."))
        if not matches:
            raise ValueError(f"images must hold at least one photo, got none in {str(path)!r}")
        found |= dict.fromkeys(matches)
    return list(found)


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
    """Raise ValueError unless a picture can be written at `path`; nothing is left there."""
    if picture_format(path) not in MASK_FORMATS and is_mask:
        raise ValueError(
            f"a mask needs a lossless format: .png, .tif or .bmp, got {os.fspath(path)!r}"
        )
    check_file(path)


def write_images(pictures: Mapping[Path, Image.Image]) -> None:
    """Write pictures under temporary names, and give them their names once all are there.

    Raises:
        OSError: One cannot be written; then none is.
    """
    with contextlib.ExitStack() as stack:
        for path, picture in pictures.items():
            temporary = stack.enter_context(atomic_path(path))
            picture.save(temporary, format=picture_format(path))
