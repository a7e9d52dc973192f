"""`sparsesam tune`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsesam_jax.choices import Dtype, Implementation
from sparsesam_jax.cli.options import ResumeOption, WeightsOption, check_positive

if TYPE_CHECKING:
    pass

STAGES = ["1024:4"]
TRAIN = ["decoder"]


def tune(
    images: Annotated[Path, typer.Option(help="Folder of photos.")],
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder with a mask of each stem, or a folder of its masks."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Or: folder of 8-bit label maps, 0 unlabelled.")
    ] = None,
    targets: Annotated[
        Path | None, typer.Option(help="JSON: which labels are a mask, see the guide.")
    ] = None,
    coco: Annotated[Path | None, typer.Option(help="Or: COCO's instances, JSON.")] = None,
    side: Annotated[int, typer.Option(help="Photos are kept with this longest side.")] = 512,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC=W ...", help="How often a source of the JSON is drawn."),
    ] = None,
    validation_images: Annotated[Path | None, typer.Option(help="Photos to measure on.")] = None,
    validation_masks: Annotated[Path | None, typer.Option(help="Their masks.")] = None,
    weights: WeightsOption = "vit_t",
    train: Annotated[
        list[str],
        typer.Option(
            metavar="NAME ...",
            help="What is tuned: all, decoder, encoder, neck, lora, or patterns of names.",
        ),
    ] = TRAIN,
    stage: Annotated[
        list[str],
        typer.Option(
            metavar="SIZE:BATCH[:SHARE] ...", help="Size of the input, photos of a step; in turn."
        ),
    ] = STAGES,
    steps: Annotated[int | None, typer.Option(help="Length of the run.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Or: by the clock.")] = None,
    prompts: Annotated[int, typer.Option(help="Masks of a photo in a step.")] = 6,
    rounds: Annotated[int, typer.Option(help="Prompts of a mask, each correcting.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 1e-4,
    warmup: Annotated[int, typer.Option(help="Steps until then.")] = 50,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.05,
    ema: Annotated[float, typer.Option(help="What the average keeps a step; 0: none.")] = 0.998,
    focal: Annotated[float, typer.Option(help="Weight of the focal loss.")] = 20.0,
    dice: Annotated[float, typer.Option(help="Weight of the dice loss.")] = 1.0,
    iou: Annotated[float, typer.Option(help="Weight of the predicted IoU's error.")] = 1.0,
    alpha: Annotated[float, typer.Option(help="The focal loss's share of foreground.")] = 0.25,
    paste: Annotated[float, typer.Option(help="Probability of a pasted object.")] = 0.25,
    lora: Annotated[int, typer.Option(help="Rank of updates of qkv; 0: none.")] = 0,
    density: Annotated[
        float | None, typer.Option(help="Tune the sparse encoder of this density, (0, 1].")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Weights of a model to follow: a file or a folder.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Or: folder of its embeddings; photos then stay in place.")
    ] = None,
    features: Annotated[
        float, typer.Option(help="Weight of the distance to the teacher's features.")
    ] = 0.0,
    teacher_masks: Annotated[
        bool, typer.Option("--teacher-masks", help="The teacher's masks are the targets.")
    ] = False,
    accumulate: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    remat: Annotated[bool, typer.Option("--remat", help="Save memory: compute twice.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="What is computed in.")] = "float32",
    implementation: Annotated[
        Implementation, typer.Option(help="Kernels have no gradient: xla, which has cuDNN.")
    ] = "xla",
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    processes: Annotated[int, typer.Option(help="That read photos; 0: threads.")] = 0,
    validate_every: Annotated[int, typer.Option(help="Steps; 0: at the end.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    log_every: Annotated[int, typer.Option(help="Steps between lines of the log.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("tuning"),
    resume: ResumeOption = False,
) -> None:
    """Tune SAM on photos with masks.

    Writes model.safetensors (float32), log.jsonl, losses.png, settings.json and checkpoints, from
    which --resume continues a run that was ended.
    """
    from sparsesam_jax.checkpoints.atomic import check_folder
    from sparsesam_jax.checkpoints.sources import locate
    from sparsesam_jax.evaluation.datasets import folder_pairs, read_photo
    from sparsesam_jax.tuning.data import find, load

    check_positive(side=side, prompts=prompts, rounds=rounds)
    stages = tuple(_stage(text) for text in stage)
    shares = dict(_weight(text) for text in weight or [])
    if (validation_images is None) != (validation_masks is None):
        raise ValueError("--validation-images and --validation-masks go together, got one")
    sources = find(images, masks=masks, labels=labels, coco=coco, targets=targets)
    validation = []
    if validation_images is not None and validation_masks is not None:
        validation = [
            read_photo(pair) for pair in folder_pairs(validation_images, validation_masks)
        ]
    check_folder(out)
    for name in (weights, *([] if teacher is None else [teacher])):
        locate(name)
    # The photos are read while JAX and the model are.
    pool = ThreadPoolExecutor(1)
    options = {"weights": shares, "processes": processes, "embeddings": embeddings}
    reading = pool.submit(load, sources, side, **options)

    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.config import Sparsity
    from sparsesam_jax.tuning import run
    from sparsesam_jax.tuning.augment import STILL, Augmentation
    from sparsesam_jax.tuning.curves import draw_curves
    from sparsesam_jax.tuning.lora import add_lora
    from sparsesam_jax.tuning.losses import Losses
    from sparsesam_jax.tuning.objective import Objective
    from sparsesam_jax.tuning.prompting import Prompting
    from sparsesam_jax.tuning.step import Optimiser

    settings = run.Settings(
        stages=tuple(run.Stage(**stage) for stage in stages),
        steps=steps,
        seconds=seconds,
        targets=prompts,
        accumulate=accumulate,
        train=tuple(train),
        seed=seed,
        objective=Objective(
            prompting=Prompting(rounds=rounds),
            losses=Losses(focal=focal, dice=dice, iou=iou, alpha=alpha),
            features=features,
            teacher_masks=teacher_masks,
        ),
        optimiser=Optimiser(
            learning_rate=learning_rate, warmup=warmup, weight_decay=weight_decay, ema=ema
        ),
        augmentation=Augmentation(paste=paste) if embeddings is None else STILL,
        log_every=log_every,
        save_every=save_every,
        validate_every=validate_every,
    )
    precision: Any = {"dtype": dtype, "param_dtype": "float32", "residual_dtype": "float32"}
    precision |= {"implementation": implementation}
    sparsity = None if density is None else Sparsity(density)
    sam = Sam.from_pretrained(weights, sparsity=sparsity, remat=remat, **precision)
    if lora:
        sam = add_lora(sam, lora, seed)
    model = None if teacher is None else Sam.from_pretrained(teacher, **precision)
    photos = reading.result()
    typer.echo(f"{len(photos)} photos with {len(photos.members)} masks")
    run.tune(
        sam,
        photos,
        settings,
        out,
        teacher=model,
        validation=validation,
        resume=resume,
        report=_report,
    )
    draw_curves(out / run.LOG, out / "losses.png")
    typer.echo(f"wrote {out / run.MODEL}")


def _stage(text: str) -> dict[str, Any]:
    try:
        size, batch, share = (*text.split(":"), "1")[:3]
        if text.count(":") > 2:
            raise ValueError
        return {"image_size": int(size), "batch": int(batch), "share": float(share)}
    except ValueError:
        expected = "SIZE:BATCH or SIZE:BATCH:SHARE"
        raise ValueError(f"--stage must be {expected}, got {text!r}") from None


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--weight must be SOURCE=NUMBER, got {text!r}") from None


def _report(line: dict[str, Any]) -> None:
    if "compile_seconds" in line:
        typer.echo(f"compiled in {line['compile_seconds']:.0f} s")
        return
    if scores := line.get("validation"):
        text = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        typer.echo(f"step {line['step']}: {text}")
        return
    typer.echo(
        f"step {line['step']} ({100 * line['progress']:.0f} %): loss {line['loss']:.4f}, "
        f"IoU {line['iou_0']:.3f}, {line['images_per_second']:.0f} photos/s"
    )
