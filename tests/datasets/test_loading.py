"""Sources of photos, and reading them ahead by threads and by processes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from killed import draw, square
from PIL import Image

from sparsesam_jax.datasets.loading import LoadPhoto, load_ahead
from sparsesam_jax.datasets.sources import Rows, find_source, part_of
from sparsesam_jax.model.transforms import resize_and_pad
from sparsesam_jax.predict.image_files import PhotoReader


def names(source) -> list[str]:
    return [photo.name for row in range(source.num_rows) if (photo := source.read(row))]


def make_tar(path: Path, photos: list[Path], **others: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for photo in photos:
            tar.add(photo, photo.name)
        for name, data in others.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_sources(tmp_path: Path) -> None:
    folder = draw(tmp_path / "photos", 5)
    (folder / "b").mkdir()
    (folder / "00004.jpg").rename(folder / "b" / "x.jpg")
    (folder / "notes.txt").write_text("no photo")
    (folder / ".hidden.jpg").write_bytes(b"")
    expected = ["00000.jpg", "00001.jpg", "00002.jpg", "00003.jpg", "b/x.jpg"]
    source = find_source(str(folder), shard_size=2)
    assert names(source) == expected
    assert [list(source.rows(i)) for i in range(source.num_shards)] == [[0, 1], [2, 3], [4]]
    assert list(Rows(source, [0, 2])) == [0, 1, 4]
    assert find_source(str(folder), limit=3).num_rows == 3
    (tmp_path / "list.txt").write_text("photos/b/x.jpg\n\nphotos/00001.jpg\n")
    assert names(find_source(str(tmp_path / "list.txt"))) == ["photos/b/x.jpg", "photos/00001.jpg"]
    assert len(names(find_source(str(folder / "*.jpg")))) == 4
    assert names(find_source(str(folder / "00001.jpg"))) == ["00001.jpg"]
    digests = {find_source(str(folder)).digest, find_source(str(folder / "*.jpg")).digest}
    assert len(digests) == 2


def test_a_tar_is_a_shard(tmp_path: Path) -> None:
    photos = sorted(draw(tmp_path / "photos", 5).iterdir())
    make_tar(tmp_path / "0.tar", photos[:3], **{"00000.json": b"{}"})
    make_tar(tmp_path / "1.tar", photos[3:])
    source = find_source(str(tmp_path / "*.tar"))
    assert (source.shard_size, source.num_shards, source.num_rows) == (3, 2, 6)
    assert [Path(name).name for name in names(source)] == [photo.name for photo in photos]
    found = source.read(4)
    assert found is not None and found.data == photos[4].read_bytes()
    assert source.read(5) is None
    small = find_source(str(tmp_path / "*.tar"), shard_size=2)
    with pytest.raises(ValueError, match=r"shard_size .* at least the photos of a tar, got 2"):
        small.read(0)
    (tmp_path / "2.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"2\.tar must be an uncompressed tar that is whole"):
        find_source(str(tmp_path / "2.tar"))


@pytest.mark.parametrize(
    ("source", "message"),
    [("absent", "source must be a folder"), ("empty", "got none"), ("both", "photos and tars")],
)
def test_sources_that_are_none(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "both.txt").write_text("a.jpg\nb.tar\n")
    path = tmp_path / (f"{source}.txt" if source == "both" else source)
    with pytest.raises(ValueError, match=message):
        find_source(str(path))


def test_parts_are_all_shards_once() -> None:
    for shards in (0, 1, 7, 16):
        parts = [part_of(shards, (index, 5)) for index in range(5)]
        assert [shard for part in parts for shard in part] == list(range(shards))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_photos_are_those_that_sam_resizes(tmp_path: Path) -> None:
    source = find_source(str(draw(tmp_path / "photos", 5)))
    load = LoadPhoto(source=source, reader=PhotoReader(), long_side=96)
    for photo, path in zip(load_ahead(range(5), load), sorted(source.root.iterdir()), strict=True):
        image = np.asarray(Image.open(path))
        padded, (height, width) = resize_and_pad(image, 96)
        assert photo.size == image.shape[:2]
        np.testing.assert_array_equal(photo.pixels, padded[:height, :width])


def test_broken_photos_have_a_reason(tmp_path: Path) -> None:
    folder = draw(tmp_path / "photos", 5, broken=[0, 1])
    (folder / "00002.jpg").write_text("no picture")
    Image.new("L", (30000, 20)).save(folder / "00003.png")
    (folder / "00003.jpg").unlink()
    (folder / "list.txt").write_text("\n".join([*sorted(os.listdir(folder)), "absent.jpg"]))
    source = find_source(str(folder / "list.txt"))
    load = LoadPhoto(source=source, reader=PhotoReader(max_side=20000), long_side=None)
    empty, cut, text, wide, good, absent = load_ahead(range(6), load)
    assert "cannot identify image file" in empty.error and "0x" not in empty.error
    assert "runcated" in cut.error
    assert "cannot identify" in text.error
    assert "max_side (--max-side) 20000 pixels, got 00003.png with 30000 x 20" in wide.error
    assert not good.error and good.pixels.shape[:2] == good.size
    assert "No such file" in absent.error


def test_worker_processes() -> None:
    found = list(load_ahead(range(6), square, 2))
    assert [int(x[0, 0]) for x in found] == [0, 1, 3, 4, 5]
    assert type(found[0]) is np.ndarray  # no view of shared memory
    with pytest.raises(ValueError, match="nine"):
        list(load_ahead([9], square, 1))


def test_a_dead_worker_is_an_error() -> None:
    photos = load_ahead(range(10, 100000), square, 1)
    next(photos)
    args = ["pgrep", "-P", str(os.getpid()), "-f", "spawn_main"]
    worker = subprocess.run(args, capture_output=True, text=True, check=True).stdout.split()[-1]
    os.kill(int(worker), signal.SIGKILL)
    with pytest.raises(ValueError, match="a worker process that reads photos has died"):
        list(photos)
