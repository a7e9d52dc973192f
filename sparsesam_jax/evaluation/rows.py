"""Per-image results on disk: a CSV that a killed run leaves usable."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsesam_jax.checkpoints.atomic import atomic_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One image with one method at one density.

    Attributes:
        method: `dense` or a method's name.
        density: What it keeps.
        prompts: Kind of prompt.
        protocol: Name of the protocol.
        image: The image's stem.
        iou: Of the mask with the ground truth.
        boundary_iou: Likewise, of their boundaries.
        agreement: IoU of the mask with the dense encoder's.
        feature_error: `||F - F_dense|| / ||F_dense||`.
        seconds: Of prediction, the batch's time shared by its images.
        compiled: Whether that time includes compilation.
    """

    method: str
    density: float
    prompts: str
    protocol: str
    image: str
    iou: float
    boundary_iou: float
    agreement: float
    feature_error: float
    seconds: float
    compiled: bool

    @property
    def key(self) -> tuple[str, float, str]:
        """What tells rows of one run apart."""
        return (self.method, self.density, self.image)


_FIELDS = tuple(field.name for field in dataclasses.fields(Row))
_NUMBERS = ("density", "iou", "boundary_iou", "agreement", "feature_error", "seconds")


class RowFile:
    """The rows of a run, in memory and on disk, in the order in which they were measured.

    Args:
        path: The CSV.
        resume: Whether to keep what it holds. A last line that was cut is dropped.

    Raises:
        ValueError: The file holds something else.
    """

    def __init__(self, path: Path, *, resume: bool):
        self.path = path
        self.rows: dict[tuple[str, float, str], Row] = {}
        if resume and path.exists():
            self.rows = {row.key: row for row in _read(path)}
        with atomic_path(path) as temporary:
            temporary.write_text(_text([], header=True) + _text(self.rows.values()), "utf-8")

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows in one write; those that are there already stay as they are."""
        new = {row.key: row for row in rows if row.key not in self.rows}
        self.rows |= new
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(_text(new.values()))


def _text(rows: Iterable[Row], *, header: bool = False) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if header:
        writer.writerow(_FIELDS)
    for row in rows:
        values = dataclasses.asdict(row) | {"compiled": int(row.compiled)}
        writer.writerow(values.values())  # floats by their shortest exact text
    return buffer.getvalue()


def _read(path: Path) -> list[Row]:
    text = path.read_text("utf-8")
    lines = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(lines))
    if tuple(reader.fieldnames or ()) != _FIELDS:
        raise ValueError(f"{path} must have the columns {', '.join(_FIELDS)}")
    rows = []
    for values in reader:
        try:
            numbers = {name: float(values[name]) for name in _NUMBERS}
            typed: dict[str, Any] = {**values, **numbers, "compiled": values["compiled"] == "1"}
            rows.append(Row(**typed))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: no row of a run: {error}") from error
    return rows
