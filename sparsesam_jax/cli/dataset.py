"""Whole data sets: `sparsesam embed`, `segment-dataset` and `store`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparsesam_jax.cli.options import (
    BitsOption,
    Command,
    DtypeOption,
    ImplementationOption,
    LimitOption,
    MaxPixelsOption,
    PaddingOption,
    ProductsOption,
    ValueRangeOption,
    WeightsOption,
    check_implementation,
)

if TYPE_CHECKING:
    from sparsesam_jax.datasets.jobs import Job
    from sparsesam_jax.datasets.store import ShardSummary, Store

Engine = Literal["local", "ray"]
_SHOWN = 20  # photos that were left out, of which the index names all

SourceArgument = Annotated[
    str,
    typer.Argument(help="A folder, a pattern, a list (.txt), a tar of webdataset or many."),
]
StoreOption = Annotated[Path, typer.Option("--out", help="The store, a folder.")]
DensityOption = Annotated[
    float | None, typer.Option(help="What the encoder keeps, (0, 1]. Without it: dense SAM.")
]
BatchOption = Annotated[int, typer.Option(help="Photos of an encoder call, on each device.")]
ImageSizeOption = Annotated[
    int | None, typer.Option(help="Side of the padded input. [the model's]")
]
ShardSizeOption = Annotated[
    int | None, typer.Option(help="Photos of a shard. [512; a tar is a shard]")
]
MaxSideOption = Annotated[int, typer.Option(help="Longest side of a photo in pixels.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(help="Processes that decode photos; 0 decodes in threads. [one a processor]"),
]
PartOption = Annotated[
    str,
    typer.Option("--shard", metavar="I/N|jax", help="Only part I of N; jax: the process's index."),
]
EngineOption = Annotated[Engine, typer.Option(help="Who runs the shards.")]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Stop at the first photo that cannot be read.")
]


def embed(
    source: SourceArgument,
    out: StoreOption,
    weights: WeightsOption = "vit_t",
    density: DensityOption = None,
    dtype: DtypeOption = "float32",
    store_dtype: Annotated[
        Literal["float16", "bfloat16"], typer.Option(help="Of the features in the store.")
    ] = "float16",
    implementation: ImplementationOption = "auto",
    products: ProductsOption = "dtype",
    batch: BatchOption = 8,
    image_size: ImageSizeOption = None,
    padding: PaddingOption = "square",
    limit: LimitOption = None,
    shard_size: ShardSizeOption = None,
    bits: BitsOption = None,
    value_range: ValueRangeOption = None,
    max_pixels: MaxPixelsOption = None,
    max_side: MaxSideOption = 20000,
    workers: WorkersOption = None,
    part: PartOption = "0/1",
    engine: EngineOption = "local",
    strict: StrictOption = False,
) -> None:
    """Embed every photo of a data set into a store, for SamPredictor.set_embedding(store[i]).

    Work is cut into shards. A run that was killed continues where it stopped, and the store ends
    up with the same bytes. Every shard is one JSON line. Photos that cannot be read are listed in
    the store with their reason; the exit code is then 1.
    """
    from sparsesam_jax.datasets.embed import EmbedJob
    from sparsesam_jax.datasets.jobs import ModelOptions
    from sparsesam_jax.datasets.sources import find_source
    from sparsesam_jax.predict.image_files import PhotoReader

    reader = PhotoReader(
        bits=bits, value_range=value_range, max_pixels=max_pixels, max_side=max_side
    )
    job = EmbedJob(
        source=find_source(source, shard_size=shard_size, limit=limit),
        model=ModelOptions(
            weights=weights,
            density=density,
            dtype=dtype,
            implementation=implementation,
            products=products,
            image_size=image_size,
            padding=padding,
            batch=batch,
        ),
        store_dtype=store_dtype,
        reader=reader,
    )
    _run(job, out, part, engine, workers, strict, implementation)


def segment_dataset(
    source: SourceArgument,
    out: StoreOption,
    prompts: Annotated[
        Path | None,
        typer.Option(help="COCO's JSON, a detector's results or a CSV: boxes or points."),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO's JSON that names a detector's images.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Instead of prompts: masks of everything.")
    ] = False,
    points_per_side: Annotated[int, typer.Option(help="Of everything's grid of points.")] = 32,
    pred_iou_thresh: Annotated[float, typer.Option(help="Everything's least score.")] = 0.88,
    stability_score_thresh: Annotated[
        float, typer.Option(help="Everything's least stability.")
    ] = 0.95,
    min_mask_region_area: Annotated[
        int, typer.Option(help="Everything's smallest hole or island in pixels.")
    ] = 0,
    weights: WeightsOption = "vit_t",
    density: DensityOption = None,
    dtype: DtypeOption = "float32",
    implementation: ImplementationOption = "auto",
    products: ProductsOption = "dtype",
    batch: BatchOption = 8,
    image_size: ImageSizeOption = None,
    padding: PaddingOption = "square",
    limit: LimitOption = None,
    shard_size: ShardSizeOption = None,
    bits: BitsOption = None,
    value_range: ValueRangeOption = None,
    max_pixels: MaxPixelsOption = None,
    max_side: MaxSideOption = 20000,
    workers: WorkersOption = None,
    part: PartOption = "0/1",
    engine: EngineOption = "local",
    strict: StrictOption = False,
) -> None:
    """Segment every photo of a data set: COCO's results, one mask a box or a group of points.

    It runs as embed does. `sparsesam store export` makes one file of the shards' results.
    """
    from sparsesam_jax.datasets.jobs import ModelOptions
    from sparsesam_jax.datasets.masks import EverythingOptions, MaskJob
    from sparsesam_jax.datasets.prompt_files import read_prompts
    from sparsesam_jax.datasets.sources import find_source
    from sparsesam_jax.predict.image_files import PhotoReader

    if everything == (prompts is not None):
        raise ValueError("either --prompts or --everything must be given")
    found = find_source(source, shard_size=shard_size, limit=limit)
    asked = None if prompts is None else read_prompts(prompts, annotations)
    if asked is not None:
        asked.check(found)
    job = MaskJob(
        source=found,
        model=ModelOptions(
            weights=weights,
            density=density,
            dtype=dtype,
            implementation=implementation,
            products=products,
            image_size=image_size,
            padding=padding,
            batch=batch,
        ),
        prompts=asked,
        everything=EverythingOptions(
            points_per_side=points_per_side,
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            min_mask_region_area=min_mask_region_area,
        ),
        reader=PhotoReader(
            bits=bits, value_range=value_range, max_pixels=max_pixels, max_side=max_side
        ),
    )
    _run(job, out, part, engine, workers, strict, implementation)


store = typer.Typer(help="What a store of embed or segment-dataset holds.")


@store.command(cls=Command)
def info(path: Annotated[Path, typer.Argument(metavar="STORE", help="The store.")]) -> None:
    """Say what a store holds, and what was left out."""
    from sparsesam_jax.datasets.store import Store

    found = Store(path)
    done = [found.summary(shard) for shard in range(found.num_shards) if found.is_done(shard)]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for key, value in found.settings.items():
        typer.echo(f"{key:15}{json.dumps(value) if isinstance(value, dict) else value}")
    typer.echo(f"{'done':15}{len(done)} of {found.num_shards} shards, {size / 1e6:.1f} MB")
    typer.echo(f"{'photos':15}{sum(one.photos for one in done)}")
    typer.echo(f"{'left out':15}{sum(one.failed for one in done)}")
    problems = (
        (record["name"], record["error"])
        for one in done
        if one.failed
        for record in found.index(one.shard).to_pylist()
        if record["error"] is not None
    )
    for (name, error), _ in zip(problems, range(_SHOWN), strict=False):
        typer.echo(f"  {name}: {error}")


@store.command(cls=Command)
def verify(path: Annotated[Path, typer.Argument(metavar="STORE", help="The store.")]) -> None:
    """Read everything in a store and compare it with its checksums; exit code 1 if it differs."""
    from sparsesam_jax.datasets import embedding_store, masks
    from sparsesam_jax.datasets.store import Store

    found = Store(path)
    damaged = {embedding_store.KIND: embedding_store.damaged, masks.KIND: masks.damaged}[found.kind]
    problems = photos = done = 0
    for shard in filter(found.is_done, range(found.num_shards)):
        done += 1
        try:
            photos += found.summary(shard).photos
            wrong = list(damaged(found, shard))
        except ValueError as error:
            wrong = [str(error)]
        for text in wrong:
            typer.echo(f"damaged: {text}", err=True)
        problems += len(wrong)
    typer.echo(f"{done} of {found.num_shards} shards, {photos} photos, {problems} damaged")
    if problems:
        raise typer.Exit(1)


@store.command(cls=Command)
def export(
    path: Annotated[Path, typer.Argument(metavar="STORE", help="A store of segment-dataset.")],
    out: Annotated[Path, typer.Option(help="The file, JSON.")],
) -> None:
    """Write all masks of a store as one file of COCO's results."""
    from sparsesam_jax.checkpoints.atomic import check_file
    from sparsesam_jax.datasets import masks
    from sparsesam_jax.datasets.store import Store

    check_file(out, "out")
    typer.echo(f"wrote {out}, {masks.export(Store(path), out)} masks")


