"""The table that a suite ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.records import Record

COLUMNS = ("ms", "quartiles", "ms an image", "MiB", "error", "TFLOP/s", "of ceiling", "compile s")


def show(title: str, results: Sequence[Record], keys: Sequence[str], caption: str = "") -> None:
    """Print what was measured: `keys` name a line, `COLUMNS` say what came out."""
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for key in keys:
        table.add_column(key, no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        if r["not_run"] is None and r.get("median_ms") is not None:
            table.add_row(*(_text(r.get(key)) for key in keys), *_cells(r))
    _print(table)


def show_parts(results: Sequence[Record], keys: Sequence[str]) -> None:
    """Print the parts of what has some, in milliseconds."""
    found = [r for r in results if r.get("parts_ms")]
    if not found:
        return
    table = Table(title="Parts, ms", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in (*keys, *found[0]["parts_ms"]):
        table.add_column(column, no_wrap=True)
    for r in found:
        parts = (number(ms, ".2f") for ms in r["parts_ms"].values())
        table.add_row(*(_text(r.get(key)) for key in keys), *parts)
    _print(table)


def show_fits(fits: Sequence[Mapping[str, Any]]) -> None:
    """Print fitted exponents beside the expected ones."""
    if not fits:
        return
    table = Table(title="Growth: exponents of power laws", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in fits[0]:
        table.add_column(column.replace("_", " "), no_wrap=True)
    for fit in fits:
        cells = (number(x, ".2f") if x is None or isinstance(x, float) else x for x in fit.values())
        table.add_row(*cells)
    _print(table)


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=190)
    console.print(table)


def _cells(r: Record) -> list[str]:
    share = r.get("share_of_ceiling")
    return [
        number(r["median_ms"], ".3f"),
        f"{number(r['q1_ms'], '.3f')}-{number(r['q3_ms'], '.3f')}",
        number(r.get("ms_per_image"), ".3f"),
        number(r.get("peak_mib"), ".0f"),
        number(r.get("max_error"), ".1e"),
        number(r.get("tflops"), ".1f"),
        "-" if share is None else f"{share:.0%}",
        number(r.get("compile_s"), ".0f"),
    ]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def number(value: float | None, spec: str) -> str:
    """A formatted number, or a dash where there is none."""
    return "-" if value is None else format(value, spec)
