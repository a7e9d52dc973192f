"""`docs/quality.md`, written from the raw files of `quality` and `sweep`, the same bytes always."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records
from benchmarks.records import Record
from benchmarks.suites.quality.changes import Change, Row, photo_ious, rows
from benchmarks.suites.quality.variants import DENSE, PRESETS, Variant, recorded_sparsity
from sparsesam_jax.config import PRESETS as MODELS
from sparsesam_jax.config import Sparsity
from sparsesam_jax.methods import NAMES, as_sparsity

PATTERN = "quality*.jsonl"
DENSITIES = (0.5, 0.4, 0.3)
TOLERANCE = 0.002  # of the reference below, mIoU

# Change of mIoU by an independent PyTorch implementation on the same 200 photos, float32.
REFERENCE: dict[tuple[str, float], float] = {
    ("released", 0.5): -0.0105,
    ("released", 0.4): -0.0080,
    ("released", 0.3): -0.0120,
    ("attention-only", 0.4): 0.0053,
    ("attention-only", 0.3): 0.0050,
    ("mlp-only", 0.4): -0.0122,
    ("mlp-only", 0.3): -0.0145,
    ("sobel-input", 0.4): -0.0064,
    ("sobel-input", 0.3): -0.0123,
    ("dispersion-input", 0.4): -0.0110,
    ("dispersion-input", 0.3): -0.0151,
    ("unranked", 0.4): -0.0182,
    ("unranked", 0.3): -0.0179,
    ("random", 0.4): -0.0208,
    ("random", 0.3): -0.0234,
}
# The default with one ingredient changed.
INGREDIENTS: dict[str, dict[str, Any]] = {
    "nothing: the default": {},
    'density r in every block (`split="equal"`)': {"split": "equal"},
    "score looks at the block's input": {"features": "input"},
    "dispersion instead of Sobel": {"importance": "dispersion"},
    "dispersion, every head by itself": {"importance": "dispersion", "per_head": True},
    "whole key blocks are ranked": {"ranking": "block"},
    "Hilbert curve": {"curve": "hilbert"},
    "raster order": {"curve": "raster"},
    "groups kept together": {"layout": "contiguous"},
    "MLP routed from block 6 on": {"mlp_start": 6},
    "attention is not ranked": {"ranking": "none"},
    "attention is not ranked, its bar spread over the image": {"ranking": "spread"},
}
TARGETS = {0.4: 0.004, 0.3: 0.006}  # the default's loss of mIoU, at most
TOME_RATIO = 2.1  # ToMe's loss over the default's, at least

_HEAD = """# What sparsity costs

Written by `python -m benchmarks quality-doc` from the raw files in
[benchmarks/results](../benchmarks/results); a test writes it again and compares every byte.

