"""Per-image results of `sparsesam evaluate`."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

from sparsesam_jax.evaluation.results_file import ResultsFile


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


_FIELDS = tuple(field.name for field in dataclasses.fields(Row))
_NUMBERS = ("density", "iou", "boundary_iou", "agreement", "feature_error", "seconds")


class RowFile(ResultsFile[Row]):
    """The rows of a run as a CSV."""

    header = ",".join(_FIELDS) + "\n"

    def key(self, result: Row) -> tuple[str, float, str]:
        """Method, density and image."""
        return (result.method, result.density, result.image)

    def line(self, result: Row) -> str:
        """The row, floats by their shortest exact text."""
        buffer = io.StringIO()
        values = dataclasses.asdict(result) | {"compiled": int(result.compiled)}
        csv.writer(buffer, lineterminator="\n").writerow(values.values())
        return buffer.getvalue()

    def read(self, text: str) -> Iterator[Row]:
        """The rows below the header."""
        reader = csv.DictReader(io.StringIO(text))
        if tuple(reader.fieldnames or ()) != _FIELDS:
            raise ValueError(f"{self.path} must have the columns {', '.join(_FIELDS)}")
        for values in reader:
            try:
                numbers = {name: float(values[name]) for name in _NUMBERS}
                typed: dict[str, Any] = {**values, **numbers, "compiled": values["compiled"] == "1"}
                yield Row(**typed)
            except (TypeError, ValueError) as error:
                place = f"{self.path}, line {reader.line_num}"
                raise ValueError(f"{place}: no row of a run: {error}") from error
