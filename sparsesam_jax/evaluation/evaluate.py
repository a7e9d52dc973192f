"""`sparsesam evaluate`: one run from its options to its files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsesam_jax.checkpoints.atomic import check_folder
from sparsesam_jax.evaluation import pictures, plots
from sparsesam_jax.evaluation import summary as summaries
from sparsesam_jax.evaluation.candidates import Candidate
from sparsesam_jax.evaluation.datasets import Pair
from sparsesam_jax.evaluation.rows import RowFile
from sparsesam_jax.evaluation.runner import Evaluation, Options, Report
from sparsesam_jax.evaluation.runs import write_json


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
    check_folder(out)
    own = {"prompts": options.prompts, "protocol": options.protocol, "batch": options.batch}
    options.settle([pair.name for pair in pairs], own)
    file = RowFile(out / "rows.csv", resume=options.resume)
    total = len(evaluation.predictors) * len(pairs)
    with _progress(console, total) as advance:
        evaluation.measure(file, advance)
    write_json(out / "problems.json", evaluation.problems)
    report = evaluation.report(file)
    write_json(out / "summary.json", report.summaries)
    plots.quality_by_density(report.summaries, out / "quality.png")
    pictures.write_extremes(evaluation, file, out)
    console.print(summaries.table(report.summaries))
    return report


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
