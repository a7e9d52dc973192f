"""The command line: `python -m benchmarks SUITE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import commands, on_gpus, records
from benchmarks.commands import Out
from benchmarks.suites import sanitize
from benchmarks.suites.quality import Options, SweepOptions

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Benchmarks that check before they time, and write raw JSON lines.",
)
_Results = Annotated[Path, typer.Option(help="Folder of the raw files.")]
_Document = Annotated[Path, typer.Option(help="The document.")]
_Densities = Annotated[list[float], typer.Option(help="Of every preset; may be repeated.")]


def everything(
    model: Annotated[str, typer.Option(help="vit_t, vit_b, vit_l or vit_h.")] = "vit_l",
    dtype: Annotated[str, typer.Option(help="What is computed in.")] = "bfloat16",
    side: Annotated[int, typer.Option(help="Points along a side of the grid.")] = 32,
    runs: Annotated[int, typer.Option(help="Timed runs.")] = 10,
    peer: Annotated[bool, typer.Option(help="Whether transformers runs beside.")] = True,
    out: Out = None,
) -> None:
    """All masks of a photo: the whole call, its parts and its memory, beside transformers."""
    from benchmarks.suites import everything

    everything.run(model, dtype, side, runs, peer, out)


def quality(
    options: Options,
    density: _Densities = [0.5, 0.4, 0.3],  # noqa: B006
    preset: Annotated[
        list[str], typer.Option(help="Named sparsity (see `presets`); may be repeated.")
    ] = ["default"],  # noqa: B006
    variants: Annotated[
        Path | None,
        typer.Option(help='Instead: JSON list of {"name": ..., "sparsity": {Sparsity fields}}.'),
    ] = None,
    out: Out = None,
) -> int:
    """Box-prompt mIoU on photos with masks: dense, and what each sparsity changes."""
    from rich.console import Console

    from benchmarks.suites.quality import changes, measure
    from benchmarks.suites.quality import variants as lists

    chosen = lists.read(variants) if variants else lists.presets(preset, density)
    with records.writer(out) as write:
        found = measure.quality(options, chosen, write, Console())
    if found:
        changes.show(found, "the run")
    return 0 if len(found) == 2 * (len(chosen) + 1) else 130


def sweep(
    options: SweepOptions,
    variants: Annotated[
        list[Path], typer.Option(help="JSON list, as `candidates` writes it; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="JSON lines; what they already hold is kept.")],
) -> int:
    """Many variants in few programs, no speeds; run again, it measures what is missing."""
    from rich.console import Console

    from benchmarks.suites.quality import changes, measure
    from benchmarks.suites.quality import variants as lists

    missing = measure.sweep(options, lists.read(*variants), out, Console())
    if out.exists():
        changes.show(records.read(out), str(out))
    if missing:
        typer.echo(f"not run: {', '.join(missing)}", err=True)
    return 130 if missing else 0


def sweep_table(file: Annotated[Path, typer.Argument(help="What `sweep` wrote.")]) -> None:
    """What a sweep measured: differences to dense on all photos and on either half of them."""
    from benchmarks.suites.quality import changes

    changes.show(records.read(file), str(file))


def quality_doc(
    results: _Results = Path("benchmarks/results"), out: _Document = Path("docs/quality.md")
) -> None:
    """Write docs/quality.md from the raw files of `quality` and `sweep`."""
    from benchmarks.report import quality_document

    quality_document.write(results, out)


def report(
    results: _Results = Path("benchmarks/results"), out: _Document = Path("docs/benchmarks.md")
) -> None:
    """Write docs/benchmarks.md and its pictures from the raw files of all suites."""
    from benchmarks.report import document

    document.write(results, out)


def candidates(
    out: Annotated[Path, typer.Argument(help="JSON list of variants to write.")],
    weights: Annotated[str, typer.Option(help="vit_t or a converted file.")] = "vit_t",
    density: Annotated[
        list[float] | None,
        typer.Option(help="May be repeated. Without it: 0.4 and 0.3; with --methods 0.5 too."),
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="Instead: every method by name, SparseSAM included.")
    ] = False,
) -> None:
    """Variants for `sweep`, each with the computed work of the released preset."""
    from benchmarks.suites.quality import variants
    from sparsesam_jax.checkpoints import native
    from sparsesam_jax.checkpoints.pretrained import locate

    if methods:
        found = variants.compared(density or [0.5, 0.4, 0.3])
    else:
        config = native.read(locate(weights))[0].image_encoder
        found = variants.candidates(config, density or [0.4, 0.3])
    variants.write(found, out)


def presets() -> None:
    """The named sparsities of `quality`."""
    from benchmarks.report import tables
    from benchmarks.suites.quality.variants import PRESETS

    columns = {"preset": "{name}", "at density r": "{meaning}"}
    rows = [{"name": name, "meaning": preset.meaning} for name, preset in PRESETS.items()]
    tables.print_table("Presets", columns, rows)


commands.add_suites(app)
for function in (sanitize.sanitize, on_gpus.on_gpus, everything, quality, sweep, sweep_table):
    commands.add(app, function)
for function in (quality_doc, report, candidates, presets):
    commands.add(app, function)

if __name__ == "__main__":
    app()
