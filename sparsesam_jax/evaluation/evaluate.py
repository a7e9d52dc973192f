"""`sparsesam evaluate`: one run from its options to its files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.checkpoints.pretrained import locate
from sparsesam_jax.evaluation import pictures, plots
from sparsesam_jax.evaluation import summary as summaries
from sparsesam_jax.evaluation.candidates import Candidate
from sparsesam_jax.evaluation.datasets import Pair
from sparsesam_jax.evaluation.rows import RowFile
from sparsesam_jax.evaluation.run_settings import settle
from sparsesam_jax.evaluation.runner import Evaluation, Options, Report


def run(options: Options, pairs: Sequence[Pair], console: Console) -> Report:
    """Evaluate, write everything into `options.out`, print the table.

    Writes `rows.csv` as it measures, then `summary.json`, `problems.json`, `quality.png` and one
    picture a method with its best and worst images.

    Raises:
        ValueError: An argument is not as it must be, `out` holds another run, or no image is
            usable.
    """
    plots.check_matplotlib()
    evaluation = Evaluation(options, pairs)
    out = options.out
    if not out.absolute().parent.is_dir() or (out.exists() and not out.is_dir()):
        raise ValueError(f"out must be a folder, or a new one in a folder, got {str(out)!r}")
    settle(out, _settings(options, pairs), resume=options.resume)
    file = RowFile(out / "rows.csv", resume=options.resume)
    total = len(evaluation.predictors) * len(pairs)
    with _progress(console, total) as advance:
        evaluation.measure(file, advance)
    with atomic_path(out / "problems.json") as temporary:
        temporary.write_text(json.dumps(evaluation.problems, indent=1) + "\n", "utf-8")
    report = evaluation.report(file)
    summaries.write(out / "summary.json", report.summaries)
    plots.quality_by_density(report.summaries, out / "quality.png")
    pictures.write_extremes(evaluation, file, out)
    console.print(summaries.table(report.summaries))
    return report


def _settings(options: Options, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What rows of one file must share."""
    return {
        "weights": options.weights,
        "weights_bytes": locate(options.weights).stat().st_size,
        "prompts": options.prompts,
        "protocol": options.protocol,
        "batch": options.batch,
        "dtype": options.compute_dtype,
        "implementation": options.implementation,
        "sparsities": {
            candidate.method: dataclasses.asdict(candidate.sparsity)
            for candidate in options.candidates
            if candidate.sparsity is not None
        },
        "images": [pair.name for pair in pairs],
    }


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[Candidate, int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=total)

        def advance(candidate: Candidate, images: int) -> None:
            text = f"{candidate.method} {candidate.density:g}"
            progress.update(task, description=text, advance=images)

        yield advance
