"""`sparsesam segment`: masks of photos from points and boxes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer

from sparsesam_jax.cli.options import (
    BitsOption,
    DtypeOption,
    ImplementationOption,
    MaxPixelsOption,
    PaddingOption,
    ProductsOption,
    ValueRangeOption,
    WeightsOption,
    check_implementation,
    numbers,
)
from sparsesam_jax.cli.progress import progress
from sparsesam_jax.config import SamConfig, Sparsity

if TYPE_CHECKING:
    from sparsesam_jax.predict.predictor import SamPredictor
    from sparsesam_jax.predict.prompts import Prompt


def segment(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE ...", help="Photos, folders of photos, patterns as '*.jpg'."),
    ],
    weights: WeightsOption = "vit_t",
    point: Annotated[
        list[str] | None, typer.Option(metavar="X Y", help="A point in pixels; repeatable.")
    ] = None,
    label: Annotated[
        list[int] | None,
        typer.Option(
            metavar="0|1 ...",
            help="Each point's label, background or foreground; none: all foreground.",
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="X0 Y0 X1 Y1", help="A box in pixels; repeatable."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Instead: JSON or CSV of boxes, points and labels by photo."
        ),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(
            metavar="R ...",
            help="What the encoder keeps, (0, 1]; several may follow. Without it: dense SAM.",
        ),
    ] = None,
    implementation: ImplementationOption = "auto",
    dtype: DtypeOption = "float32",
    products: ProductsOption = "dtype",
    padding: PaddingOption = "square",
    multimask: Annotated[
        bool, typer.Option("--multimask", help="The proposals for an ambiguous prompt, not one.")
    ] = False,
    bits: BitsOption = None,
    value_range: ValueRangeOption = None,
    max_pixels: MaxPixelsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The mask, 0 and 255; a folder (a name without suffix) for all masks."),
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(help="The photo under each prompt's best mask; a folder for all photos."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object a photo, a line each."),
    ] = False,
) -> None:
    """Segment photos from points and boxes, in pixels of the upright photo.

    Each box is a prompt, and every point belongs to every box's prompt; points without a box are
    one prompt. A prompt gives one mask, or all proposals with --multimask, in the model's order.
    Masks are numbered over all prompts; a mask's box is x0 y0 x1 y1 with x1 and y1 one past it.

    The prompts are for every photo, unless --prompts names a file that has each photo's own. A
    photo that cannot be read, that a prompt does not lie in, or that the file has no prompts for is
    reported and left out; the exit code is then 1.

    The mask is written to OUT; several become OUT_0.png, OUT_1.png ..., with several densities
    OUT_0.3.png or OUT_0.3_0.png. In a folder, OUT is the photo's name, and an overlay is
    PHOTO_overlay.png.
    """
    from sparsesam_jax.checkpoints.sources import locate
    from sparsesam_jax.predict.image_files import PhotoReader, find_photos
    from sparsesam_jax.predict.prompt_files import read_prompts
    from sparsesam_jax.predict.prompts import PromptLists

    reader = PhotoReader(bits=bits, value_range=value_range, max_pixels=max_pixels)
    densities = list(dict.fromkeys(density or [None]))
    sparsities = {value: None if value is None else Sparsity(value) for value in densities}
    given = PromptLists(numbers("--point", point), label or [], numbers("--box", box))
    file = None if prompts is None else read_prompts(prompts)
    if file is None:
        given.check()
    elif any(given[:3]):
        raise ValueError("--prompts must be given without --point, --label and --box")
    paths = find_photos(images)
    outputs = _Outputs(out, overlay, several=len(densities) > 1)
    asked = {path: given if file is None else file.find(path) for path in paths}
    counts = {path: lists.num_prompts for path, lists in asked.items()}
    outputs.check(counts, densities, SamConfig.num_multimask_outputs if multimask else 1)
    locate(weights)

    def read(path: Path) -> _Photo:
        if not counts[path]:
            raise ValueError(f"{prompts} must have prompts for it, got none")
        pixels = reader.read(path)
        height, width = pixels.shape[:2]
        return _Photo(path, pixels, asked[path].prompts(width=width, height=height))

    if len(paths) == 1:
        read(paths[0])  # what is wrong with the only photo is an error, and seen before JAX starts
    check_implementation(implementation, "segment")

    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.predict.predictor import SamPredictor

    clock = _Clock()
    sam = Sam.from_pretrained(
        weights, dtype=dtype, implementation=implementation, products=products
    )
    predictors = {
        value: SamPredictor(
            sam if sparsity is None else sam.with_sparsity(sparsity), padding=padding
        )
        for value, sparsity in sparsities.items()
    }
    load_s = clock.lap()
    if multimask:  # a model may have another number of proposals than SAM's
        outputs.check(counts, densities, sam.config.num_multimask_outputs)
    common = {
        "weights": weights,
        "implementation": implementation,
        "dtype": dtype,
        "padding": padding,
    }
    as_text = _as_text if len(paths) * len(densities) == 1 else _as_line
    problems = 0
    with progress("segmenting", len(paths)) as advance:
        for path in paths:
            try:
                photo = read(path)
            except ValueError as error:
                problems += 1
                typer.echo(f"left out: {path}: {error}", err=True)
                if as_json:
                    typer.echo(json.dumps({"image": str(path), "error": str(error)}))
            else:
                for value, predictor in predictors.items():
                    found = _predict(predictor, photo, multimask)
                    report = {
                        "image": str(path),
                        "width": photo.pixels.shape[1],
                        "height": photo.pixels.shape[0],
                        **common,
                        "density": value,
                        **outputs.write(photo, value, found),
                        "seconds": {"load": load_s, **found.seconds},
                    }
                    typer.echo(json.dumps(report, allow_nan=False) if as_json else as_text(report))
            advance()
    if problems:
        typer.echo(f"{problems} of {len(paths)} photos left out", err=True)
        raise typer.Exit(1)


class _Photo(NamedTuple):
    path: Path
    pixels: np.ndarray
    prompts: list[Prompt]


class _Found(NamedTuple):
    """What a model finds in a photo: masks and scores of all prompts, one after another.

    Attributes:
        masks: Each [height, width].
        scores: Predicted IoU.
        best: Each prompt's best mask, by its number.
        seconds: Of encoding and of prediction.
    """

    masks: list[np.ndarray]
    scores: list[float]
    best: list[int]
    seconds: dict[str, float]


class _Outputs(NamedTuple):
    """Where masks and overlays go.

    Attributes:
        out: `--out`.
        overlay: `--overlay`.
        several: Whether there are several densities, which are then part of a file's name.
    """

    out: Path | None
    overlay: Path | None
    several: bool

    def check(
        self, photos: Mapping[Path, int], densities: Sequence[float | None], masks: int
    ) -> None:
        """Raise ValueError unless all masks and overlays of all photos can be written.

        Args:
            photos: The photos, and how many prompts each has.
            densities: What each is segmented at.
            masks: Masks of a prompt.
        """
        from sparsesam_jax.checkpoints.atomic import check_folder
        from sparsesam_jax.predict.image_files import check_writable

        for option, path in (("--out", self.out), ("--overlay", self.overlay)):
            if path is not None and _is_folder(path):
                check_folder(path, option)
            elif path is not None:
                check_writable(path, is_mask=option == "--out")
                if len(photos) > 1:
                    raise ValueError(
                        f"{option} must be a folder, a name without suffix, for {len(photos)} "
                        f"photos, got {str(path)!r}"
                    )
        taken = {path.resolve() for path in photos}
        for photo, prompts in photos.items():
            for density in densities if prompts else ():
                outputs = self.mask_paths(photo, density, prompts * masks)
                overlay = self.overlay_path(photo, density)
                outputs += [overlay] if overlay else []
                for path in outputs:
                    if path.resolve() in taken:
                        raise ValueError(
                            f"image, --out and --overlay must be different files, got {path} twice"
                        )
                    taken.add(path.resolve())
                    if path.is_dir():
                        raise ValueError(
                            f"output must be a file that can be written, got {str(path)!r}"
                        )

    def mask_paths(self, photo: Path, density: float | None, count: int) -> list[Path]:
        """Where the masks of a photo go; nowhere without `--out`."""
        if self.out is None:
            return []
        path = self.out / f"{photo.stem}.png" if _is_folder(self.out) else self.out
        numbers = [""] if count == 1 else [f"_{index}" for index in range(count)]
        return [self._named(path, density, number) for number in numbers]

    def overlay_path(self, photo: Path, density: float | None) -> Path | None:
        """Where the overlay of a photo goes, if there is one."""
        if self.overlay is None:
            return None
        folder = _is_folder(self.overlay)
        path = self.overlay / f"{photo.stem}.png" if folder else self.overlay
        return self._named(path, density, "_overlay" if folder else "")

    def write(self, photo: _Photo, density: float | None, found: _Found) -> dict[str, Any]:
        """Write what is found in a photo, and describe it for the report."""
        from PIL import Image

        from sparsesam_jax.predict.image_files import write_images
        from sparsesam_jax.predict.overlay import draw_masks

        paths = self.mask_paths(photo.path, density, len(found.masks))
        overlay = self.overlay_path(photo.path, density)
        pictures = {
            path: Image.fromarray(mask.astype(np.uint8) * 255)
            for path, mask in zip(paths, found.masks, strict=bool(paths))
        }
        if overlay is not None:
            best = [found.masks[index] for index in found.best]
            pictures[overlay] = draw_masks(photo.pixels, best, photo.prompts)
        for path in pictures:
            path.parent.mkdir(exist_ok=True)
        write_images(pictures)
        each = len(found.masks) // len(photo.prompts)
        masks = [
            {
                "prompt": index // each,
                "score": found.scores[index],
                "area": int(mask.sum()),
                "box": _bounding_box(mask),
                "path": str(paths[index]) if paths else None,
            }
            for index, mask in enumerate(found.masks)
        ]
        return {"masks": masks, "overlay": None if overlay is None else str(overlay)}

    def _named(self, path: Path, density: float | None, ending: str) -> Path:
        tag = f"_{density:g}" if self.several else ""
        return path.with_name(f"{path.stem}{tag}{ending}{path.suffix}")


def _is_folder(path: Path) -> bool:
    """Whether an output is a folder's name: it has no suffix, or there is such a folder."""
    from PIL import Image

    known = path.suffix.lower() in Image.registered_extensions()
    return not path.suffix or (path.is_dir() and not known)


