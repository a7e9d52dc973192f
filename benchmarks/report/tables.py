"""Tables of records, on a terminal and in a document.

A column is its head and a template as `str.format` has them, over the fields of a record; what a
record lacks is a dash. In heads, ↓ and ↑ say whether lower or higher is better.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.records import Record

TIMES = {
    "ms ↓": "{median_ms:.3f}",
    "quartiles": "{q1_ms:.3f}-{q3_ms:.3f}",
    "ms an image ↓": "{ms_per_image:.3f}",
    "MiB ↓": "{peak_mib:.0f}",
    "error ↓": "{max_error:.1e}",
    "TFLOP/s ↑": "{tflops:.1f}",
    "of ceiling ↑": "{share_of_ceiling:.0%}",
    "compile s ↓": "{compile_s:.0f}",
}
_WIDTH = 190  # a log has no width of its own


class _Shown:
    """A value, or a dash where there is none."""

    def __init__(self, value: object):
        self._value = value

    def __format__(self, spec: str) -> str:
        return "-" if self._value is None else format(self._value, spec)


def formatted(template: str, row: Mapping[str, Any]) -> str:
    """The template with a row's fields; what the row lacks is a dash."""
    shown = {key: _Shown(value) for key, value in row.items()}
    return template.format_map(defaultdict(lambda: _Shown(None), shown))


def document(template: str, values: Mapping[str, Any]) -> str:
    """A document from its template beside this module, by Jinja.

    There, `{% call table(rows) %}` has a table whose last line is written for every row.
    """
    import jinja2

    def table(rows: Sequence[Mapping[str, Any]], caller: Callable[[], str]) -> str:
        *head, line = caller().strip().splitlines()
        lines = [formatted(line, row) for row in rows]
        return "\n".join([*head, *lines, ""]) if lines else "Not measured.\n"

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, trim_blocks=True)
    text = environment.get_template(template).render(values, table=table)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"  # what is empty leaves one line


def print_table(
    title: str, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], caption: str = ""
) -> None:
    """Print a table; nothing without rows."""
    table = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head, template in columns.items():
        table.add_column(head, no_wrap=True, justify="right" if ":" in template else "left")
    for row in rows:
        table.add_row(*(formatted(template, row) for template in columns.values()))
    if table.row_count:
        console = Console()
        (console if console.is_terminal else Console(width=_WIDTH)).print(table)


def show(title: str, results: Sequence[Record], keys: Sequence[str], caption: str = "") -> None:
    """Print what was measured: `keys` name a line, `TIMES` say what came out."""
    timed = [r for r in results if r["not_run"] is None and r.get("median_ms") is not None]
    print_table(title, _named(keys) | TIMES, timed, caption)


def show_parts(results: Sequence[Record], keys: Sequence[str]) -> None:
    """Print the parts of what has some, in milliseconds."""
    rows = [r | r["parts_ms"] for r in results if r.get("parts_ms")]
    parts = {f"{part} ↓": f"{{{part}:.2f}}" for r in rows[:1] for part in r["parts_ms"]}
    print_table("Parts, ms", _named(keys) | parts, rows)


def _named(keys: Sequence[str]) -> dict[str, str]:
    return {key: f"{{{key}}}" for key in keys}
