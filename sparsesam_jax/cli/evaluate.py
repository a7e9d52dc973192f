"""The measurements: `sparsesam evaluate` and `evaluate-coco`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsesam_jax.choices import Dtype, PromptKind, ProtocolName
from sparsesam_jax.cli.options import (
    BitsOption,
    DensitiesOption,
    ImplementationOption,
    LimitOption,
    MaxPixelsOption,
    MethodsOption,
    PaddingOption,
    ProductsOption,
    ResumeOption,
    SparsityFileOption,
    ValueRangeOption,
    WeightsOption,
    check_implementation,
)

if TYPE_CHECKING:
    from sparsesam_jax.evaluation.candidates import Candidate

DENSITIES = [1.0, 0.7, 0.5, 0.4, 0.3, 0.25]
COCO_DENSITIES = [0.5, 0.3]
METHODS = ["sparsesam"]


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
    weights: WeightsOption = "vit_t",
    method: MethodsOption = METHODS,
    density: DensitiesOption = DENSITIES,
    sparsity: SparsityFileOption = None,
    prompts: Annotated[PromptKind, typer.Option(help="Taken from the ground truth.")] = "box",
    protocol: Annotated[
        ProtocolName, typer.Option(help="How images get in and masks get out.")
    ] = "sam",
    batch: Annotated[int, typer.Option(help="Images a call.")] = 8,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="[float32; float16 with the protocol release]", show_default=False),
    ] = None,
    implementation: ImplementationOption = "auto",
    products: ProductsOption = "dtype",
    padding: PaddingOption = "square",
    limit: LimitOption = None,
    bits: BitsOption = None,
    value_range: ValueRangeOption = None,
    max_pixels: MaxPixelsOption = None,
    out: Annotated[Path, typer.Option(help="Folder for rows, summary and pictures.")] = Path(
        "evaluation"
    ),
    resume: ResumeOption = False,
) -> None:
    """Measure what a method costs in quality: photos with masks, dense and at several densities.

    Writes rows.csv (every image), summary.json, problems.json, quality.png and one best_worst
    picture a method. A broken image or a mask of another size is reported and left out; the exit
    code is then 1.
    """
    from sparsesam_jax.checkpoints.atomic import check_folder
    from sparsesam_jax.checkpoints.sources import locate
    from sparsesam_jax.evaluation.datasets import dataset_pairs, folder_pairs, limited
    from sparsesam_jax.predict.image_files import PhotoReader

    reader = PhotoReader(bits=bits, value_range=value_range, max_pixels=max_pixels)
    _check_candidates(method, density)
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
    check_folder(out)
    locate(weights)
    check_implementation(implementation, "evaluate")

    from rich.console import Console

    from sparsesam_jax.evaluation.evaluate import run
    from sparsesam_jax.evaluation.runner import Options

    options = Options(
        candidates=_candidates(method, density, sparsity),
        out=out,
        weights=weights,
        prompts=prompts,
        protocol=protocol,
        batch=batch,
        dtype=dtype,
        padding=padding,
        implementation=implementation,
        products=products,
        resume=resume,
        reader=reader,
    )
    report = run(options, limited(pairs, limit), Console())
    _end(out, report.problems, len(pairs))


def evaluate_coco(
    annotations: Annotated[Path, typer.Option(help="COCO's instances, JSON.")],
    detections: Annotated[Path, typer.Option(help="A detector's results, JSON.")],
    images: Annotated[Path, typer.Option(help="Folder of the annotated images.")],
    weights: WeightsOption = "vit_t",
    method: MethodsOption = METHODS,
    density: DensitiesOption = COCO_DENSITIES,
    sparsity: SparsityFileOption = None,
    dtype: Annotated[Dtype, typer.Option(help="What is computed in.")] = "float32",
    implementation: ImplementationOption = "auto",
    products: ProductsOption = "dtype",
    padding: PaddingOption = "square",
    limit: LimitOption = None,
    min_score: Annotated[float, typer.Option(help="Detections below are left out.")] = 0.0,
    bits: BitsOption = None,
    value_range: ValueRangeOption = None,
    max_pixels: MaxPixelsOption = None,
    out: Annotated[Path, typer.Option(help="Folder for masks and summary.")] = Path("coco"),
    resume: ResumeOption = False,
) -> None:
    """Segm AP on COCO: a detector's boxes as prompts, one mask a box; dense comes first.

    Writes summary.json, problems.json and every method's masks in COCO's results format, and while
    it runs also image by image (.jsonl). A broken image or one of another size is reported and left
    out; the exit code is then 1.
    """
    from sparsesam_jax.checkpoints.atomic import check_folder
    from sparsesam_jax.checkpoints.sources import locate
    from sparsesam_jax.predict.image_files import PhotoReader

    reader = PhotoReader(bits=bits, value_range=value_range, max_pixels=max_pixels)
    _check_candidates(method, density)
    for name, file in (("annotations", annotations), ("detections", detections)):
        if not file.is_file():
            raise ValueError(f"{name} must be a JSON file, got {str(file)!r}, which is none")
    check_folder(out)
    locate(weights)
    check_implementation(implementation, "evaluate-coco")

    from rich.console import Console

    from sparsesam_jax.evaluation import coco

    options = coco.Options(
        annotations=annotations,
        detections=detections,
        images=images,
        candidates=_candidates(method, density, sparsity),
        out=out,
        weights=weights,
        dtype=dtype,
        padding=padding,
        implementation=implementation,
        products=products,
        limit=limit,
        min_score=min_score,
        resume=resume,
        reader=reader,
    )
    report = coco.run(options, Console())
    _end(out, report.problems, report.images)


def _check_candidates(names: Sequence[str], densities: Sequence[float]) -> None:
    """What is wrong with candidates and needs no JAX to be seen."""
    from sparsesam_jax import methods
    from sparsesam_jax.config import Sparsity

    for name in names:
        methods.check_name(name)
    for density in densities:
        Sparsity(density)


def _candidates(
    names: Sequence[str], densities: Sequence[float], file: Path | None
) -> tuple[Candidate, ...]:
    from sparsesam_jax.evaluation.candidates import Candidate
    from sparsesam_jax.evaluation.sparsity_file import read_sparsity

    found = [Candidate(name, value) for name in names for value in densities]
    if file is not None:
        sparsity = read_sparsity(file)
        density = sparsity.density
        mean = sum(density) / len(density) if isinstance(density, tuple) else density
        found.append(Candidate(file.stem, mean, sparsity))
    return tuple(found)


def _end(out: Path, problems: Mapping[str, str], images: int) -> None:
    """Say what was written and what was left out."""
    typer.echo(f"wrote {out}")
    for name, problem in problems.items():
        typer.echo(f"left out: {name}: {problem}", err=True)
    if problems:
        typer.echo(f"{len(problems)} of {images} images left out", err=True)
        raise typer.Exit(1)
