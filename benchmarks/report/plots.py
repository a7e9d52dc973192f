"""The report's pictures, SVG, the same bytes for the same records and matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.peers import PEERS
from benchmarks.records import Record
from benchmarks.report import data

_STYLE: Any = {"svg.hashsalt": "sparsesam_jax", "svg.fonttype": "path", "font.size": 9}
_COLOURS = {name: f"C{index}" for index, name in enumerate(PEERS)}
_SHOWN = (1.0, 0.3)  # densities of the roofline
_HASHED_ID = re.compile(r"\b[hmp][0-9a-f]{10}\b")  # of hatches, markers and clip paths


def draw(found: Sequence[Record], folder: Path, stem: str) -> dict[str, str]:
    """Draw what there are records for; file names by section.

    Args:
        found: The newest records.
        folder: Where the pictures go.
        stem: What their names begin with.
    """
    encoder, scaling = (data.measured(found, name) for name in ("encoder", "scaling"))
    drawings: dict[str, tuple[Callable[[Sequence[Record]], Any], Sequence[Record]]] = {
        "encoder": (_encoder, [r for r in encoder if r["sparse"] != "attention"]),
        "decomposition": (_decomposition, encoder),
        "roofline": (_roofline, encoder),
        "scaling": (_scaling, scaling),
    }
    pictures = {}
    with matplotlib.rc_context(_STYLE):
        for name, (draw_figure, records) in drawings.items():
            figure = draw_figure(records)
            if figure is None:
                continue
            pictures[name] = f"{stem}_{name}.svg"
            drawn = io.StringIO()
            # A date would make every drawing another file.
            figure.savefig(drawn, format="svg", metadata={"Date": None})
            plt.close(figure)
            (folder / pictures[name]).write_text(_numbered(drawn.getvalue()), encoding="utf-8")
    return pictures


def _numbered(svg: str) -> str:
    """The picture with ids in order of appearance.

    Matplotlib writes coordinates to six digits, but its ids are hashes of all digits. The last one
    of a logarithm depends on the vector instructions of the processor, and so would the ids.
    """
    found = dict.fromkeys(_HASHED_ID.findall(svg))
    names = {name: f"{name[0]}{number}" for number, name in enumerate(found)}
    return _HASHED_ID.sub(lambda match: names[match.group()], svg)


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    size = (width * columns + 1, height)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _encoder(own: Sequence[Record]) -> Any:
    """Time and memory by density; peers that are dense only are one point."""
    panels = list(dict.fromkeys((r["model"], r["batch"]) for r in own))
    if not panels:
        return None
    figure, axes = _panels(2, len(panels), 2.6, 5.4)
    for column, panel in enumerate(panels):
        records = [r for r in own if (r["model"], r["batch"]) == panel]
        for row, (key, scale) in enumerate((("ms_per_image", 1.0), ("peak_mib", 1 / 1024))):
            plot = axes[row][column]
            for name in dict.fromkeys(r["implementation"] for r in records):
                line = [r for r in records if r["implementation"] == name and r.get(key)]
                line.sort(key=lambda r: r["density"])
                x, y = [r["density"] for r in line], [r[key] * scale for r in line]
                plot.plot(x, y, marker="o", markersize=4, label=name, color=_COLOURS.get(name))
            plot.set_ylim(bottom=0)
            plot.grid(alpha=0.3)
        axes[0][column].set_title(f"{panel[0]}, batch {panel[1]}")
        axes[1][column].set_xlabel("density")
    axes[0][0].set_ylabel("ms an image")
    axes[1][0].set_ylabel("peak GiB")
    labelled: dict[str, Any] = {}
    for plot in axes.flat:
        handles, names = plot.get_legend_handles_labels()
        labelled |= dict(zip(names, handles, strict=True))
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=5)
    return figure


def _decomposition(own: Sequence[Record]) -> Any:
    """A bar for every step from naive dense to sparse."""
    found = data.decomposition(own)
    if not found:
        return None
    figure, axes = _panels(1, len(found), 2.6, 3)
    for plot, steps in zip(axes[0], found, strict=True):
        last, times = steps[-1], [r["ms_per_image"] for r in steps]
        names = [name.replace(" and", "\nand") for name in data.STEPS]
        bars = plot.bar(range(len(steps)), times, color=["C1", "C0", "C2", "C3"])
        plot.bar_label(bars, fmt="%.2f")
        plot.set_xticks(range(len(steps)), names, rotation=30, ha="right")
        plot.set_title(f"{last['model']}, batch {last['batch']}, {last['density']:g}")
        plot.margins(y=0.15)
    axes[0][0].set_ylabel("ms an image")
    return figure


def _roofline(own: Sequence[Record]) -> Any:
    """Time by part as stacked bars, the floors of products and attention beside each."""
    found = [r for r in own if r.get("parts_ms") and r["implementation"] == "mosaic_gpu"]
    found = [r for r in found if r["sparse"] != "attention" and r["density"] in _SHOWN]
    if not found:
        return None
    figure, plot = plt.subplots(figsize=(8, 0.42 * len(found) + 1.6), layout="constrained")
    names = [*data.PARTS, data.OTHER]
    for row, r in enumerate(found):
        left = 0.0
        for index, ms in enumerate(data.parts(r).values()):
            ms /= r["batch"]
            label = names[index] if row == 0 else None
            plot.barh(row, ms, 0.4, left=left, color=f"C{index}", label=label)
            left += ms
        left = 0.0
        for name, ms in (r.get("floor_ms") or {}).items():
            ms /= r["batch"]
            label = "floor" if row == 0 and name == "products" else None
            style: Any = {"edgecolor": f"C{names.index(name)}", "hatch": "///", "facecolor": "none"}
            plot.barh(row + 0.4, ms, 0.3, left=left, label=label, **style)
            left += ms
    labels = [f"{r['model']} B{r['batch']} r{r['density']:g}" for r in found]
    plot.set_yticks(range(len(found)), labels)
    plot.invert_yaxis()
    plot.set_xlabel("ms an image")
    plot.legend(loc="best")
    return figure


def _scaling(own: Sequence[Record]) -> Any:
    """Time and memory along every axis, logarithmic."""
    series = data.series(own)
    axes_used = [axis for axis in data.AXES if any(key[0] == axis for key in series)]
    if not axes_used:
        return None
    figure, axes = _panels(2, len(axes_used), 3, 5)
    for column, axis in enumerate(axes_used):
        for (name, model, implementation, density), records in series.items():
            if name != axis:
                continue
            x = [r[axis] for r in records]
            label = f"{model} {implementation}" + (f" {density}" if axis != "density" else "")
            for row, key in enumerate(("median_ms", "temp_mib")):
                y = [r[key] for r in records]
                axes[row][column].plot(x, y, marker="o", markersize=4, label=label)
        for plot in axes[:, column]:
            plot.set_xscale("log", base=2)
            plot.set_yscale("log")
            lines = [line for key, line in series.items() if key[0] == axis]
            ticks = sorted({r[axis] for line in lines for r in line})
            plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            plot.grid(alpha=0.3)
        axes[1][column].set_xlabel(axis.replace("_", " "))
        axes[0][column].legend(fontsize=7)
    axes[0][0].set_ylabel("ms a run")
    axes[1][0].set_ylabel("temporary MiB")
    return figure
