"""The command line: `python -m benchmarks SUITE`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

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

    from benchmarks import cpu, records, shapes

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


@app.command()
def quality(
    images: Annotated[Path, typer.Option(help="Folder of photos.")],
    masks: Annotated[Path, typer.Option(help="Folder of their masks, equal stems, > 128.")],
    manifest: Annotated[
        Path, typer.Option(help="CSV with the columns id, box_x0, box_y0, box_x1, box_y1.")
    ],
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

    from benchmarks import quality, records
    from benchmarks.variants import preset_variants, read_variants

    def run() -> bool:
        options = quality.Options(
            images=images,
            masks=masks,
            manifest=manifest,
            weights=weights,
            batch=batch,
            dtype=dtype,
            implementation=implementation,
            limit=limit,
            threads=min(8, records.available_cpus()) if threads is None else threads,
        )
        if variants is None:
            chosen = preset_variants(preset or ["default"], density or [0.5, 0.4, 0.3])
        else:
            chosen = read_variants(variants)
        with records.writer(out) as write:
            return quality.run(options, chosen, write, Console())

    _finish(run)


@app.command()
def presets() -> None:
    """The named sparsities of `quality`."""
    from rich.console import Console

    from benchmarks.variants import preset_table

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