class _Clock:
    """Seconds since its last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = round(now - self._last, 4), now
        return seconds


def _predict(predictor: SamPredictor, photo: _Photo, multimask: bool) -> _Found:
    from sparsesam_jax.predict.finite import check_finite

    clock = _Clock()
    predictor.set_image(photo.pixels)
    predictor.get_image_embedding().block_until_ready()
    encode_s = clock.lap()
    found = _Found([], [], [], {})
    # One call a prompt: whatever their number, one compilation, and the memory of one.
    for prompt in photo.prompts:
        masks, scores, logits = predictor.predict(**prompt.arguments, multimask_output=multimask)
        check_finite(predictor.sam, scores, logits)
        found.best.append(len(found.masks) + int(scores.argmax()))
        found.masks.extend(masks)
        found.scores.extend(float(score) for score in scores)
    return found._replace(seconds={"encode": encode_s, "predict": clock.lap()})


def _bounding_box(mask: np.ndarray) -> list[int] | None:
    """x0, y0, x1, y1 of the mask, the latter two one past it; None if it is empty."""
    rows, cols = mask.nonzero()
    if not len(rows):
        return None
    return [int(cols.min()), int(rows.min()), int(cols.max()) + 1, int(rows.max()) + 1]


def _as_text(report: Mapping[str, Any]) -> str:
    """A report of several lines, for one photo alone."""
    lines = [f"{_title(report)}, {report['weights']}"]
    for index, mask in enumerate(report["masks"]):
        box = "empty" if mask["box"] is None else " ".join(map(str, mask["box"]))
        lines.append(
            f"mask {index}: prompt {mask['prompt']}, score {mask['score']:.3f}, "
            f"area {mask['area']}, box {box}"
        )
    lines += [f"wrote {path}" for path in _written(report)]
    times = ", ".join(f"{name} {value:.2f} s" for name, value in report["seconds"].items())
    return "\n".join([*lines, f"{times} (compilation included)"])


def _as_line(report: Mapping[str, Any]) -> str:
    """A report of one line."""
    scores = " ".join(f"{mask['score']:.3f}" for mask in report["masks"])
    areas = " ".join(str(mask["area"]) for mask in report["masks"])
    written = _written(report)
    wrote = f", wrote {' '.join(written)}" if written else ""
    return f"{_title(report)}: scores {scores}, areas {areas}{wrote}"


def _title(report: Mapping[str, Any]) -> str:
    density = "dense" if report["density"] is None else f"density {report['density']:g}"
    return f"{report['image']}: {report['width']} x {report['height']}, {density}"


def _written(report: Mapping[str, Any]) -> list[str]:
    paths = [mask["path"] for mask in report["masks"]] + [report["overlay"]]
    return [path for path in paths if path is not None]
