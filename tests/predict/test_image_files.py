"""Photos of every kind are read as upright 8-bit RGB, or refused with what decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsesam_jax.predict.image_files import PhotoReader, find_photos, read_image


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_images_of_every_mode(tmp_path, mode):
    grey = np.tile(np.array([0, 255, 255, 0], np.uint8), (3, 1))
    image = Image.fromarray(grey)
    if mode in ("I", "I;16"):
        wide = grey.astype(np.uint16) * 257
        image = Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32))
        assert image.mode == mode
    else:
        image = image.convert(mode)
    path = tmp_path / "image.tif"
    image.save(path)
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.repeat(grey[..., None], 3, -1))


def test_transparency_lies_over_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png")[:, 0, 0], [0, 255])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png", transparency=1)
    read = read_image(tmp_path / "palette.png")
    np.testing.assert_array_equal(read[0], [[10, 20, 30], [255, 255, 255]])


def test_exif_orientation(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), np.rot90(pixels, -1))


def saved(values: np.ndarray, path: Path, **options: object) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


def test_12_bits_in_16_are_refused_until_an_option_says_so(tmp_path: Path) -> None:
    path = saved(np.array([[0, 2048, 4095]], np.uint16), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png with uint16 values from 0 to 4095: bits"):
        read_image(path)
    assert PhotoReader(bits=12).read(path)[0, :, 0].tolist() == [0, 128, 255]
    assert PhotoReader(bits=16).read(path)[0, :, 0].tolist() == [0, 8, 15]  # as they are
    assert PhotoReader(value_range=(0, 2048)).read(path)[0, :, 0].tolist() == [0, 255, 255]
    with pytest.raises(ValueError, match=r"values of 11 bits, got .* from 0 to 4095"):
        PhotoReader(bits=11).read(path)


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        (np.array([[0, 255]], np.int32), {"bits": 8}, [0, 255]),
        (np.array([[0, 1]], np.int32), {"bits": 1}, [0, 255]),
        (np.array([[0, 70000]], np.int32), {"value_range": (0, 70000)}, [0, 255]),
        (np.array([[-5, 5]], np.int32), {"value_range": (-5, 5)}, [0, 255]),
        (np.array([[0.0, 0.5]], np.float32), {"value_range": (0, 1)}, [0, 128]),
        (np.array([[np.nan, 2.0]], np.float32), {"value_range": (0, 1)}, [0, 255]),
    ],
)
def test_wide_values_need_their_range(tmp_path: Path, values, options, expected) -> None:
    path = saved(values, tmp_path / "image.tif")
    with pytest.raises(ValueError, match="image must say which value is white"):
        read_image(path)
    assert PhotoReader(**options).read(path)[0, :, 0].tolist() == expected


def test_what_the_file_says(tmp_path: Path) -> None:
    values = np.array([[100, 2148, 4195]], np.uint16)
    said = saved(values, tmp_path / "said.tif", tiffinfo={280: 100, 281: 4195})
    assert read_image(said)[0, :, 0].tolist() == [0, 128, 255]
    black = saved(np.zeros((2, 2), np.uint16), tmp_path / "black.png")
    assert not read_image(black).any()
    (tmp_path / "grey.pgm").write_bytes(b"P5 2 1 1023\n" + np.array([[0, 400]], ">u2").tobytes())
    assert read_image(tmp_path / "grey.pgm")[0, :, 0].tolist() == [0, 100]


def test_colours_of_12_bits_in_16_are_refused(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    def png(values: list[int]) -> bytes:
        row = zlib.compress(b"\0" + np.array(values, ">u2").tobytes())
        head = struct.pack(">IIBBBBB", len(values) // 3, 1, 16, 2, 0, 0, 0)
        parts = chunk(b"IHDR", head) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + parts

    path = tmp_path / "a.png"
    path.write_bytes(png([0, 2048, 4095, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"must use all 16 bits of its colours, got .*a.png"):
        read_image(path)
    assert PhotoReader(bits=16).read(path)[0, 0].tolist() == [0, 8, 15]
    path.write_bytes(png([0, 2048, 65535, 0, 0, 0]))
    assert read_image(path)[0, 0].tolist() == [0, 8, 255]


def test_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(np.zeros((9, 10), np.uint8), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ValueError, match=r"max_pixels \(--max-pixels N\) given: .*a.png"):
        read_image(path)
    assert PhotoReader(max_pixels=90).read(path).shape == (9, 10, 3)
    with pytest.raises(ValueError, match=r"at most max_pixels \(89\) pixels, got .* with 10 x 9"):
        PhotoReader(max_pixels=89).read(path)
    assert Image.MAX_IMAGE_PIXELS == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits must lie in 1 to 32, got 0"),
        ({"value_range": (1.0, 1.0)}, "LO < HI, got 1 1"),
        ({"value_range": (0.0, float("inf"))}, "LO < HI, got 0 inf"),
        ({"bits": 12, "value_range": (0.0, 1.0)}, "bits or value_range may be given, got both"),
        ({"max_pixels": 0}, "max_pixels must be positive, got 0"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhotoReader(**options)


def test_find_photos(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "deep/c.png", "[1].png"):
        (tmp_path / name).touch()
    inside = [tmp_path / name for name in ("[1].png", "a.JPG", "b.png")]
    assert find_photos([tmp_path]) == inside
    assert find_photos([tmp_path / "b.png", tmp_path]) == [inside[2], *inside[:2]]
    assert find_photos([f"{tmp_path}/*.png"]) == [inside[0], inside[2]]
    assert find_photos([f"{tmp_path}/**/c.*"]) == [tmp_path / "deep" / "c.png"]
    assert find_photos([tmp_path / "[1].png", "missing.png"]) == [inside[0], Path("missing.png")]
    with pytest.raises(ValueError, match="at least one photo, got none in"):
        find_photos([f"{tmp_path}/*.tif"])
