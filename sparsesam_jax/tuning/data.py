"""Photos with masks in memory: from folders of masks, label maps or COCO's JSON.

All are kept alike: a photo of 8 bits, shrunk to a square's size, and a label map, in which a target
is a set of labels. Masks that overlap are cut into parts: a label is a set of masks. So a photo's
masks cost a byte a pixel, however many they are.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

from sparsesam_jax.predict.image_files import PhotoReader

NUM_LABELS = 256
_UNLABELLED = 0


class Photo(NamedTuple):
    """A photo and its targets as they lie in memory.

    Attributes:
        image: RGB.
        labels: Label map.
        members: For every target which labels are its own.
    """

    image: UInt8[np.ndarray, "height width 3"]
    labels: UInt8[np.ndarray, "height width"]
    members: Bool[np.ndarray, "targets 256"]


class Drawn(NamedTuple):
    """Photos and targets of a batch, see `augment.Batch`."""

    photos: UInt8[np.ndarray, "B side side 3"]
    sizes: Int[np.ndarray, "B 2"]
    labels: UInt8[np.ndarray, "B side side"]
    members: Bool[np.ndarray, "B P 256"]
    features: Float[np.ndarray, "B Gh Gw C"] | None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a photo lies and how its masks are read; a process can be given it.

    Attributes:
        name: What messages call it.
        image: The photo.
        read: Reads the masks, given the photo's height and width: a label map and the targets'
            labels, or boolean masks that may overlap.
        arguments: What `read` takes first.
        group: The data set that it is of, for weights.
    """

    name: str
    image: Path
    read: Callable[..., tuple[np.ndarray, list[list[int]]] | list[np.ndarray]]
    arguments: tuple[Any, ...]
    group: str = ""

    def load(self, side: int) -> Photo:
        """Read photo and masks, with the longest side at most `side`.

        Raises:
            ValueError: A file is missing or broken, or sizes disagree.
        """
        image = PhotoReader().read(self.image)
        size = image.shape[:2]
        found = self.read(*self.arguments, size)
        labels, targets = found if isinstance(found, tuple) else label_map(found, size)
        if labels.shape != size:
            expected = f"its photo's size {size}, got {labels.shape}"
            raise ValueError(f"the masks of {self.name} must have {expected}")
        if max(size) > side:
            scale = side / max(size)
            width, height = (max(1, round(length * scale)) for length in size[::-1])
            image = np.asarray(Image.fromarray(image).resize((width, height), reducing_gap=2.0))
            small = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
            labels = np.asarray(small)
        members = np.zeros((len(targets), NUM_LABELS), bool)
        for row, values in zip(members, targets, strict=True):
            row[values] = True
        present = np.zeros(NUM_LABELS, bool)
        present[np.unique(labels)] = True
        return Photo(image, labels, members[(members & present).any(1)])


def label_map(
    masks: Sequence[Bool[np.ndarray, "height width"]], size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "height width"], list[list[int]]]:
    """Masks that may overlap as a label map: a label is a set of masks, a mask a set of labels.

    Where more than 255 sets occur, the smallest masks go, one after the other.
    """
    kept = sorted((mask for mask in masks if mask.any()), key=lambda mask: -int(mask.sum()))
    while True:
        bits = np.packbits(np.array(kept, bool).reshape(len(kept), -1), axis=0)
        sets, flat = np.unique(bits, axis=1, return_inverse=True)
        member = np.unpackbits(sets, axis=0, count=len(kept)).astype(bool)
        if member.shape[1] + 1 <= NUM_LABELS:
            break
        kept.pop()
    # The set of no mask is label 0.
    order = np.concatenate([[_UNLABELLED], 1 + np.arange(member.shape[1])]).astype(np.int64)
    empty = ~member.any(0)
    numbers = np.where(empty, _UNLABELLED, order[1:])
    labels = numbers[flat.reshape(size)].astype(np.uint8)
    return labels, [[int(v) for v in numbers[row]] for row in member]


