"""What was measured, paired with dense: choose on one half of the photos, confirm on the other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from benchmarks.records import Record
from benchmarks.report.tables import print_table
from benchmarks.suites.quality.variants import DENSE, Variant, recorded
from sparsesam_jax.config import PRESETS as MODELS
from sparsesam_jax.evaluation.metrics import bootstrap_interval

COLUMNS = {
    "GMAC ↓": "{gmacs:.2f}",
    "change of mIoU ↑": "{change:+.4f}",
    "95 % interval": "{low:+.4f}, {high:+.4f}",
    "choose ↑": "{choose:+.4f}",
    "confirm ↑": "{confirm:+.4f}",
    "agreement ↑": "{agreement:.3f}",
    "feature error ↓": "{feature_error:.3f}",
}


class Row(NamedTuple):
    """One variant, as a file has it.

    Attributes:
        variant: What was measured.
        summary: Its record.
        ious: IoU of every photo.
        change: Mean difference of IoU to dense, paired over the photos.
        low: Lower end of its bootstrap 95 % interval.
        high: Upper end.
        choose: The change on the choosing half of the photos.
        confirm: The change on the other half.
    """

    variant: Variant
    summary: Record
    ious: dict[str, float]
    change: float
    low: float
    high: float
    choose: float
    confirm: float

    @property
    def density(self) -> float:
        """The mean of the densities that were asked for."""
        return float(np.mean(self.variant.density))

    @property
    def values(self) -> dict[str, Any]:
        """What tables show; counted work too where an older record lacks it."""
        values = self.summary | self._asdict()
        if "gmacs" not in values:
            values["gmacs"] = self.variant.gmacs(MODELS[values["model"]].image_encoder)
        return values | {"name": self.variant.name, "r": f"{self.density:g}"}


def choosing_half(names: Sequence[str]) -> Bool[np.ndarray, " images"]:
    """Which photos a choice is made on: the half whose names hash lowest; the rest confirms."""
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    ranked = sorted(range(len(names)), key=lambda index: digests[index])
    half = np.zeros(len(names), bool)
    half[ranked[: (len(names) + 1) // 2]] = True
    return half


def rows(found: Sequence[Record], source: str) -> list[Row]:
    """All variants of `quality` or `sweep`, dense first.

    Args:
        found: The records.
        source: Where they are from, for messages.

    Raises:
        ValueError: There is no dense record, or variants are of other photos than the dense ones.
    """
    summaries = {r["variant"]: r for r in found if r["kind"] == "summary"}
    if DENSE.name not in summaries:
        raise ValueError(f"{source} must hold a sweep with its dense record, got none")
    # Older files of `quality` name the photos once, others with every variant.
    common: Record = next(({"ids": r["ids"]} for r in found if r["kind"] == "photos"), {})
    photos = (common | r for r in found if r["kind"] == "per_photo")
    ious = {r["variant"]: dict(zip(r["ids"], r["iou"], strict=True)) for r in photos}
    dense = ious[DENSE.name]
    half = choosing_half(list(dense))
    result = []
    for name in sorted(summaries, key=lambda name: name != DENSE.name):
        if list(ious[name]) != list(dense):
            raise ValueError(f"{source} must be about the same photos throughout, {name} is not")
        differences = np.subtract(list(ious[name].values()), list(dense.values()))
        means = [float(differences[kept].mean()) for kept in (slice(None), half, ~half)]
        interval = bootstrap_interval(differences)
        variant = recorded(summaries[name])
        row = Row(variant, summaries[name], ious[name], means[0], *interval, *means[1:])
        result.append(row)
    return result


def show(found: Sequence[Record], source: str) -> None:
    """Print one table a density, the least loss on the choosing half first."""
    dense, *others = rows(found, source)
    columns = {"variant": "{name}", "mIoU ↑": "{miou:.4f}"} | COLUMNS
    if any("images_per_s" in row.summary for row in others):
        columns["images/s ↑"] = "{images_per_s:.1f}"
    for density in sorted({row.density for row in others}, reverse=True):
        chosen = [row for row in others if row.density == density]
        chosen.sort(key=lambda row: -row.choose)
        print_table(
            f"density {density:g}, {dense.summary['images']} photos, {dense.summary['device']}",
            columns,
            [row.values for row in (dense, *chosen)],
            "Change to dense is paired, with its bootstrap 95 % interval; agreement is IoU with "
            "dense masks, feature error the relative difference to dense features.",
        )
