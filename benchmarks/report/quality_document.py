"""`docs/quality.md`, written from the raw files of `quality` and `sweep`, the same bytes always."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
_RELEASED = "The released preset, against an independent implementation"


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
    measured = [row for rows in files.values() for row in rows]
    most = max((row.summary for row in measured), key=lambda summary: summary["images"])
    template = Template(TEMPLATE)

    def compared(title: str, rows: list[dict[str, Any]], verdicts: Sequence[str] = ()) -> str:
        return template.section(title, rows, verdicts=" ".join(verdicts), tolerance=TOLERANCE)

    parts = [
        template.head,
        template.section("What is measured", photos=most["images"], model=most["model"]),
        template.section("What a sparsity is made of"),
        compared(
            "The released preset, against an independent implementation", _reference(measured)
        ),
        compared("The default", _default(measured), _against_targets(measured)),
        compared("Ingredients", _ingredients(measured)),
        compared("Other methods", _methods(measured), _against_tome(measured)),
        compared("Devices", _devices(measured)),
    ]
    for file, (dense, *others) in files.items():
        others.sort(key=lambda row: (-row.density, -row.choose, row.variant.name))
        told = dense.summary | {"jax": dense.summary["versions"]["jax"], "file": file}
        parts.append(template.section("All of {file}", [row.values for row in others], **told))
    return "\n".join(parts)


def _reference(measured: Sequence[Row]) -> list[dict[str, Any]]:
    rows = []
    for (preset, density), expected in REFERENCE.items():
        row = _of(measured, PRESETS[preset].at(density))
        if row is not None:
            agrees = "yes" if abs(row.change - expected) <= TOLERANCE else "**no**"
            told = {"meaning": PRESETS[preset].meaning, "expected": expected, "agrees": agrees}
            rows.append(row.values | told)
    return rows


def _default(measured: Sequence[Row]) -> list[dict[str, Any]]:
    named = {"default": "`Sparsity(r)`", "released": "`Sparsity.released(r)`"}
    found = [
        (name, _of(measured, PRESETS[preset].at(density)))
        for density in DENSITIES
        for preset, name in named.items()
    ]
    return [row.values | {"name": name} for name, row in found if row is not None]


def _against_targets(measured: Sequence[Row]) -> list[str]:
    told = []
    for density, target in TARGETS.items():
        row = _of(measured, Sparsity(density))
        if row is not None:
            moved = "loses" if row.change < 0 else "gains"
            told.append(
                f"Density {density:g}: it {moved} {abs(row.change):.4f}; a loss of {target} is "
                f"allowed: {_met(-row.change <= target)}."
            )
    return told


def _ingredients(measured: Sequence[Row]) -> list[dict[str, Any]]:
    found = [
        (change.meaning, _of(measured, change.at(density)))
        for density in (0.4, 0.3)
        for change in CHANGES.values()
    ]
    return [row.values | {"meaning": meaning} for meaning, row in found if row is not None]


def _methods(measured: Sequence[Row]) -> list[dict[str, Any]]:
    found = [(name, _method(measured, name, r)) for r in DENSITIES for name in NAMES]
    return [row.values | {"name": name} for name, row in found if row is not None]


def _against_tome(measured: Sequence[Row]) -> list[str]:
    told = []
    for density in DENSITIES:
        ours, tome = (_method(measured, name, density) for name in ("sparsesam", "tome"))
        if ours is None or tome is None:
            continue
        if ours.change >= 0:
            text = f"the default loses nothing, ToMe {-tome.change:.4f}"
        else:
            ratio = tome.change / ours.change
            met = _met(ratio >= TOME_RATIO)
            text = f"ToMe loses {ratio:.1f} times as much (target {TOME_RATIO}: {met})"
        told.append(f"Density {density:g}: {text}.")
    return told


def _met(met: bool) -> str:
    return "met" if met else "**not met**"


def _devices(measured: Sequence[Row]) -> list[dict[str, Any]]:
    """Variants that were measured on more than one device, on the photos that all of them had."""
    found: dict[str, dict[str, Row]] = {}
    for row in measured:
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
    return rows


def _of(measured: Sequence[Row], wanted: Sparsity) -> Row | None:
    """The measurement of a sparsity, also as a method of that name, by what was measured."""

    def fits(row: Row) -> bool:
        return row.variant.kept == wanted and row.variant.group_update is None

    return _on_most_photos(measured, fits)


def _method(measured: Sequence[Row], name: str, density: float) -> Row | None:
    """The measurement of a method by name."""
    return _on_most_photos(measured, lambda row: row.variant.method == (name, density))


def _on_most_photos(measured: Sequence[Row], fits: Callable[[Row], bool]) -> Row | None:
    """Of the measurements that fit, the one on most photos; of the last file that has such."""
    found = [row for row in reversed(measured) if fits(row)]
    return max(found, key=lambda row: row.summary["images"], default=None)