class Photos:
    """Photos in memory, from which batches are drawn.

    Args:
        photos: What `Source.load` returned.
        side: Side of the square that each is stored in.
        weights: How often each is drawn, relative to the others; None is alike.
        features: A teacher's features of each.
    """

    def __init__(
        self,
        photos: Iterable[Photo],
        count: int,
        side: int,
        weights: Float[np.ndarray, " N"] | None = None,
        features: Float[np.ndarray, "N Gh Gw C"] | None = None,
    ):
        self.features = features
        self.images = np.zeros((count, side, side, 3), np.uint8)
        self.labels = np.zeros((count, side, side), np.uint8)
        self.sizes = np.zeros((count, 2), np.int32)
        members = []
        for index, photo in enumerate(photos):
            height, width = self.sizes[index] = photo.labels.shape
            self.images[index, :height, :width] = photo.image
            self.labels[index, :height, :width] = photo.labels
            members.append(photo.members)
        self.targets = np.array([len(rows) for rows in members])
        self.first = np.cumsum(self.targets) - self.targets
        self.members = np.concatenate(members)
        weights = np.ones(count) if weights is None else weights
        weights = np.where(self.targets > 0, weights, 0)  # what has no target teaches nothing
        if not weights.sum() > 0:
            raise ValueError("data must have at least one photo with a mask, got none")
        self.shares = weights / weights.sum()

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, seed: int, step: int, count: int, targets: int) -> Drawn:
        """Photos and targets of a step: the same for the same seed and step.

        Args:
            seed: Of the run.
            step: Which one.
            count: Photos.
            targets: Targets a photo; where it has fewer, some come twice.
        """
        rng = np.random.default_rng((seed, step))
        index = rng.choice(len(self), count, p=self.shares)
        available = self.targets[index][:, None]
        start = rng.integers(0, available)
        chosen = self.first[index][:, None] + (start + np.arange(targets)) % available
        features = None if self.features is None else self.features[index]
        photos, labels, members = self.images[index], self.labels[index], self.members[chosen]
        return Drawn(photos, self.sizes[index], labels, members, features)


def load(
    sources: Sequence[Source],
    side: int,
    *,
    weights: dict[str, float] | None = None,
    processes: int = 0,
    embeddings: Path | None = None,
) -> Photos:
    """Read photos into memory.

    Args:
        sources: What `find` returned.
        side: Side of the square that each is stored in; larger photos are shrunk.
        weights: How often the photos of a group are drawn, relative to 1 for the others.
        processes: How many read; with 0 this process's threads do. Other processes import the
            caller's main module, which then has to be guarded as `multiprocessing` says.
        embeddings: Folder of a teacher's `Embedding` files of the photos' stems.

    Raises:
        ValueError: A photo or embedding cannot be read, none has a mask, or `weights` names no
            group.
    """
    weights = weights or {}
    unknown = weights.keys() - {source.group for source in sources}
    if unknown:
        groups = ", ".join(sorted({source.group for source in sources}))
        raise ValueError(f"weights must be of groups ({groups}), got {', '.join(sorted(unknown))}")
    if processes:
        pool: concurrent.futures.Executor = concurrent.futures.ProcessPoolExecutor(
            processes, mp_context=multiprocessing.get_context("spawn")
        )
    else:
        pool = concurrent.futures.ThreadPoolExecutor()
    share = np.array([weights.get(source.group, 1.0) for source in sources])
    with pool:
        chunk = 16 if processes else 1
        photos = pool.map(_load, sources, [side] * len(sources), chunksize=chunk)
        features = None if embeddings is None else _features(sources, embeddings)
        return Photos(photos, len(sources), side, share, features)


def _features(sources: Sequence[Source], folder: Path) -> np.ndarray:
    """Features of all photos in float16, as the padded square has them."""
    # Imported here: JAX takes seconds, and processes that read photos need none.
    from sparsesam_jax.predict.embedding import Embedding

    found = []
    for source in sources:
        embedding = Embedding.load(folder / f"{source.image.stem}.safetensors")
        features = np.asarray(embedding.features[0], np.float16)
        rows, cols = embedding.frame or features.shape[:2]
        edges = ((0, rows - features.shape[0]), (0, cols - features.shape[1]), (0, 0))
        found.append(np.pad(features, edges))
    return np.stack(found)


def _load(source: Source, side: int) -> Photo:
    return source.load(side)


