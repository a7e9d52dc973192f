"""`docs/benchmarks.md` and its pictures, written from the raw files, the same bytes always."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import Record
from benchmarks.report import data, growth
from benchmarks.report.tables import number

_HEAD = """# Benchmarks

Written by `python -m benchmarks report` from the raw files in
[benchmarks/results](../benchmarks/results), the newest record of every case; a test writes it again
and compares every byte. Weights are random and the same for all, images are random; outputs are
compared with float32 XLA before anything is timed, and what disagrees is not timed. Every case runs
in a process of its own; times are medians of 20 runs (or as many as is said) after warm-up, on the
host's clock and until the result is there; compilation is apart. MiB is the framework's own peak
allocation, weights included. TFLOP/s count what the algorithm needs. *Of ceiling* is the time that
the same products and the same attention would take at the rates that XLA's plain products and
cuDNN's attention without bias reached in the same run, over the time measured. *Queued* is with
every call launched before the one before it has ended.
"""
_COLUMNS = ("ms an image", "quartiles", "queued", "MiB", "TFLOP/s", "of ceiling", "error")


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
    device = data.main_device(found)
    dtype = data.main_dtype(found)
    shown = [
        r
        for r in found
        if r["device"] == device and (r["suite"] != "encoder" or r["dtype"] == dtype)
    ]
    pictures = plots.draw(shown, out.parent, out.stem)
    out.write_text(document(found, pictures), encoding="utf-8")


def document(found: Sequence[Record], pictures: dict[str, str]) -> str:
    """The document's text; `pictures` are the main device's, file names by section."""
    parts, main = [_HEAD, _missing(found)], data.main_device(found)
    for device in data.devices(found, "encoder"):
        own = data.measured(found, "encoder", device)
        shown = pictures if device == main else {}
        parts.append(_encoder(device, own, shown))
        own = [r for r in own if r["dtype"] == data.main_dtype(own)]
        parts.append(_decomposition(own, shown))
        parts.append(_parts(own, shown))
    for device in data.devices(found, "kernels"):
        parts.append(_kernels(device, data.measured(found, "kernels", device)))
    for device in data.devices(found, "end-to-end"):
        parts.append(_end_to_end(device, data.measured(found, "end-to-end", device)))
    for device in data.devices(found, "scaling"):
        shown = pictures if device == main else {}
        parts.append(_scaling(device, data.measured(found, "scaling", device), shown))
    for device in data.devices(found, "ceilings"):
        parts.append(_ceilings(device, data.measured(found, "ceilings", device)))
    for device in data.devices(found, "cpu"):
        parts.append(_cpu(device, data.measured(found, "cpu", device)))
    parts.append(_not_run(found))
    return "\n".join(part for part in parts if part)


def _missing(found: Sequence[Record]) -> str:
    suites = [name for name in data.SUITES if not data.measured(found, name)]
    return f"Not run: {', '.join(suites)}.\n" if suites else ""


def _encoder(device: str, own: Sequence[Record], pictures: dict[str, str]) -> str:
    dtype, lines = data.main_dtype(own), []
    for r in own:
        if r["sparse"] != "attention":
            name = _name(r) if r["dtype"] == dtype else f"{_name(r)} {r['dtype']}"
            lines.append([r["model"], f"{r['batch']}", _density(r), name, *_cells(r)])
    text = f"{_provenance(device, own)} Error: relative, Frobenius.{_what(own)}"
    columns = ["model", "batch", "density", "implementation", *_COLUMNS]
    return section("Image encoder", text, columns, lines, pictures.get("encoder"))


def _decomposition(own: Sequence[Record], pictures: dict[str, str]) -> str:
    lines = []
    for last, steps in data.decomposition(own):
        cells = [last["model"], f"{last['batch']}", f"{last['density']:g}"]
        for index, (_, r) in enumerate(steps):
            before = steps[index - 1][1]["ms_per_image"] if index else None
            gain = f" ({before / r['ms_per_image']:.2f} x)" if before else ""
            cells.append(f"{r['ms_per_image']:.2f}{gain}")
        lines.append(cells)
    names = ["dense, XLA", "dense, kernels", "sparse attention", "attention and MLP"]
    return section(
        "Implementation and algorithm apart",
        "ms an image, and how many times faster than the step before.",
        ["model", "batch", "density", *names],
        lines,
        pictures.get("decomposition"),
    )


def _parts(own: Sequence[Record], pictures: dict[str, str]) -> str:
    lines = []
    for r in _profiled(own):
        found = data.parts(r)
        floor = r.get("floor_ms") or {}
        cells = [r["model"], f"{r['batch']}", _density(r), r["implementation"]]
        cells += [f"{ms / r['batch']:.3f}" for ms in found.values()]
        cells += [
            number(floor[name] / r["batch"] if name in floor else None, ".3f")
            for name in ("products", "attention")
        ]
        lines.append(cells)
    names = [*data.PARTS, data.OTHER]
    return section(
        "Where the time goes",
        "ms an image of GPU kernels by the profiler, and the floors of products and attention.",
        ["model", "batch", "density", "implementation", *names, "products' floor", "attention's"],
        lines,
        pictures.get("roofline"),
    )


def _profiled(own: Sequence[Record]) -> list[Record]:
    return [r for r in own if r.get("parts_ms") and r["sparse"] != "attention"]


def _kernels(device: str, own: Sequence[Record]) -> str:
    lines = [
        [
            r["op"],
            r["model"],
            f"{r['batch']}",
            _density(r) + (f" {r['order']}" if r.get("order") else ""),
            _name(r),
            f"{r['median_ms']:.3f}",
            f"{r['q1_ms']:.3f} to {r['q3_ms']:.3f}",
            number(r.get("tflops"), ".0f"),
            _share(r),
            number(r.get("max_error"), ".1e"),
        ]
        for r in own
    ]
    columns = ["function", "model", "batch", "density", "implementation", "ms", "quartiles"]
    alone = any("copies" not in r for r in own if r["peer"] == "sparsesam_jax")
    launched = (
        "Ours are launched one behind the other, which at batch 1 waits for the host, PyTorch's "
        "are one CUDA graph."
        if alone
        else "Several runs are one CUDA graph."
    )
    text = (
        f"{_provenance(device, own)} From packed QKV (or the residual stream) to the same, with "
        f"position bias, LayerNorm and residual. {launched}"
    )
    return section("Kernels", text, [*columns, "TFLOP/s", "of ceiling", "error"], lines)


def _end_to_end(device: str, own: Sequence[Record]) -> str:
    lines = [
        [
            r["model"],
            _density(r),
            r["implementation"],
            f"{r['prompts']}",
            f"{r['median_ms']:.1f}",
            f"{r['q1_ms']:.1f} to {r['q3_ms']:.1f}",
            *(f"{ms:.1f}" for ms in r["parts_ms"].values()),
            number(r.get("max_error"), ".1e"),
        ]
        for r in own
    ]
    columns = ["model", "density", "implementation", "prompts", "ms", "quartiles"]
    parts = ["preprocess", "encoder", "decoder", "upscale"]
    text = (
        f"{_provenance(device, own)} `set_image` and `predict` of one image; three masks a prompt. "
        "*preprocess* and *upscale* run on the host where nothing else is said; *encoder* is what "
        f"remains of `set_image`.{_what(own)}"
    )
    return section("From an image to its masks", text, [*columns, *parts, "error"], lines)


def _scaling(device: str, own: Sequence[Record], pictures: dict[str, str]) -> str:
    lines = [
        [
            f"{fit['axis']}".replace("_", " "),
            f"{fit['model']}",
            f"{fit['implementation']}",
            f"{fit['density']}",
            f"{fit['points']}",
            *(
                number(fit[name], ".2f")  # type: ignore[arg-type]
                for name in ("time", "expected_time", "memory", "expected_memory")
            ),
        ]
        for fit in growth.fits(own)
    ]
    columns = ["against", "model", "implementation", "density", "points"]
    powers = ["time", "expected", "memory", "expected"]
    text = (
        f"{_provenance(device, own)} Exponents of power laws fitted to all points. Expected of "
        "time is that of the counted multiply-accumulates; memory is XLA's temporary buffers, "
        "without weights."
    )
    return section("Scaling", text, [*columns, *powers], lines, pictures.get("scaling"))


def _ceilings(device: str, own: Sequence[Record]) -> str:
    lines = [
        [
            r["model"],
            f"{r['batch']}",
            r["implementation"],
            " x ".join(map(str, r["shape"])),
            f"{r['median_ms']:.3f}",
            f"{r['tflops']:.0f} TFLOP/s" if r.get("tflops") else f"{r['tbs']:.2f} TB/s",
        ]
        for r in own
    ]
    columns = ["model", "batch", "what", "shape", "ms", "rate"]
    text = f"{_provenance(device, own)} XLA's plain products, attention without bias, a copy."
    return section("Ceilings", text, columns, lines)


def _cpu(device: str, own: Sequence[Record]) -> str:
    lines = [
        [
            r["model"],
            f"{r['batch']}",
            _density(r),
            _name(r),
            f"{r['median_ms']:.0f}",
            f"{r['q1_ms']:.0f} to {r['q3_ms']:.0f}",
            f"{r['runs']}",
            number(r.get("peak_mib"), ".0f"),
            number(r.get("max_error"), ".0e"),
        ]
        for r in own
    ]
    columns = ["model", "batch", "density", "implementation", "ms", "quartiles", "runs", "MiB"]
    threads = ", ".join(sorted({str(r["threads"]) for r in own}))
    text = (
        f"{_provenance(device, own)} float32, {threads} threads; MiB is the whole process. "
        "Error: of the largest feature, dense beside PyTorch, sparse beside our dense, which is "
        "what sparsity does to random weights."
    )
    return section("On a CPU", text, [*columns, "error"], lines)


def _not_run(found: Sequence[Record]) -> str:
    reasons: dict[str, list[str]] = {}
    for r in found:
        if r["not_run"]:
            case = [r["suite"], r.get("op"), r.get("model"), f"B{r.get('batch')}", _density(r)]
            words = (str(word) for word in (*case, r.get("implementation")) if word)
            reasons.setdefault(r["not_run"], []).append(" ".join(words))
    lines = [[reason, "; ".join(cases)] for reason, cases in sorted(reasons.items())]
    return section("Cases that did not run", "", ["why", "which"], lines) if lines else ""


def _name(r: Record) -> str:
    peer = {"torch": "PyTorch ", "transformers": ""}.get(r["peer"], "")
    return peer + r["implementation"]


def _density(r: Record) -> str:
    return "dense" if r["density"] == 1 else f"{r['density']:g}"


def _cells(r: Record) -> list[str]:
    images = r["batch"]
    return [
        f"{r['ms_per_image']:.2f}",
        f"{r['q1_ms'] / images:.2f} to {r['q3_ms'] / images:.2f}",
        number(r["queued_ms"] / images if r.get("queued_ms") else None, ".2f"),
        number(r.get("peak_mib"), ".0f"),
        number(r.get("tflops"), ".0f"),
        _share(r),
        number(r.get("max_error"), ".1e"),
    ]


def _what(own: Sequence[Record]) -> str:
    what = {r["implementation"]: r["what"] for r in own if r.get("what")}
    told = "; ".join(f"*{name}*: {text}" for name, text in sorted(what.items()))
    return f" What is run: {told}." if told else ""


def _share(r: Record) -> str:
    share = r.get("share_of_ceiling")
    return "-" if share is None else f"{share:.0%}"


def _provenance(device: str, own: Sequence[Record]) -> str:
    """Device, driver, versions, commits and files of some records."""
    drivers = sorted({r["driver"] for r in own if r.get("driver")})
    versions: dict[str, set[str]] = {}
    for r in own:
        for name in ("jax", "torch", "transformers"):
            if name in r["versions"]:
                versions.setdefault(name, set()).add(r["versions"][name])
    commits = sorted({r["commit"][:7] for r in own if r.get("commit")})
    files = sorted({r["file"] for r in own})
    told = [device, *(f"driver {driver}" for driver in drivers)]
    told += [f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()]
    told += [f"commit {' and '.join(commits)}"] if commits else []
    links = ", ".join(f"[{name}](../benchmarks/results/{name})" for name in files)
    return f"{', '.join(told)}; {links}."


def section(
    title: str,
    text: str,
    columns: Sequence[str],
    lines: Sequence[Sequence[str]],
    picture: str | None = None,
) -> str:
    """A section with a table; nothing without lines."""
    if not lines:
        return ""
    table = [columns, ["---"] * len(columns), *lines]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    image = f"![{title}]({picture})\n\n" if picture else ""
    told = f"{text}\n\n" if text else ""
    return f"## {title}\n\n{told}{image}{body}\n"
