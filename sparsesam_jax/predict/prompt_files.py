"""Prompts of many photos in one file: JSON, or CSV of a box or a point a row."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsesam_jax.predict.prompts import PromptLists

_NAMES = ("points", "labels", "boxes")
_BOX, _POINT = ("x0", "y0", "x1", "y1"), ("x", "y")
_COLUMNS = ("image", *_BOX, *_POINT, "label")


class PromptFile(NamedTuple):
    """Every photo's prompts.

    Attributes:
        entries: Parts of a photo's path, as many as the file gives of it, and its prompts.
    """

    entries: dict[tuple[str, ...], PromptLists]

    def find(self, photo: Path) -> PromptLists:
        """The prompts of a photo, which may be none: under its name, or the end of its path."""
        parts = photo.absolute().parts
        ends = (parts[start:] for start in range(len(parts)))  # the longest says the most
        return next((self.entries[end] for end in ends if end in self.entries), _none())


def read_prompts(path: Path) -> PromptFile:
    """Read a file of prompts.

    JSON is an object of objects, `{"photo.jpg": {"boxes": [[x0, y0, x1, y1]], "points": [[x, y]],
    "labels": [1]}}`, of which any may be left out. CSV has the columns `image`, `x0`, `y0`, `x1`,
    `y1` for a box and `x`, `y`, `label` for a point, 1 without a label. Photos are named by their
    file names, or by paths of which any beginning may be left out.

    Args:
        path: The file, which ends in .json or .csv.

    Raises:
        ValueError: It is not as said.
    """
    try:
        if path.suffix.lower() == ".csv":
            entries = _from_csv(path)
        elif path.suffix.lower() == ".json":
            entries = _from_json(json.loads(path.read_text("utf-8-sig")))
        else:
            raise ValueError("it ends in neither .json nor .csv")
        for name, prompts in entries.items():
            if prompts.num_prompts or prompts.labels:
                _named(name, prompts.check)
    except (OSError, ValueError, OverflowError, RecursionError, csv.Error) as error:
        raise ValueError(f"--prompts must be a file of prompts, got {str(path)!r}: {error}") from (
            error
        )
    return PromptFile({Path(name).parts: prompts for name, prompts in entries.items()})


def _none() -> PromptLists:
    return PromptLists([], [], [], _NAMES)


def _from_json(content: Any) -> dict[str, PromptLists]:
    if not isinstance(content, dict):
        raise ValueError("it is no object of photos")
    return {name: _named(name, _lists, entry) for name, entry in content.items()}


def _lists(entry: Any) -> PromptLists:
    if not isinstance(entry, dict):
        raise ValueError(f"it must be an object of {', '.join(_NAMES)}")
    if unknown := entry.keys() - set(_NAMES):
        raise ValueError(f"it must have {', '.join(_NAMES)} alone, got {min(unknown)!r}")
    points, labels, boxes = (entry.get(name) or [] for name in _NAMES)
    for name, rows, length in (("points", points, 2), ("boxes", boxes, 4)):
        if not isinstance(rows, list) or not all(_is_row(row, length) for row in rows):
            raise ValueError(f"{name} must be a list of lists of {length} numbers")
    if not _is_row(labels, None):
        raise ValueError("labels must be a list of numbers")
    points, boxes = ([tuple(map(float, row)) for row in rows] for rows in (points, boxes))
    return PromptLists(points, labels, boxes, _NAMES)


def _is_row(row: Any, length: int | None) -> bool:
    return (
        isinstance(row, list)
        and len(row) == (len(row) if length is None else length)
        and all(isinstance(value, int | float) for value in row)
    )


def _from_csv(path: Path) -> dict[str, PromptLists]:
    entries: dict[str, PromptLists] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        if "image" not in columns or not set(columns) <= set(_COLUMNS):
            raise ValueError(
                f"its columns must be image and some of {', '.join(_COLUMNS[1:])}, "
                f"got {', '.join(columns) or 'none'}"
            )
        for row in rows:
            entry = entries.setdefault(row["image"] or "", _none())
            _named(f"line {rows.line_num}", _add_row, entry, row)
    return entries


def _add_row(entry: PromptLists, row: Mapping[Any, Any]) -> None:
    if None in row:
        raise ValueError("it has more values than there are columns")
    for columns, rows in ((_BOX, entry.boxes), (_POINT, entry.points)):
        values = [row.get(column) or "" for column in columns]
        if any(values):
            rows.append(tuple(float(value) for value in values))
    if any(row.get(column) for column in _POINT):
        entry.labels.append(int(row.get("label") or 1))
    elif row.get("label"):
        raise ValueError("it has a label and no point")


def _named(name: str, function: Any, *args: Any) -> Any:
    """What the function returns; its error says where in the file it is."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