def find(
    images: Path,
    *,
    masks: Path | None = None,
    labels: Path | None = None,
    coco: Path | None = None,
    targets: Path | None = None,
) -> list[Source]:
    """Photos with masks on disk, in one of the three forms.

    Args:
        images: Folder of photos.
        masks: Folder with a mask of a photo's stem, foreground > 128, or a folder of its stem with
            several.
        labels: Folder of 8-bit label maps of the photos' stems; 0 is unlabelled.
        coco: COCO's instances as JSON.
        targets: With `labels`: a JSON list of `{"name": stem, "src": group, "targets": [[labels,
            kind], ...]}`; without it every label is a target.

    Raises:
        ValueError: Not exactly one form is given, a folder or file is missing or not in its form,
            or no photo has masks.
    """
    given = [
        name for name, value in (("masks", masks), ("labels", labels), ("coco", coco)) if value
    ]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise ValueError(f"exactly one of masks, labels and coco must be given, got {got}")
    if targets is not None and labels is None:
        raise ValueError("targets belongs to labels, got it without")
    stems = _by_stem("images", images)
    if coco is not None:
        sources = _coco_sources(images, coco)
    elif masks is not None:
        found = _by_stem("masks", masks)
        sources = [
            Source(stem, stems[stem], _read_masks, (found[stem],))
            for stem in sorted(stems.keys() & found.keys())
        ]
    else:
        assert labels is not None
        sources = _label_sources(stems, _by_stem("labels", labels), targets)
    if not sources:
        raise ValueError(f"{given[0]} must have masks of the photos in {images}, got none")
    return sources


def _by_stem(argument: str, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{argument} must be a folder, got {str(folder)!r}")
    return {path.stem: path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def _label_sources(
    images: dict[str, Path], labels: dict[str, Path], targets: Path | None
) -> list[Source]:
    if targets is None:
        return [
            Source(stem, images[stem], _read_labels, (labels[stem], None))
            for stem in sorted(images.keys() & labels.keys())
        ]
    sources = []
    try:
        for row in json.loads(targets.read_text(encoding="utf-8")):
            stem, values = row["name"], [list(map(int, values)) for values, _ in row["targets"]]
            arguments = (labels[stem], values)
            source = Source(stem, images[stem], _read_labels, arguments, row.get("src", ""))
            sources.append(source)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"targets must be a list of photos of both folders, got {error!r} in {targets}"
        ) from error
    return sources


def _read_labels(
    path: Path, targets: list[list[int]] | None, size: tuple[int, int]
) -> tuple[np.ndarray, list[list[int]]]:
    with Image.open(path) as file:
        if file.mode not in ("L", "P"):
            raise ValueError(f"{path} must be a label map of 8 bits, got mode {file.mode}")
        labels = np.asarray(file)
    if targets is None:
        targets = [[int(value)] for value in np.unique(labels) if value != _UNLABELLED]
    return labels, targets


def _read_masks(path: Path, size: tuple[int, int]) -> list[np.ndarray]:
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    masks = []
    for file in paths:
        with Image.open(file) as image:
            mask = np.asarray(image.convert("L")) > 128
        if mask.shape != size:
            expected = f"its photo's size {size}, got {mask.shape}"
            raise ValueError(f"the mask {file} must have {expected}")
        masks.append(mask)
    return masks


def _coco_sources(images: Path, annotations: Path) -> list[Source]:
    if not annotations.is_file():
        raise ValueError(f"coco must be a JSON file, got {str(annotations)!r}, which is none")
    try:
        data = json.loads(annotations.read_text(encoding="utf-8"))
        found: dict[int, list[Any]] = {}
        for row in data["annotations"]:
            found.setdefault(row["image_id"], []).append(row["segmentation"])
        return [
            Source(Path(row["file_name"]).stem, images / row["file_name"], _read_coco, (shapes,))
            for row in data["images"]
            if (shapes := found.get(row["id"]))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"coco must be COCO's instances, got {error!r} in {annotations}"
        ) from error


def _read_coco(shapes: list[Any], size: tuple[int, int]) -> list[np.ndarray]:
    """Masks of polygons or run lengths, as COCO has both."""
    masks = []
    for shape in shapes:
        if isinstance(shape, dict):
            masks.append(_run_lengths(shape, size))
            continue
        mask = Image.new("1", (size[1], size[0]))
        for polygon in shape:
            ImageDraw.Draw(mask).polygon([float(value) for value in polygon], fill=1)
        masks.append(np.asarray(mask))
    return masks


def _run_lengths(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    from pycocotools import mask

    rle: Any = shape
    if isinstance(shape["counts"], list):
        rle = mask.frPyObjects(rle, *size)
    return mask.decode(rle).astype(bool)
