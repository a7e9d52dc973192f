"""`docs/quality.md`, written from the raw files of `quality` and `sweep`, the same bytes always."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records
from benchmarks.report.tables import Template
from benchmarks.suites.quality import changes
from benchmarks.suites.quality.candidates import CHANGES, PRESETS, REFERENCE
from benchmarks.suites.quality.changes import Row
from sparsesam_jax.config import Sparsity
from sparsesam_jax.methods import NAMES

TEMPLATE = Path(__file__).with_name("quality.template.md")
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
    measured = _Measured([row for rows in files.values() for row in rows])
    most = max((row.summary for row in measured.rows), key=lambda summary: summary["images"])
    template = Template(TEMPLATE)

    def compared(title: str, rows: Sequence[Mapping[str, Any]], verdicts: Sequence[str]) -> str:
        return template.section(title, rows, verdicts=" ".join(verdicts), tolerance=TOLERANCE)

    parts = [
        template.head,
        template.section("What is measured", photos=most["images"], model=most["model"]),
        *(compared(title, *make(measured)) for title, make in _SECTIONS.items()),
    ]
    for file, (dense, *others) in files.items():
        others.sort(key=lambda row: (-row.density, -row.choose, row.variant.name))
        told = dense.summary | {"jax": dense.summary["versions"]["jax"], "file": file}
        parts.append(template.section("All of {file}", [row.values for row in others], **told))
    return "\n".join(parts)


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


_Section = tuple[list[dict[str, Any]], list[str]]  # rows of the table, and verdicts


def _told(found: Iterable[tuple[dict[str, Any], Row | None]]) -> list[dict[str, Any]]:
    """What there is, with what is said beside it."""
    return [row.values | more for more, row in found if row is not None]


def _reference(measured: _Measured) -> _Section:
    found = []
    for (preset, density), expected in REFERENCE.items():
        row = measured.sparsity(PRESETS[preset].at(density))
        agrees = row is not None and abs(row.change - expected) <= TOLERANCE
        more = {"meaning": PRESETS[preset].meaning, "expected": expected}
        found.append((more | {"agrees": "yes" if agrees else "**no**"}, row))
    return _told(found), []


def _default(measured: _Measured) -> _Section:
    named = {"`Sparsity(r)`": Sparsity, "`Sparsity.released(r)`": Sparsity.released}
    rows = _told(
        ({"name": name}, measured.sparsity(make(density)))
        for density in DENSITIES
        for name, make in named.items()
    )
    verdicts = []
    for density, target in TARGETS.items():
        if row := measured.sparsity(Sparsity(density)):
            moved = "loses" if row.change < 0 else "gains"
            verdicts.append(
                f"Density {density:g}: it {moved} {abs(row.change):.4f}; a loss of {target} is "
                f"allowed: {_met(-row.change <= target)}."
            )
    return rows, verdicts


def _ingredients(measured: _Measured) -> _Section:
    rows = _told(
        ({"meaning": change.meaning}, measured.sparsity(change.at(density)))
        for density in (0.4, 0.3)
        for change in CHANGES.values()
    )
    return rows, []


def _methods(measured: _Measured) -> _Section:
    verdicts = []
    for density in DENSITIES:
        ours, tome = (measured.method(name, density) for name in ("sparsesam", "tome"))
        if ours is None or tome is None:
            continue
        if ours.change >= 0:
            text = f"the default loses nothing, ToMe {-tome.change:.4f}"
        else:
            ratio = tome.change / ours.change
            met = _met(ratio >= TOME_RATIO)
            text = f"ToMe loses {ratio:.1f} times as much (target {TOME_RATIO}: {met})"
        verdicts.append(f"Density {density:g}: {text}.")
    found = (({"name": name}, measured.method(name, r)) for r in DENSITIES for name in NAMES)
    return _told(found), verdicts


def _met(met: bool) -> str:
    return "met" if met else "**not met**"


def _devices(measured: _Measured) -> _Section:
    """Variants that were measured on more than one device, on the photos that all of them had."""
    found: dict[str, dict[str, Row]] = {}
    for row in measured.rows:
        sparsity, method, update = row.variant.kept, row.variant.method, row.variant.group_update
        key = repr((sparsity, None if sparsity else method, update))
        found.setdefault(key, {}).setdefault(row.summary["device"], row)
    rows = []
    for by_device in found.values():
        # In order, so that the sums round alike.
        photos = sorted(set.intersection(*(set(row.ious) for row in by_device.values())))
        if len(by_device) < 2 or not photos:
            continue
        means = {d: sum(row.ious[p] for p in photos) / len(photos) for d, row in by_device.items()}
        told = "; ".join(f"{device}: {mean:.4f}" for device, mean in means.items())
        apart = max(means.values()) - min(means.values())
        name = next(iter(by_device.values())).variant.name
        rows.append({"name": name, "photos": len(photos), "means": told, "apart": apart})
    return rows, []


_SECTIONS: dict[str, Callable[[_Measured], _Section]] = {
    "The released preset, against an independent implementation": _reference,
    "The default": _default,
    "Ingredients": _ingredients,
    "Other methods": _methods,
    "Devices": _devices,
}
