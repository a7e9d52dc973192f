"""The command line: `python -m benchmarks SUITE`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks import commands

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Benchmarks that check before they time, and write raw JSON lines.",
)

Out = Annotated[Path | None, typer.Option(help="JSON lines to write; an older file is replaced.")]


@app.command()
def cpu(
    model: Annotated[str, typer.Option(help="vit_t, vit_b, vit_l or vit_h.")] = "vit_b",
    density: Annotated[
        list[float] | None, typer.Option(help="Beside dense; may be repeated. Without it: 0.3.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images a run.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Of every peer. Without it: all processors.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Timed runs of each peer.")] = 9,
    warmups: Annotated[int, typer.Option(help="Untimed runs of each peer.")] = 2,
    keep_memory: Annotated[
        bool, typer.Option(help="Let glibc keep freed memory, for every peer alike.")
    ] = False,
    out: Out = None,
    quick: Annotated[bool, typer.Option(help="A tiny model instead of MODEL.")] = False,
) -> None:
    """Our encoder on the CPU beside transformers' PyTorch: same weights, threads and input."""
    from rich.console import Console

    from benchmarks import records
    from benchmarks.cases import shapes
    from benchmarks.suites import cpu

    def run() -> bool:
        options = cpu.Options(
            model=shapes.QUICK_MODEL if quick else model,
            densities=tuple(density or [0.3]),
            batch=batch,
            threads=records.available_cpus() if threads is None else threads,
            runs=runs,
            warmups=warmups,
            keep_memory=keep_memory,
        )
        with records.writer(out) as write:
            return cpu.run(options, write, Console())

    _finish(run)


for suite in (
    commands.ceilings,
    commands.kernels,
    commands.encoder,
    commands.end_to_end,
    commands.scaling,
    commands.quick,
):
    app.command(name=suite.__name__.replace("_", "-"))(suite)


@app.command()
def quality(
    images: Annotated[Path, typer.Option(help="Folder of photos.")],
    masks: Annotated[Path, typer.Option(help="Folder of their masks, equal stems, > 128.")],
    weights: Annotated[str, typer.Option(help="vit_t or a converted file.")] = "vit_t",
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
    batch: Annotated[int, typer.Option(help="Images an encoder call.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    implementation: Annotated[
        Literal["auto", "xla", "mosaic_gpu"], typer.Option(help="Of the attention.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(help="Only the first N photos.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Batches in flight. Without it: processors, at most 8.")
    ] = None,
    out: Out = None,
) -> None:
    """Box-prompt mIoU on photos with masks: dense, and what each sparsity changes."""
    from rich.console import Console

    from benchmarks import records
    from benchmarks.suites.quality import candidates, changes, measure
    from benchmarks.suites.quality import variants as lists

    def run() -> bool:
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
        return len(found) == 2 * (len(chosen) + 1)

    _finish(run)


@app.command()
def sweep(
    images: Annotated[Path, typer.Option(help="Folder of photos.")],
    masks: Annotated[Path, typer.Option(help="Folder of their masks, equal stems, > 128.")],
    variants: Annotated[
        list[Path], typer.Option(help="JSON list, as `candidates` writes it; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="JSON lines; what they already hold is kept.")],
    weights: Annotated[str, typer.Option(help="vit_t or a converted file.")] = "vit_t",
    batch: Annotated[int, typer.Option(help="Images an encoder call.")] = 20,
    limit: Annotated[int | None, typer.Option(help="Only the first N photos.")] = None,
    threads: Annotated[
        int, typer.Option("--threads", "--processes", help="Programs that compile at a time.")
    ] = 12,
    seconds: Annotated[float, typer.Option(help="No variant is measured after them.")] = 270,
    timeout: Annotated[
        float, typer.Option(help="Seconds without a compiled variant that end the sweep.")
    ] = 240,
) -> None:
    """Many variants in few programs, no speeds; run again, it measures what is missing."""
    from rich.console import Console

    from benchmarks import records
    from benchmarks.suites.quality import changes, sweep
    from benchmarks.suites.quality import variants as lists

    def run() -> bool:
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
        return not missing

    _finish(run)


@app.command()
def sweep_table(
    file: Annotated[Path, typer.Argument(help="What `sweep` wrote.")],
) -> None:
    """What a sweep measured: differences to dense on all photos and on either half of them."""
    from benchmarks import records
    from benchmarks.suites.quality import changes

    def run() -> bool:
        changes.show(records.read(file), str(file))
        return True

    _finish(run)


@app.command()
def quality_doc(
    results: Annotated[Path, typer.Option(help="Folder of the raw files.")] = Path(
        "benchmarks/results"
    ),
    out: Annotated[Path, typer.Option(help="The document.")] = Path("docs/quality.md"),
) -> None:
    """Write docs/quality.md from the raw files of `quality` and `sweep`."""

    def run() -> bool:
        from benchmarks.report import quality_document

        quality_document.write(results, out)
        return True

    _finish(run)


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of the raw files.")] = Path(
        "benchmarks/results"
    ),
    out: Annotated[Path, typer.Option(help="The document.")] = Path("docs/benchmarks.md"),
) -> None:
    """Write docs/benchmarks.md and its pictures from the raw files of all suites."""

    def run() -> bool:
        from benchmarks.report import document

        document.write(results, out)
        return True

    _finish(run)


@app.command()
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

    def run() -> bool:
        from benchmarks.suites.quality import candidates, variants
        from sparsesam_jax.checkpoints import native as files
        from sparsesam_jax.checkpoints.pretrained import locate

        if methods:
            found = candidates.compared(density or [0.5, 0.4, 0.3])
        else:
            config = files.read(locate(weights))[0].image_encoder
            found = candidates.candidates(config, density or [0.4, 0.3])
        variants.write(found, out)
        return True

    _finish(run)


@app.command()
def presets() -> None:
    """The named sparsities of `quality`."""
    from rich.console import Console

    from benchmarks.suites.quality.candidates import preset_table

    Console().print(preset_table())


def _finish(run: Callable[[], bool]) -> None:
    """Exit code 2 and one line for a wrong argument, 1 for a wrong result, 130 after Ctrl-C."""
    from benchmarks.worker import CheckError

    try:
        complete = run()
    except (ValueError, OSError, CheckError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1 if isinstance(error, CheckError) else 2) from None
    except KeyboardInterrupt:
        complete = False
    if not complete:
        raise typer.Exit(130)


if __name__ == "__main__":
    app()