def _run(
    job: Job,
    out: Path,
    part: str,
    engine: Engine,
    workers: int | None,
    strict: bool,
    implementation: Any,
) -> None:
    """Run a job's part, say how it goes, and how it ended."""
    import os

    from sparsesam_jax.datasets.engine import run_shards
    from sparsesam_jax.datasets.loading import check_loader
    from sparsesam_jax.datasets.ray_engine import check_ray, run_on_ray
    from sparsesam_jax.datasets.sources import part_of

    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    check_loader(workers)
    if engine == "ray":
        check_ray()
    numbers = _part(part)
    shards = part_of(job.source.num_shards, numbers)
    if engine == "local":
        check_implementation(implementation, "embed")
    found = job.store(out)
    run: Callable[..., None] = run_on_ray if engine == "ray" else run_shards
    with found.locked(shards), _progress(found, shards) as report:
        run(job, found, shards, report, workers=workers, strict=strict)
    done = [found.summary(shard) for shard in shards]
    failed, photos = sum(one.failed for one in done), sum(one.photos for one in done)
    if failed:
        text = f"{failed} of {photos + failed} photos left out: sparsesam store info {out}"
        typer.echo(text, err=True)
        raise typer.Exit(1)


def _part(text: str) -> tuple[int, int]:
    """Which part of how many."""
    if text == "jax":
        import jax

        jax.distributed.initialize()
        return jax.process_index(), jax.process_count()
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--shard must be I/N with I from 0 to N - 1, or jax; got {text!r}")
    return int(index), int(count)


