"""Prompts of a data set's photos: COCO's JSON, a detector's results, or a table."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from sparsesam_jax.datasets.sources import Source
from sparsesam_jax.predict.prompts import Prompt

_BOX = ("x0", "y0", "x1", "y1")
_NO_POINTS = np.zeros((0, 2)), np.zeros(0, np.int32)


class ObjectPrompt(NamedTuple):
    """What one mask is asked for.

    Attributes:
        prompt: In pixels of the upright photo.
        category: COCO's `category_id`.
        score: The detector's; None takes the model's own estimate of the mask's IoU.
    """

    prompt: Prompt
    category: int
    score: float | None


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of photos, by the photos' names.

    Attributes:
        objects: Of each photo.
        image_ids: COCO's ids of photos; others have their row for an id.
        digest: Of the files that they were read from.
    """

    objects: Mapping[str, list[ObjectPrompt]]
    image_ids: Mapping[str, int]
    digest: str

    def of(self, name: str, row: int) -> tuple[int, list[ObjectPrompt]]:
        """A photo's id and its prompts, which may be none.

        A file may name the photo as the data set does, or by the last part of that name.
        """
        found = name if self._knows(name) else PurePosixPath(name).name
        return self.image_ids.get(found, row), list(self.objects.get(found, []))

    def check(self, source: Source) -> None:
        """Raise ValueError where no file of a data set has a prompt; tars are not looked into."""
        if not source.in_tars and not any(self.of(name, 0)[1] for name in source.names):
            example = next(iter(self.objects), "none")
            raise ValueError(
                f"prompts must be for photos of the source ({source.names[0]}, ...), got {example}"
            )

    def _knows(self, name: str) -> bool:
        return name in self.objects or name in self.image_ids


def read_prompts(path: Path, annotations: Path | None = None) -> Prompts:
    """Read prompts.

    Args:
        path: COCO's instances (a JSON object with `images` and `annotations`, whose boxes are the
            prompts); a detector's results (a JSON list with `image_id`, `bbox` and perhaps
            `category_id`, `score`); or a CSV with the columns `image` and `x0 y0 x1 y1` or `x y`
            (and `label`, 1 or 0), and perhaps `object`, whose equal values in one image are one
            prompt, `category` and `score`.
        annotations: For a detector's results: COCO's JSON with the `images` of its ids.

    Raises:
        ValueError: A file is not as said.
    """
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".csv":
            return Prompts(_from_csv(path, data.decode("utf-8")), {}, _digest(data))
        content = json.loads(data)
        if isinstance(content, dict):
            names = _names(content)
            return Prompts(_from_coco(content["annotations"], names), _ids(names), _digest(data))
        if annotations is None:
            raise ValueError("a detector's results need --annotations, COCO's JSON of the images")
        more = annotations.read_bytes()
        names = _names(json.loads(more))
        return Prompts(_from_coco(content, names), _ids(names), _digest(data, more))
    except OSError as error:
        text = f"prompts must be a file, got {error.filename}: {error.strerror}"
        raise ValueError(text) from error
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"prompts must be COCO's JSON or a CSV, got {path}: {what}") from error


def _names(content: Mapping[str, Any]) -> dict[Any, str]:
    return {image["id"]: image["file_name"] for image in content["images"]}


def _ids(names: Mapping[Any, str]) -> dict[str, int]:
    return {name: number for number, name in names.items()}


def _digest(*files: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(file).digest() for file in files)).hexdigest()


def _from_coco(
    entries: list[dict[str, Any]], names: Mapping[Any, str]
) -> dict[str, list[ObjectPrompt]]:
    found: dict[str, list[ObjectPrompt]] = {}
    for entry in entries:
        if entry["image_id"] not in names:
            raise ValueError(
                f"prompts must be of the annotations' images, got {entry['image_id']!r}"
            )
        x, y, width, height = map(float, entry["bbox"])
        box = _box((x, y, x + width, y + height), f"image {entry['image_id']}")
        score = None if entry.get("score") is None else float(entry["score"])
        one = ObjectPrompt(Prompt(*_NO_POINTS, box), int(entry.get("category_id", 1)), score)
        found.setdefault(names[entry["image_id"]], []).append(one)
    return found


def _from_csv(path: Path, text: str) -> dict[str, list[ObjectPrompt]]:
    reader = csv.DictReader(text.splitlines())
    columns = set(reader.fieldnames or ())
    has_box, has_point = set(_BOX) <= columns, {"x", "y"} <= columns
    if "image" not in columns or not (has_box or has_point):
        raise ValueError(
            f"prompts must have the columns image and x0, y0, x1, y1 or x, y, got "
            f"{', '.join(reader.fieldnames or ()) or 'none'} in {path}"
        )
    # Rows of one object: its box, where there is one, stands in the first.
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for number, row in enumerate(reader, 2):
        key = row["object"] if row.get("object") else f"line {number}"
        groups.setdefault((row["image"], key), []).append(row | {"": f"{path}, line {number}"})
    found: dict[str, list[ObjectPrompt]] = {}
    for (image, _), rows in groups.items():
        found.setdefault(image, []).append(_object(rows, has_box, has_point))
    return found


def _object(rows: list[dict[str, str]], has_box: bool, has_point: bool) -> ObjectPrompt:
    first = rows[0]
    place = first[""]
    try:
        with_point = [row for row in rows if has_point and row["x"]]
        points = np.array([(float(r["x"]), float(r["y"])) for r in with_point]).reshape(-1, 2)
        labels = np.array([int(r.get("label") or 1) for r in with_point], np.int32)
        box = None
        if has_box and first["x0"]:
            box = _box(tuple(float(first[name]) for name in _BOX), place)
        category, score = int(first.get("category") or 1), first.get("score")
        one = ObjectPrompt(Prompt(points, labels, box), category, float(score) if score else None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: no prompt: {error}") from error
    if not np.isin(labels, (0, 1)).all() or (box is None and not len(points)):
        raise ValueError(f"{place}: a prompt must have a box or points labelled 1 or 0")
    return one


def _box(corners: tuple[float, ...], place: str) -> np.ndarray:
    x0, y0, x1, y1 = corners
    if not (np.isfinite(corners).all() and x0 <= x1 and y0 <= y1):
        raise ValueError(f"{place}: a box must have x0 <= x1 and y0 <= y1, got {corners}")
    return np.array(corners, np.float64)