One mask a box, SAM's protocol, boxes from the ground truth, {photos} photos that `{model}` never
saw. They are no published benchmark: compare the rows with each other, not with a paper. Change is
the difference of mIoU to the dense encoder with the same weights, paired over the photos, with its
bootstrap 95 % interval. *Choose* and *confirm* are the changes on two halves of the photos (by a
hash of their names): what is chosen on the first must hold on the second. Agreement is the IoU with
the dense masks, features the relative difference to the dense features, GMAC the encoder's 10^9
multiply-accumulates an image, counted from shapes, what a method itself adds included. Sweeps run
programs that compute everything and mask what a sparsity skips: the same masks, but no speed.
"""


class Measured(NamedTuple):
    """A variant and the file that it was measured in."""

    file: str
    row: Row

    @property
    def summary(self) -> Record:
        """Its record."""
        return self.row.summary


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
    measured = [Measured(path.name, row) for path in paths for row in rows(path)]
    dense = {path.name: _dense(path) for path in paths}
    first = next(iter(dense.values()))
    parts = [
        _HEAD.format(photos=first["images"], model=first["model"]),
        _reference(measured),
        _default(measured),
        _ingredients(measured),
        _methods(measured),
        _devices(paths),
        *(_everything(path.name, measured, dense[path.name]) for path in paths),
    ]
    return "\n".join(part for part in parts if part)


def _dense(path: Path) -> Record:
    found = records.read(path)
    return next(r for r in found if r["kind"] == "summary" and r["variant"] == DENSE.name)


def _reference(measured: Sequence[Measured]) -> str:
    lines = []
    for (preset, density), expected in REFERENCE.items():
        found = _preset(measured, preset, density)
        if found is not None:
            change = found.row.all.mean
            error = change - expected
            verdict = "yes" if abs(error) <= TOLERANCE else "**no**"
            name = PRESETS[preset][0]
            lines.append([name, f"{density:g}", f"{expected:+.4f}", f"{change:+.4f}", verdict])
    return _section(
        "The released preset, against an independent implementation",
        f"An implementation in PyTorch of the same algorithm, on the same photos; the rows must "
        f"agree within {TOLERANCE}.",
        ["sparsity", "density", "reference", "here", "agrees"],
        lines,
    )


def _default(measured: Sequence[Measured]) -> str:
    lines, verdicts = [], []
    for density in DENSITIES:
        for preset, name in (("default", "`Sparsity(r)`"), ("released", "`Sparsity.released(r)`")):
            found = _preset(measured, preset, density)
            if found is None:
                continue
            lines.append([name, f"{density:g}", *_cells(found.row)])
            if preset == "default" and density in TARGETS:
                loss, target = -found.row.all.mean, TARGETS[density]
                met = "met" if loss <= target else "**not met**"
                verdicts.append(
                    f"Density {density:g}: loss {loss:.4f}, target at most {target}: {met}."
                )
    text = "The default beside the released preset. " + " ".join(verdicts)
    return _section("The default", text.strip(), ["sparsity", "density", *_COLUMNS], lines)


def _ingredients(measured: Sequence[Measured]) -> str:
    lines = []
    for density in (0.4, 0.3):
        for name, fields in INGREDIENTS.items():
            found = _measured(measured, Sparsity(density, **fields))
            if found is not None:
                images = str(found.summary["images"])
                lines.append([name, f"{density:g}", images, *_cells(found.row)])
    text = (
        "The default with one thing changed, at the work of the released preset with the same "
        "start of routing. What was measured on fewer photos belongs beside the default on those, "
        "see Devices."
    )
    return _section("Ingredients", text, ["changed", "density", "photos", *_COLUMNS], lines)


def _methods(measured: Sequence[Measured]) -> str:
    lines, verdicts = [], []
    for density in DENSITIES:
        found = {}
        for name in NAMES:
            one = _method(measured, name, density)
            if one is not None:
                found[name] = one.row
                lines.append([name, f"{density:g}", *_cells(one.row)])
        if {"sparsesam", "tome"} <= found.keys():
            verdicts.append(_against_tome(density, found["sparsesam"].all, found["tome"].all))
    text = (
        "Each a training-free change of the same encoder and weights, see "
        "[sparsesam_jax/methods](../sparsesam_jax/methods). ToMe and PiToMe keep half of the "
        "tokens at least, so they do the same at 0.5 and below. " + " ".join(verdicts)
    )
    return _section("Other methods", text.strip(), ["method", "density", *_COLUMNS], lines)


def _against_tome(density: float, ours: Change, tome: Change) -> str:
    if ours.mean >= 0:
        return f"Density {density:g}: the default loses nothing, ToMe {-tome.mean:.4f}."
    ratio = tome.mean / ours.mean
    met = "met" if ratio >= TOME_RATIO else "**not met**"
    return (
        f"Density {density:g}: ToMe loses {ratio:.1f} times as much (target {TOME_RATIO}: {met})."
    )


def _devices(paths: Sequence[Path]) -> str:
    """Variants that were measured on more than one device, on the photos that all of them had."""
    found: dict[str, dict[str, tuple[str, dict[str, float]]]] = {}
    for path in paths:
        ious = photo_ious(path)
        for summary in (r for r in records.read(path) if r["kind"] == "summary"):
            key = json.dumps(_definition(summary), sort_keys=True)
            by_device = found.setdefault(key, {})
            by_device.setdefault(summary["device"], (summary["variant"], ious[summary["variant"]]))
    lines = []
    for by_device in found.values():
        photos = set.intersection(*(set(ious) for _, ious in by_device.values()))
        if len(by_device) < 2 or not photos:
            continue
        ordered = sorted(photos)  # so that the sums round alike whatever the order of the set
        means = {
            d: sum(ious[p] for p in ordered) / len(ordered) for d, (_, ious) in by_device.items()
        }
        lines.append(
            [
                next(iter(by_device.values()))[0],
                str(len(photos)),
                "; ".join(f"{device}: {mean:.4f}" for device, mean in means.items()),
                f"{max(means.values()) - min(means.values()):.5f}",
            ]
        )
    if not lines:
        return ""
    text = "The same variant on several devices, on the photos that all of them were given."
    return _section("Devices", text, ["variant", "photos", "mIoU", "apart"], lines)


def _definition(summary: Record) -> dict[str, Any]:
    """What a record is about, whatever it is called."""
    sparsity = _kept(summary)
    kept = None if sparsity is None else dataclasses.asdict(sparsity)
    method = summary.get("method") if sparsity is None else None
    return {"sparsity": kept, "method": method, "group_update": summary.get("group_update")}


def _everything(file: str, measured: Sequence[Measured], dense: Record) -> str:
    own = [one.row for one in measured if one.file == file]
    own.sort(key=lambda row: (-_mean_density(row), -row.choose, row.summary["variant"]))
    lines = [[row.summary["variant"], f"{_mean_density(row):g}", *_cells(row)] for row in own]
    versions = dense["versions"]
    text = (
        f"[{file}](../benchmarks/results/{file}): {dense['device']}, {dense['dtype']}, jax "
        f"{versions['jax']}, {dense['images']} photos; dense mIoU {dense['miou']:.4f}. Best on the "
        f"choosing half first."
    )
    return _section(f"All of {file}", text, ["variant", "density", *_COLUMNS], lines)


_COLUMNS = ("GMAC", "change", "95 %", "choose", "confirm", "agreement", "features")


def _cells(row: Row) -> list[str]:
    summary = row.summary
    return [
        f"{_gmacs(summary):.2f}",
        f"{row.all.mean:+.4f}",
        f"{row.all.low:+.4f}, {row.all.high:+.4f}",
        f"{row.choose:+.4f}",
        f"{row.confirm:+.4f}",
        f"{summary['agreement']:.3f}",
        f"{summary['feature_error']:.3f}",
    ]


def _gmacs(summary: Record) -> float:
    """Counted work; older records lack it, but say what was measured."""
    if "gmacs" in summary:
        return summary["gmacs"]
    config = MODELS[summary["model"]].image_encoder
    return Variant(summary["variant"], _sparsity(summary)).gmacs(config)


def _sparsity(summary: Record) -> Sparsity | None:
    fields: dict[str, Any] | None = summary["sparsity"]
    return None if fields is None else recorded_sparsity(fields)


def _kept(summary: Record) -> Sparsity | None:
    """The sparsity, also of a method that is one."""
    method = summary.get("method")
    return _sparsity(summary) if method is None else as_sparsity(*method)


def _mean_density(row: Row) -> float:
    density = row.summary["density"]
    return sum(density) / len(density) if isinstance(density, list) else density


def _preset(measured: Sequence[Measured], preset: str, density: float) -> Measured | None:
    """The latest measurement of a preset, by what was measured and not by its name."""
    return _measured(measured, PRESETS[preset][1](density))


def _measured(measured: Sequence[Measured], wanted: Sparsity) -> Measured | None:
    """The measurement of a sparsity on most photos, also as a method of that name."""
    found = (one for one in reversed(measured) if _kept(one.summary) == wanted)
    plain = (one for one in found if one.summary.get("group_update") is None)
    return max(plain, key=lambda one: one.summary["images"], default=None)


def _method(measured: Sequence[Measured], name: str, density: float) -> Measured | None:
    """The latest measurement of a method by name."""
    return next(_named(measured, name, density), None)


def _named(measured: Sequence[Measured], name: str, density: float) -> Iterator[Measured]:
    for one in reversed(measured):
        if one.summary.get("method") == [name, density]:
            yield one


def _section(title: str, text: str, columns: Sequence[str], lines: Sequence[list[str]]) -> str:
    """A section with a table; one without lines says that nothing is measured."""
    if not lines:
        return f"## {title}\n\nNot measured.\n"
    table = [list(columns), ["---"] * len(columns), *lines]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return f"## {title}\n\n{text}\n\n{body}\n"
