"""The command line: `python -m benchmarks SUITE`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks import commands, records
from benchmarks import on_gpus as stages
from benchmarks.commands import Out, finish

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Benchmarks that check before they time, and write raw JSON lines.",
)
commands.add_suites(app)

_Images = Annotated[Path, typer.Option(help="Folder of photos.")]
_Masks = Annotated[Path, typer.Option(help="Folder of their masks, equal stems, > 128.")]
_Weights = Annotated[str, typer.Option(help="vit_t or a converted file.")]
_Batch = Annotated[int, typer.Option(help="Images an encoder call.")]
_Limit = Annotated[int | None, typer.Option(help="Only the first N photos.")]
_Results = Annotated[Path, typer.Option(help="Folder of the raw files.")]
_Document = Annotated[Path, typer.Option(help="The document.")]


def _command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """A command of the function; it returns its exit code, or nothing."""

    @app.command()
    @functools.wraps(function)
    def command(**given: Any) -> None:
        finish(lambda: function(**given) or 0)

    return function


@_command
def photos(
    model: Annotated[str, typer.Option(help="vit_t, vit_b, vit_l or vit_h.")] = "vit_l",
    count: Annotated[int, typer.Option(help="Photos, each of its own size.")] = 1000,
    dtype: Annotated[str, typer.Option(help="What is computed in.")] = "bfloat16",
    density: Annotated[list[float] | None, typer.Option(help="Of the crops. [1 0.4]")] = None,
    batch: Annotated[int, typer.Option(help="Images of a crop's batch; 0 leaves crops out.")] = 8,
    out: Out = None,
) -> None:
    """How many programs photos of all sizes compile, and what cropping their padding saves."""
    from benchmarks.suites import photos

    photos.run(model, count, dtype, density or (1.0, 0.4), batch, out)


@_command
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


@_command
def sanitize() -> int:
    """Every kernel once, for NVIDIA's compute-sanitizer to watch: memcheck or racecheck."""
    from benchmarks.suites import sanitize

    return sanitize.run()


@_command
def on_gpus(
    stage: Annotated[str, typer.Argument(help=f"{', '.join(stages.NAMES)}.")],
    folder: Annotated[Path, typer.Argument(help="Of the records and of what is printed.")],
    limit: Annotated[float, typer.Option(help="Seconds after which nothing starts.")] = 520,
) -> int:
    """What benchmarks/results holds of a machine's GPUs, a stage at a time."""
    return stages.run(stage, folder, limit)


@_command
def quality(
    images: _Images,
    masks: _Masks,
    weights: _Weights = "vit_t",
    density: Annotated[
        list[float] | None,
        typer.Option(help="Of every preset; may be repeated. Without it: 0.5, 0.4, 0.3."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="Named sparsity (see `presets`); may be repeated. Without it: default."),
    ] = None,
    variants: Annotated[
        Path | None,
        typer.Option(help='Instead: JSON list of {"name": ..., "sparsity": {Sparsity fields}}.'),
    ] = None,
    batch: _Batch = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    implementation: Annotated[
        Literal["auto", "xla", "mosaic_gpu"], typer.Option(help="Of the attention.")
    ] = "auto",
    limit: _Limit = None,
    threads: Annotated[
        int | None, typer.Option(help="Batches in flight. Without it: processors, at most 8.")
    ] = None,
    out: Out = None,
) -> int:
    """Box-prompt mIoU on photos with masks: dense, and what each sparsity changes."""
    from rich.console import Console

    from benchmarks.suites.quality import candidates, changes, measure
    from benchmarks.suites.quality import variants as lists

    options = measure.Options(
        images=images,
        masks=masks,
        weights=weights,
        batch=batch,
        dtype=dtype,
        implementation=implementation,
        limit=limit,
        threads=min(8, records.available_cpus()) if threads is None else threads,
    )
    if variants is None:
        chosen = candidates.presets(preset or ["default"], density or [0.5, 0.4, 0.3])
    else:
        chosen = lists.read(variants)
    with records.writer(out) as write:
        found = measure.run(options, chosen, write, Console())
    if found:
        changes.show(found, "the run")
    return 0 if len(found) == 2 * (len(chosen) + 1) else 130


@_command
def sweep(
    images: _Images,
    masks: _Masks,
    variants: Annotated[
        list[Path], typer.Option(help="JSON list, as `candidates` writes it; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="JSON lines; what they already hold is kept.")],
    weights: _Weights = "vit_t",
    batch: _Batch = 20,
    limit: _Limit = None,
    threads: Annotated[
        int, typer.Option("--threads", "--processes", help="Programs that compile at a time.")
    ] = 12,
    seconds: Annotated[float, typer.Option(help="No variant is measured after them.")] = 270,
    timeout: Annotated[
        float, typer.Option(help="Seconds without a compiled variant that end the sweep.")
    ] = 240,
) -> int:
    """Many variants in few programs, no speeds; run again, it measures what is missing."""
    from rich.console import Console

    from benchmarks.suites.quality import changes, sweep
    from benchmarks.suites.quality import variants as lists

    options = sweep.Options(
        images=images,
        masks=masks,
        weights=weights,
        batch=batch,
        limit=limit,
        compilers=threads,
        seconds=seconds,
        timeout=timeout,
    )
    missing = sweep.run(options, lists.read(*variants), out, Console())
    if out.exists():
        changes.show(records.read(out), str(out))
    if missing:
        typer.echo(f"not run: {', '.join(missing)}", err=True)
    return 130 if missing else 0


@_command
def sweep_table(file: Annotated[Path, typer.Argument(help="What `sweep` wrote.")]) -> None:
    """What a sweep measured: differences to dense on all photos and on either half of them."""
    from benchmarks.suites.quality import changes

    changes.show(records.read(file), str(file))


@_command
def quality_doc(
    results: _Results = Path("benchmarks/results"), out: _Document = Path("docs/quality.md")
) -> None:
    """Write docs/quality.md from the raw files of `quality` and `sweep`."""
    from benchmarks.report import quality_document

    quality_document.write(results, out)


@_command
def report(
    results: _Results = Path("benchmarks/results"), out: _Document = Path("docs/benchmarks.md")
) -> None:
    """Write docs/benchmarks.md and its pictures from the raw files of all suites."""
    from benchmarks.report import document

    document.write(results, out)


@_command
def candidates(
    out: Annotated[Path, typer.Argument(help="JSON list of variants to write.")],
    weights: _Weights = "vit_t",
    density: Annotated[
        list[float] | None,
        typer.Option(help="May be repeated. Without it: 0.4 and 0.3; with --methods 0.5 too."),
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="Instead: every method by name, SparseSAM included.")
    ] = False,
) -> None:
    """Variants for `sweep`, each with the computed work of the released preset."""
    from benchmarks.suites.quality import candidates, variants
    from sparsesam_jax.checkpoints import native as files
    from sparsesam_jax.checkpoints.pretrained import locate

    if methods:
        found = candidates.compared(density or [0.5, 0.4, 0.3])
    else:
        config = files.read(locate(weights))[0].image_encoder
        found = candidates.candidates(config, density or [0.4, 0.3])
    variants.write(found, out)


@_command
def presets() -> None:
    """The named sparsities of `quality`."""
    from rich.console import Console

    from benchmarks.suites.quality.candidates import preset_table

    Console().print(preset_table())


if __name__ == "__main__":
    app()
