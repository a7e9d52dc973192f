"""What a sweep measured, as a table: choose on one half of the photos, confirm on the other."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.records import Record
from benchmarks.suites.quality.variants import DENSE
from sparsesam_jax.evaluation.metrics import bootstrap_interval

_WIDTH = 140  # a log has no width of its own


@dataclasses.dataclass(frozen=True)
class Change:
    """Mean change of IoU to dense over some photos, paired, and its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, differences: Float[np.ndarray, " images"]) -> Change:
        """The change of these differences, one a photo."""
        return cls(float(differences.mean()), *bootstrap_interval(differences))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One variant: its record, its change on all photos and the means on both halves."""

    summary: Record
    all: Change
    choose: float
    confirm: float


def choosing_half(names: Sequence[str]) -> Bool[np.ndarray, " images"]:
    """Which photos a choice is made on: the half whose names hash lowest; the rest confirms."""
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    ranked = sorted(range(len(names)), key=lambda index: digests[index])
    half = np.zeros(len(names), bool)
    half[ranked[: (len(names) + 1) // 2]] = True
    return half


def photo_ious(path: Path) -> dict[str, dict[str, float]]:
    """IoU of every photo under every variant of `quality` or `sweep`, dense included."""
    found = records.read(path)
    # `quality` names the photos once, `sweep` with every variant.
    common: Record = next(({"ids": r["ids"]} for r in found if r["kind"] == "photos"), {})
    photos = (common | r for r in found if r["kind"] == "per_photo")
    return {r["variant"]: dict(zip(r["ids"], r["iou"], strict=True)) for r in photos}


def rows(path: Path) -> list[Row]:
    """All variants of a sweep but dense, in its order.

    Raises:
        ValueError: The file holds no dense record, or variants of other photos than the dense ones.
        OSError: It cannot be read.
    """
    summaries = {r["variant"]: r for r in records.read(path) if r["kind"] == "summary"}
    if DENSE.name not in summaries:
        raise ValueError(f"{path} must hold a sweep with its dense record, got none")
    ious = photo_ious(path)
    dense = ious[DENSE.name]
    half = choosing_half(list(dense))
    result = []
    for name, summary in summaries.items():
        if name == DENSE.name:
            continue
        if list(ious[name]) != list(dense):
            raise ValueError(f"{path} must be about the same photos throughout, {name} is not")
        differences = np.subtract(list(ious[name].values()), list(dense.values()))
        result.append(
            Row(
                summary=summary,
                all=Change.of(differences),
                choose=float(differences[half].mean()),
                confirm=float(differences[~half].mean()),
            )
        )
    return result


def show(path: Path) -> None:
    """Print one table a density, the least loss on the choosing half first."""
    console = Console()
    console = Console(width=max(console.width, _WIDTH))
    found = rows(path)
    for density in sorted({_density(row) for row in found}, reverse=True):
        chosen = [row for row in found if _density(row) == density]
        chosen.sort(key=lambda row: -row.choose)
        console.print(_table(density, chosen))


def _density(row: Row) -> float:
    return row.summary["density"]


def _table(density: float, found: Sequence[Row]) -> Table:
    table = Table(
        title=f"density {density:g}: change of mIoU to dense, {found[0].summary['images']} photos",
        caption="Paired, with bootstrap 95 % intervals; agree: IoU with dense masks; features: "
        "relative difference.",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("variant", no_wrap=True)
    for column in ("GMAC", "choose", "confirm", "all", "95 %", "agree", "features"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found:
        s = row.summary
        table.add_row(
            s["variant"],
            f"{s['gmacs']:.2f}",
            f"{row.choose:+.4f}",
            f"{row.confirm:+.4f}",
            f"{row.all.mean:+.4f}",
            f"{row.all.low:+.4f} {row.all.high:+.4f}",
            f"{s['agreement']:.4f}",
            f"{s['feature_error']:.3f}",
        )
    return table
