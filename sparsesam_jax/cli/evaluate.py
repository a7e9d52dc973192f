"""The command line of the measurements: `sparsesam evaluate` and `evaluate-coco`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparsesam_jax.cli import analysis as cli_analysis
from sparsesam_jax.cli.lists import ListsCommand

Prompts = Literal["box", "point", "points3", "box+point"]
ProtocolName = Literal["sam", "hq44k", "release"]
Implementation = Literal["auto", "xla", "mosaic_gpu"]
Dtype = Literal["float32", "bfloat16", "float16"]

DENSITIES = (1.0, 0.7, 0.5, 0.4, 0.3, 0.25)


def register(app: typer.Typer) -> None:
    """Add these commands and those of `cli_analysis`."""
    app.command(cls=ListsCommand)(evaluate)
    app.command(cls=ListsCommand)(evaluate_coco)
    cli_analysis.register(app)


def evaluate(
    images: Annotated[Path | None, typer.Option(help="Folder of photos.")] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder of their masks: equal stems, foreground > 128.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Instead: dis5k, coift, hrsod or thinobject5k."),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where the dataset lies.")] = None,
    weights: Annotated[str, typer.Option(help="vit_t (embedded) or a converted file.")] = "vit_t",
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME ...", help="See below; several may follow. [sparsesam]"),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(metavar="R ...", help="Several may follow. [1.0 0.7 0.5 0.4 0.3 0.25]"),
    ] = None,
    sparsity: Annotated[
        Path | None,
        typer.Option(help="Also: a JSON of Sparsity's fields."),
    ] = None,
    prompts: Annotated[Prompts, typer.Option(help="Taken from the ground truth.")] = "box",
    protocol: Annotated[
        ProtocolName, typer.Option(help="How images get in and masks get out.")
    ] = "sam",
    batch: Annotated[int, typer.Option(help="Images a call.")] = 8,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="[float32; float16 with the protocol release]", show_default=False),
    ] = None,
    implementation: Annotated[
        Implementation, typer.Option(help="xla, the GPU kernels, or auto: those where they run.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(help="Only the first N photos.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for rows, summary and pictures.")] = Path(
        "evaluation"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run that OUT holds.")
    ] = False,
) -> None:
    """Measure what a method costs in quality: photos with masks, dense and at several densities.

    Writes rows.csv (every image), summary.json, problems.json, quality.png and one best_worst
    picture a method. A broken image or a mask of another size is reported and left out; the exit
    code is then 1. Methods: sparsesam, released, random (routing), tome, pitome, structsam, sparge,
    pisa, kmeans.
    """
    from rich.console import Console

    from sparsesam_jax.evaluation.datasets import dataset_pairs, folder_pairs, limited

    if (dataset is None) == (images is None and masks is None) or (images is None) != (
        masks is None
    ):
        raise ValueError("either --images and --masks or --dataset and --root must be given")
    if dataset is not None and root is None:
        raise ValueError("--dataset needs --root, got none")
    if dataset is not None and root is not None:
        pairs = dataset_pairs(dataset, root)
    else:
        assert images is not None and masks is not None
        pairs = folder_pairs(images, masks)
    from pallas_kernels.implementation import resolve
    from sparsesam_jax.evaluation.evaluate import run
    from sparsesam_jax.evaluation.runner import Options

    options = Options(
        candidates=_candidates(method or ["sparsesam"], density or DENSITIES, sparsity),
        out=out,
        weights=weights,
        prompts=prompts,
        protocol=protocol,
        batch=batch,
        dtype=dtype,
        implementation=implementation,
        resume=resume,
    )
    resolve(implementation, function="sparsesam evaluate")
    report = run(options, limited(pairs, limit), Console())
    typer.echo(f"wrote {out}")
    for name, problem in report.problems.items():
        typer.echo(f"left out: {name}: {problem}", err=True)
    if report.problems:
        typer.echo(f"{len(report.problems)} of {len(pairs)} images left out", err=True)
        raise typer.Exit(1)


def evaluate_coco(
    annotations: Annotated[Path, typer.Option(help="COCO's instances, JSON.")],
    detections: Annotated[Path, typer.Option(help="A detector's results, JSON.")],
    images: Annotated[Path, typer.Option(help="Folder of the annotated images.")],
    weights: Annotated[str, typer.Option(help="vit_t (embedded) or a converted file.")] = "vit_t",
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME ...", help="As for evaluate. [sparsesam]"),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(metavar="R ...", help="Several may follow. [0.5 0.3]"),
    ] = None,
    sparsity: Annotated[
        Path | None, typer.Option(help="Also: a JSON of Sparsity's fields.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="What is computed in.")] = "float32",
    implementation: Annotated[
        Implementation, typer.Option(help="xla, the GPU kernels, or auto: those where they run.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(help="Only the first N images.")] = None,
    min_score: Annotated[float, typer.Option(help="Detections below are left out.")] = 0.0,
    out: Annotated[Path, typer.Option(help="Folder for masks and summary.")] = Path("coco"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run that OUT holds.")
    ] = False,
) -> None:
    """Segm AP on COCO: a detector's boxes as prompts, one mask a box; dense comes first.

    Writes summary.json, problems.json and every method's masks in COCO's results format, and while
    it runs also image by image (.jsonl). A broken image or one of another size is reported and left
    out; the exit code is then 1.
    """
    from rich.console import Console

    from pallas_kernels.implementation import resolve
    from sparsesam_jax.evaluation import coco

    resolve(implementation, function="sparsesam evaluate-coco")
    options = coco.Options(
        annotations=annotations,
        detections=detections,
        images=images,
        candidates=_candidates(method or ["sparsesam"], density or (0.5, 0.3), sparsity),
        out=out,
        weights=weights,
        dtype=dtype,
        implementation=implementation,
        limit=limit,
        min_score=min_score,
        resume=resume,
    )
    report = coco.run(options, Console())
    typer.echo(f"wrote {out}")
    for name, problem in report.problems.items():
        typer.echo(f"left out: {name}: {problem}", err=True)
    if report.problems:
        raise typer.Exit(1)


def _candidates(
    names: list[str], densities: list[float] | tuple[float, ...], file: Path | None
) -> Any:
    from sparsesam_jax.evaluation.candidates import Candidate
    from sparsesam_jax.evaluation.sparsity_file import read_sparsity

    found = [Candidate(name, value) for name in names for value in densities]
    if file is not None:
        sparsity = read_sparsity(file)
        density = sparsity.density
        mean = sum(density) / len(density) if isinstance(density, tuple) else density
        found.append(Candidate(file.stem, mean, sparsity))
    return tuple(found)
