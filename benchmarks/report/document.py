"""`docs/benchmarks.md` and its pictures, written from the raw files, the same bytes always."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.records import Record
from benchmarks.report import data, tables


def write(results: Path, out: Path) -> None:
    """Write the document, and its pictures beside it.

    Args:
        results: Folder of the raw files.
        out: The document; pictures are `<its stem>_<name>.svg`.

    Raises:
        ValueError: There is no record of any suite.
    """
    from benchmarks.report import plots

    found = data.newest(results)
    device, dtype = data.most(found, "device"), data.most(found, "dtype")
    shown = [r for r in found if r["device"] == device]
    shown = [r for r in shown if r["suite"] != "encoder" or r["dtype"] == dtype]
    pictures = plots.draw(shown, out.parent, out.stem)
    out.write_text(document(found, pictures), encoding="utf-8")


def document(found: Sequence[Record], pictures: Mapping[str, str]) -> str:
    """The document's text; `pictures` are the main device's, file names by what they show."""
    main, devices = data.most(found, "device"), {}
    for suite in data.SUITES:
        devices[suite] = {}
        for r in data.measured(found, suite):
            devices[suite].setdefault(str(r["device"]), []).append(_values(r))
    values = {
        "missing": [suite for suite, own in devices.items() if not own],
        "devices": {suite: sorted(own.items()) for suite, own in devices.items()},
        "pictures": {main: pictures},
        "encoders": _encoders,
        "decomposition": _decomposition,
        "parts": _parts,
        "fits": data.fits,
        "failures": _failures(found),
    }
    return tables.document("benchmarks.template.md", values)


def _values(r: Record) -> Record:
    """A record with what its tables show beside it."""
    peer = {"torch": "PyTorch ", "transformers": ""}.get(r["peer"], "")
    density, queued = _density(r), r.get("queued_ms")
    own = {
        "r": f"{density} {r['order']}" if r.get("order") else density,
        "name": peer + r["implementation"],
        "q1": r["q1_ms"] / r["batch"],
        "q3": r["q3_ms"] / r["batch"],
        "queued": queued / r["batch"] if queued else None,
        "commit": (r.get("commit") or "")[:7],
    }
    if "shape" in r:
        own["shape"] = " x ".join(map(str, r["shape"]))
    return r | own | (r["parts_ms"] if r["suite"] == "end-to-end" else {})


def _density(r: Record) -> str:
    return "dense" if r["density"] == 1 else f"{r['density']:g}"


def _encoders(own: Sequence[Record]) -> list[Record]:
    dtype = data.most(own, "dtype")
    named = [r if r["dtype"] == dtype else r | {"name": f"{r['name']} {r['dtype']}"} for r in own]
    return [r for r in named if r["sparse"] != "attention"]


def _decomposition(own: Sequence[Record]) -> list[Record]:
    rows = []
    for steps in data.decomposition(_of_main_dtype(own)):
        times = [r["ms_per_image"] for r in steps]
        gains = ["", *(f" ({a / b:.2f} x)" for a, b in itertools.pairwise(times))]
        told = [f"{ms:.2f}{gain}" for ms, gain in zip(times, gains, strict=True)]
        rows.append(steps[-1] | dict(zip(data.STEPS, told, strict=True)))
    return rows


def _parts(own: Sequence[Record]) -> list[Record]:
    rows = []
    for r in _of_main_dtype(own):
        if r.get("parts_ms") and r["sparse"] != "attention":
            floors = {f"floor of {name}": ms for name, ms in (r.get("floor_ms") or {}).items()}
            shares = data.parts(r) | floors
            rows.append(r | {name: ms / r["batch"] for name, ms in shares.items()})
    return rows


def _of_main_dtype(own: Sequence[Record]) -> list[Record]:
    return [r for r in own if r["dtype"] == data.most(own, "dtype")]


def _failures(found: Sequence[Record]) -> list[dict[str, str]]:
    reasons: dict[str, list[str]] = {}
    for r in found:
        if r["not_run"]:
            case = [r["suite"], r.get("op"), r.get("model"), f"B{r.get('batch')}", _density(r)]
            words = (str(word) for word in (*case, r.get("implementation")) if word)
            reasons.setdefault(r["not_run"], []).append(" ".join(words))
    return [{"why": why, "which": "; ".join(cases)} for why, cases in sorted(reasons.items())]
