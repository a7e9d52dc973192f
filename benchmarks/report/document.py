"""`docs/benchmarks.md` and its pictures, written from the raw files, the same bytes always."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.records import Record
from benchmarks.report import data, growth
from benchmarks.report.tables import Template

TEMPLATE = Path(__file__).with_name("benchmarks.template.md")


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
    shown = [
        r
        for r in found
        if r["device"] == device and (r["suite"] != "encoder" or r["dtype"] == dtype)
    ]
    pictures = plots.draw(shown, out.parent, out.stem)
    out.write_text(document(found, pictures), encoding="utf-8")


def document(found: Sequence[Record], pictures: Mapping[str, str]) -> str:
    """The document's text; `pictures` are the main device's, file names by what they show."""
    template = Template(TEMPLATE)
    not_run = [suite for suite in data.SUITES if not data.measured(found, suite)]
    missing = f"\nNot run: {', '.join(not_run)}.\n" if not_run else ""
    parts = [template.head + missing]
    for suite, sections in _SECTIONS.items():
        for device in data.devices(found, suite):
            own = [_values(r) for r in data.measured(found, suite, device)]
            values = _told(device, own)
            for name in PICTURES:
                drawn = name in pictures and device == data.most(found, "device")
                values[f"{name}_picture"] = f"![{name}]({pictures[name]})" if drawn else ""
            for title, rows_of in sections.items():
                if rows := rows_of(own):
                    parts.append(template.section(title, rows, **values))
    if rows := _not_run(found):
        parts.append(template.section("Cases that did not run", rows))
    return "\n".join(parts)


def _values(r: Record) -> Record:
    """A record with what its tables show beside it."""
    peer = {"torch": "PyTorch ", "transformers": ""}.get(r["peer"], "")
    density, queued = _density(r), r.get("queued_ms")
    return r | {
        "r": f"{density} {r['order']}" if r.get("order") else density,
        "name": peer + r["implementation"],
        "q1": r["q1_ms"] / r["batch"],
        "q3": r["q3_ms"] / r["batch"],
        "queued": queued / r["batch"] if queued else None,
    }


def _density(r: Record) -> str:
    return "dense" if r["density"] == 1 else f"{r['density']:g}"


def _encoder(own: Sequence[Record]) -> list[Record]:
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


def _ceilings(own: Sequence[Record]) -> list[Record]:
    return [r | {"shape": " x ".join(map(str, r["shape"]))} for r in own]


def _end_to_end(own: Sequence[Record]) -> list[Record]:
    return [r | r["parts_ms"] for r in own]


# The sections of every suite, and what their tables show of its records on a device.
_SECTIONS: dict[str, dict[str, Callable[[Sequence[Record]], list[Record]]]] = {
    "encoder": {
        "Image encoder": _encoder,
        "Implementation and algorithm apart": _decomposition,
        "Where the time goes": _parts,
    },
    "kernels": {"Kernels": list},
    "end-to-end": {"From an image to its masks": _end_to_end},
    "scaling": {"Scaling": growth.fits},
    "ceilings": {"Ceilings": _ceilings},
    "cpu": {"On a CPU": list},
}
PICTURES = ("encoder", "decomposition", "roofline", "scaling")


def _not_run(found: Sequence[Record]) -> list[dict[str, str]]:
    reasons: dict[str, list[str]] = {}
    for r in found:
        if r["not_run"]:
            case = [r["suite"], r.get("op"), r.get("model"), f"B{r.get('batch')}", _density(r)]
            words = (str(word) for word in (*case, r.get("implementation")) if word)
            reasons.setdefault(r["not_run"], []).append(" ".join(words))
    return [{"why": why, "which": "; ".join(cases)} for why, cases in sorted(reasons.items())]


def _told(device: str, own: Sequence[Record]) -> dict[str, str]:
    """What the template says of the records: what they are of and with what they were made."""
    told = [device, *(f"driver {driver}" for driver in _names(r.get("driver") for r in own))]
    for package in ("jax", "torch", "transformers"):
        versions = _names(r["versions"].get(package) for r in own)
        told += [f"{package} {' and '.join(versions)}"] if versions else []
    commits = _names((r.get("commit") or "")[:7] for r in own)
    told += [f"commit {' and '.join(commits)}"] if commits else []
    files = [f"[{file}](../benchmarks/results/{file})" for file in _names(r["file"] for r in own)]
    what = {r["implementation"]: r["what"] for r in own if r.get("what")}
    alone = any("copies" not in r for r in own if r["peer"] == "sparsesam_jax")
    return {
        "provenance": f"{', '.join(told)}; {', '.join(files)}.",
        "what": "\n".join(f"- *{name}*: {text}." for name, text in sorted(what.items())),
        "threads": ", ".join(_names(r.get("threads") for r in own)),
        "launched": "Ours are launched one behind the other, which at batch 1 waits for the host. "
        "PyTorch's are one CUDA graph."
        if alone
        else "Several runs are one CUDA graph.",
    }


def _names(values: Iterable[object]) -> list[str]:
    """What there is, once, in order."""
    return sorted({str(value) for value in values if value})