@contextlib.contextmanager
def _progress(store: Store, shards: range) -> Iterator[Callable[[ShardSummary], None]]:
    """One JSON line a shard, and a bar on standard error where it is a terminal."""
    todo = [shard for shard in shards if not store.is_done(shard)]
    size = store.shard_size
    rows = {shard: min(size, store.num_rows - shard * size) for shard in todo}
    left, began, photos, failed, shown = sum(rows.values()), time.perf_counter(), 0, 0, 0
    last, busy = began, 0.0
    with _bar(left) as advance:

        def report(shard: ShardSummary) -> None:
            nonlocal left, photos, failed, shown, last, busy
            now = time.perf_counter()
            left -= rows[shard.shard]
            photos, failed = photos + shard.photos, failed + shard.failed
            total = photos + failed
            line = {
                "shard": shard.shard,
                "photos": shard.photos,
                "failed": shard.failed,
                "seconds": round(now - last, 3),
                "photos_per_second": round(total / (now - began), 3),
                "device_busy": None,
                "seconds_left": round(left * (now - began) / max(1, total), 1),
                "failures": failed,
            }
            busy_s = getattr(shard, "busy_s", None)
            if busy_s is not None:
                line["device_busy"] = round((busy_s - busy) / (now - last), 3)
                busy = busy_s
            last = now
            typer.echo(json.dumps(line))
            for name, error in getattr(shard, "problems", {}).items():
                if shown < _SHOWN:
                    typer.echo(f"left out: {name}: {error}", err=True)
                shown += 1
            advance(rows[shard.shard], line)

        yield report


@contextlib.contextmanager
def _bar(photos: int) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    if not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda count, line: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("starting", total=photos)

        def advance(count: int, line: dict[str, Any]) -> None:
            busy = line["device_busy"]
            text = f"{line['photos_per_second']} photos/s, {line['failures']} left out"
            text += "" if busy is None else f", devices busy {100 * busy:.0f} %"
            progress.update(task, advance=count, description=text)

        yield advance
