"""`docs/quality.md`, written from the raw files of `quality` and `sweep`, the same bytes always."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.report.tables import filled, markdown
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

_FILE = """
## All of {file}

[{file}](../benchmarks/results/{file}): {device}, {dtype}, jax {jax}, {photos}; dense mIoU {miou}.
Best on the choosing half first.

{table}
"""
_CASE = {"density r": "{r}", "photos": "{images}"}
_RATED = _CASE | changes.COLUMNS


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
    return filled(
        TEMPLATE.read_text(encoding="utf-8"),
        photos=f"{most['images']} photos",
        model=most["model"],
        tolerance=TOLERANCE,
        reference=_table(
            {"sparsity": "{meaning}"}
            | _CASE
            | {"reference ↑": "{expected:+.4f}", "here ↑": "{change:+.4f}", "agrees": "{agrees}"},
            _reference(measured),
        ),
        default=_table({"sparsity": "{name}"} | _RATED, _default(measured)),
        default_verdicts=" ".join(_against_targets(measured)),
        ingredients=_table({"changed": "{meaning}"} | _RATED, _ingredients(measured)),
        methods=_table({"method": "{name}"} | _RATED, _methods(measured)),
        method_verdicts=" ".join(_against_tome(measured)),
        devices=_table(
            {
                "variant": "{name}",
                "photos": "{photos}",
                "mIoU ↑": "{means}",
                "apart ↓": "{apart:.5f}",
            },
            _devices(measured),
        ),
    ) + "".join(_everything(file, rows) for file, rows in files.items())


def _table(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> str:
    return markdown(columns, rows) or "Not measured."


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


def _everything(file: str, found: Sequence[Row]) -> str:
    dense = found[0].summary
    rows = sorted(found[1:], key=lambda row: (-row.density, -row.choose, row.variant.name))
    columns = {"variant": "{name}", "density r": "{r}"} | changes.COLUMNS
    return _FILE.format(
        file=file,
        device=dense["device"],
        dtype=dense["dtype"],
        jax=dense["versions"]["jax"],
        photos=f"{dense['images']} photos",
        miou=f"{dense['miou']:.4f}",
        table=_table(columns, [row.values for row in rows]),
    )


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
