"""`docs/quality.md`, written from the raw files of `quality` and `sweep`, the same bytes always."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records
from benchmarks.report import tables
from benchmarks.suites.quality import changes
from benchmarks.suites.quality.changes import Row
from benchmarks.suites.quality.variants import CHANGES, PRESETS, REFERENCE
from sparsesam_jax.config import Sparsity
from sparsesam_jax.methods import NAMES

PATTERN = "quality*.jsonl"
DENSITIES = (0.5, 0.4, 0.3)
TOLERANCE = 0.002  # of the independent implementation, mIoU
TARGETS = {0.4: 0.004, 0.3: 0.006}  # the default's loss of mIoU, at most
TOME_RATIO = 2.1  # ToMe's loss over the default's, at least


def write(results: Path, out: Path) -> None:
    """Write the document.

    Args:
        results: Folder of the raw files, `quality*.jsonl`.
        out: The document.

    Raises:
        ValueError: There is no such file, or one has no dense record.
    """
    paths = sorted(results.glob(PATTERN))
    if not paths:
        raise ValueError(f"results must hold {PATTERN}, got none in {str(results)!r}")
    out.write_text(document(paths), encoding="utf-8")


def document(paths: Sequence[Path]) -> str:
    """The document's text from raw files."""
    files = {path.name: changes.rows(records.read(path), str(path)) for path in paths}
    found = _Measured([row for rows in files.values() for row in rows])
    losses = [(r, target, found.sparsity(Sparsity(r))) for r, target in TARGETS.items()]
    rivals = [(r, found.method("sparsesam", r), found.method("tome", r)) for r in DENSITIES]
    values = {
        "most": max((row.summary for row in found.rows), key=lambda summary: summary["images"]),
        "tolerance": TOLERANCE,
        "tome_ratio": TOME_RATIO,
        "defaults": [(r, target, row.change) for r, target, row in losses if row],
        "rivals": [(r, own.change, tome.change) for r, own, tome in rivals if own and tome],
        "rows": {
            "reference": _told(_reference(found)),
            "default": _told(_default(found)),
            "ingredients": _told(
                ({"meaning": change.meaning}, found.sparsity(change.at(r)))
                for r in (0.4, 0.3)
                for change in CHANGES.values()
            ),
            "methods": _told(({"name": n}, found.method(n, r)) for r in DENSITIES for n in NAMES),
            "devices": list(_devices(found)),
        },
        "files": [
            (name, rows[0].summary, [row.values for row in sorted(rows[1:], key=_place)])
            for name, rows in files.items()
        ],
    }
    return tables.document("quality.template.md", values)


def _place(row: Row) -> tuple[float, float, str]:
    return -row.density, -row.choose, row.variant.name


class _Measured(NamedTuple):
    """Everything measured, found by what it is and not by its name."""

    rows: list[Row]

    def sparsity(self, wanted: Sparsity) -> Row | None:
        """The measurement of a sparsity, also as a method that is one."""
        plain = (row for row in self.rows if row.variant.group_update is None)
        return self._on_most_photos([row for row in plain if row.variant.kept == wanted])

    def method(self, name: str, density: float) -> Row | None:
        """The measurement of a method by name."""
        return self._on_most_photos([r for r in self.rows if r.variant.method == (name, density)])

    def _on_most_photos(self, found: Sequence[Row]) -> Row | None:
        """The one on most photos; of several, that of the last file."""
        return max(reversed(found), key=lambda row: row.summary["images"], default=None)


_Told = Iterator[tuple[dict[str, Any], Row | None]]  # what is said beside a measurement


def _told(found: Iterable[tuple[dict[str, Any], Row | None]]) -> list[dict[str, Any]]:
    """What there is."""
    return [row.values | more for more, row in found if row is not None]


def _reference(measured: _Measured) -> _Told:
    for (preset, density), expected in REFERENCE.items():
        row, meaning = measured.sparsity(PRESETS[preset].at(density)), PRESETS[preset].meaning
        agrees = row is not None and abs(row.change - expected) <= TOLERANCE
        more = {"meaning": meaning, "expected": expected, "agrees": "yes" if agrees else "**no**"}
        yield more, row


def _default(measured: _Measured) -> _Told:
    for density in DENSITIES:
        yield {"name": "`Sparsity(r)`"}, measured.sparsity(Sparsity(density))
        released = measured.sparsity(Sparsity.released(density))
        yield {"name": "`Sparsity.released(r)`"}, released


def _devices(measured: _Measured) -> Iterator[dict[str, Any]]:
    """Variants that were measured on more than one device, on the photos that all of them had."""
    found: dict[str, dict[str, Row]] = {}
    for row in measured.rows:
        sparsity, method, update = row.variant.kept, row.variant.method, row.variant.group_update
        key = repr((sparsity, None if sparsity else method, update))
        found.setdefault(key, {}).setdefault(row.summary["device"], row)
    for by_device in found.values():
        # In order, so that the sums round alike.
        photos = sorted(set.intersection(*(set(row.ious) for row in by_device.values())))
        if len(by_device) < 2 or not photos:
            continue
        means = {d: sum(row.ious[p] for p in photos) / len(photos) for d, row in by_device.items()}
        told = "; ".join(f"{device}: {mean:.4f}" for device, mean in means.items())
        apart = max(means.values()) - min(means.values())
        name = next(iter(by_device.values())).variant.name
        yield {"name": name, "photos": len(photos), "means": told, "apart": apart}
