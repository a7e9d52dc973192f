"""The command line: `sparsesam demo`, `segment`, `info`, `convert` and those of `cli_evaluate`.

Whatever is wrong with the input is said in one line on standard error, with exit code 2, and then
nothing is written. JAX is imported by the commands that compute.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from typer.core import TyperCommand

from sparsesam_jax.cli import evaluate as cli_evaluate

# As pallas_kernels.implementation has it, which is slow to import; a test compares them.
Implementation = Literal["auto", "xla", "mosaic_gpu"]
Dtype = Literal["float32", "bfloat16", "float16"]

Weights = Annotated[str, typer.Option(help="vit_t (embedded) or a converted file.")]
ImplementationOption = Annotated[
    Implementation, typer.Option(help="xla, the GPU kernels, or auto: those where they run.")
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="What is computed in; the GPU kernels need 16 bits.")
]

_NUMBERS = {"--point": "X Y", "--box": "X0 Y0 X1 Y1"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for wrong input, 130 when interrupted."""
    try:
        arguments = None if args is None else [*args]
        return app(args=arguments, prog_name="sparsesam", standalone_mode=False) or 0
    except typer.TyperException as error:
        return _fail(error.format_message())
    except (ValueError, OSError, importlib.metadata.PackageNotFoundError) as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


class _NumbersCommand(TyperCommand):
    """A command whose `--point` and `--box` take several numbers and may be repeated.

    typer has no repeated options of several values, so the values become one text.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined, rest = [], list(args)
        while rest:
            joined.append(rest.pop(0))
            if joined[-1] == "--":
                break
            if joined[-1] in _NUMBERS:
                values = []
                while rest and len(values) < len(_NUMBERS[joined[-1]].split()):
                    if rest[0].startswith("--"):
                        break
                    values.append(rest.pop(0))
                joined.append(" ".join(values))
        return super().parse_args(ctx, joined + rest)


def _numbers(option: str, texts: list[str] | None) -> list[tuple[float, ...]]:
    expected = _NUMBERS[option]
    values = []
    for text in texts or []:
        try:
            values.append(tuple(float(number) for number in text.split()))
        except ValueError:
            values.append(())
        if len(values[-1]) != len(expected.split()):
            raise ValueError(f"{option} must be {expected} in pixels, got {text!r}")
    return values


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"sparsesam {importlib.metadata.version('sparsesam-jax')}")
        raise typer.Exit
    return wanted


@app.callback()
def _sparsesam(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """SAM in Flax NNX with SparseSAM's sparse attention: promptable segmentation of photos."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("overlay.png"),
    density: Annotated[float, typer.Option(help="What the sparse model keeps, (0, 1].")] = 0.4,
    weights: Weights = "vit_t",
    implementation: ImplementationOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Segment a photo from a point and from a box, dense and sparse, and compare.

    Prints the encoder's time with and without compilation and the IoU of dense and sparse masks.
    The overlay shows both models side by side: blue the point's mask, yellow the box's.
    """
    from sparsesam_jax.config import Sparsity
    from sparsesam_jax.predict.image_files import check_writable

    check_writable(out)
    Sparsity(density)
    _check_implementation(implementation, "sparsesam demo")
    from sparsesam_jax.cli.demo import run

    run(out, density, weights, implementation, dtype)


@app.command(cls=_NumbersCommand)
def segment(
    image: Annotated[Path, typer.Argument(help="A photo; its EXIF orientation is applied.")],
    weights: Weights = "vit_t",
    point: Annotated[
        list[str] | None, typer.Option(metavar="X Y", help="A point in pixels; repeatable.")
    ] = None,
    label: Annotated[
        list[int] | None,
        typer.Option(
            metavar="0|1",
            help="Each point's label, background or foreground; none: all foreground.",
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="X0 Y0 X1 Y1", help="A box in pixels; repeatable."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="What the encoder keeps, (0, 1]. Without it: dense SAM.")
    ] = None,
    implementation: ImplementationOption = "auto",
    dtype: DtypeOption = "float32",
    multimask: Annotated[
        bool, typer.Option("--multimask", help="The proposals for an ambiguous prompt, not one.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The mask, 0 and 255; several are NAME_0.png, NAME_1.png ..."),
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="The photo under each prompt's best mask.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")
    ] = False,
) -> None:
    """Segment a photo from points and boxes, in pixels of the upright photo.

    Each box is a prompt, and every point belongs to every box's prompt; points without a box are
    one prompt. A prompt gives one mask, or all proposals with --multimask, in the model's order.
    Masks are numbered over all prompts; a mask's box is x0 y0 x1 y1 with x1 and y1 one past it.
    """
    from sparsesam_jax.config import Sparsity
    from sparsesam_jax.predict.image_files import check_writable, read_image, write_images

    for path in (out, overlay):
        if path is not None:
            check_writable(path, is_mask=path is out)
    sparsity = None if density is None else Sparsity(density)
    points, boxes = _numbers("--point", point), _numbers("--box", box)
    from sparsesam_jax.predict.prompts import make_prompts

    pixels = read_image(image)
    height, width = pixels.shape[:2]
    prompts = make_prompts(points, label or [], boxes, width=width, height=height)
    _check_implementation(implementation, "sparsesam segment")

    from PIL import Image

    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.predict.overlay import draw_masks
    from sparsesam_jax.predict.predictor import SamPredictor

    clock = _Clock()
    sam = Sam.from_pretrained(
        weights, sparsity=sparsity, dtype=dtype, implementation=implementation
    )
    each = sam.config.num_multimask_outputs if multimask else 1
    mask_paths = _mask_paths(out, each * len(prompts))
    _check_distinct([image, *mask_paths, *([] if overlay is None else [overlay])])
    clock.stop("load")
    predictor = SamPredictor(sam)
    predictor.set_image(pixels)
    predictor.get_image_embedding().block_until_ready()
    clock.stop("encode")
    # One call a prompt: whatever their number, one compilation, and the memory of one.
    masks, scores, best = [], [], []
    for prompt in prompts:
        proposals, iou, _ = predictor.predict(**prompt.arguments, multimask_output=multimask)
        best.append(len(masks) + int(iou.argmax()))
        masks.extend(proposals)
        scores.extend(float(score) for score in iou)
    clock.stop("predict")

    pictures = {
        path: Image.fromarray(mask.astype(np.uint8) * 255)
        for path, mask in zip(mask_paths, masks, strict=bool(mask_paths))
    }
    if overlay is not None:
        pictures[overlay] = draw_masks(pixels, [masks[index] for index in best], prompts)
    write_images(pictures)
    report = {
        "image": str(image),
        "width": width,
        "height": height,
        "weights": weights,
        "density": density,
        "implementation": implementation,
        "dtype": dtype,
        "masks": [
            {
                "prompt": index // each,
                "score": scores[index],
                "area": int(mask.sum()),
                "box": _bounding_box(mask),
                "path": str(mask_paths[index]) if mask_paths else None,
            }
            for index, mask in enumerate(masks)
        ],
        "overlay": None if overlay is None else str(overlay),
        "seconds": clock.seconds,
    }
    typer.echo(json.dumps(report) if as_json else _as_text(report))


@app.command()
def info(
    weights: Annotated[str, typer.Argument(help="vit_t (embedded) or a converted file.")],
    density: Annotated[
        list[float] | None, typer.Option(help="A density to describe; repeatable. [0.3, 0.4, 0.5]")
    ] = None,
    layout: Annotated[
        Path | None, typer.Option(help="A picture of the block layouts at these densities.")
    ] = None,
) -> None:
    """Describe weights, and what an encoder of their shape computes at some densities."""
    from sparsesam_jax.config import Sparsity
    from sparsesam_jax.predict.image_files import check_writable

    if layout is not None:
        check_writable(layout)
    sparsities = [Sparsity(value) for value in density or (0.3, 0.4, 0.5)]
    from sparsesam_jax.cli.describe import run

    run(weights, sparsities, layout)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
def convert(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="SRC DST ...")] = None,
) -> None:
    """Convert a SAM or SAM-HQ checkpoint between Meta's, Hugging Face's and this format."""
    # The arguments are those of `python -m convert`, whose import would slow down every command.
    from sparsesam_jax.cli.convert import convert_command

    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(convert_command)
    code = command(args=arguments or [], prog_name="sparsesam convert", standalone_mode=False)
    raise typer.Exit(code or 0)


cli_evaluate.register(app)


class _Clock:
    """Seconds between its stops."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 4), now


def _check_implementation(implementation: Implementation, function: str) -> None:
    """Say before any work that the GPU kernels cannot run here."""
    from pallas_kernels.implementation import resolve

    resolve(implementation, function=function)


def _mask_paths(out: Path | None, count: int) -> list[Path]:
    """The file itself for one mask, else one a mask with its number before the suffix."""
    if out is None:
        return []
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}_{index}{out.suffix}") for index in range(count)]


def _check_distinct(paths: list[Path]) -> None:
    seen = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(
                f"image, --out and --overlay must be different files, got {path} twice"
            )
        seen.add(path.resolve())
        if path.is_dir():
            raise ValueError(f"output must be a file that can be written, got {str(path)!r}")


def _bounding_box(mask: np.ndarray) -> list[int] | None:
    """x0, y0, x1, y1 of the mask, the latter two one past it; None if it is empty."""
    rows, cols = mask.nonzero()
    if not len(rows):
        return None
    return [int(cols.min()), int(rows.min()), int(cols.max()) + 1, int(rows.max()) + 1]


def _as_text(report: dict[str, Any]) -> str:
    density = "dense" if report["density"] is None else f"density {report['density']:g}"
    lines = [
        f"{report['image']}: {report['width']} x {report['height']}, {report['weights']}, {density}"
    ]
    for index, mask in enumerate(report["masks"]):
        box = "empty" if mask["box"] is None else " ".join(map(str, mask["box"]))
        lines.append(
            f"mask {index}: prompt {mask['prompt']}, score {mask['score']:.3f}, "
            f"area {mask['area']}, box {box}"
        )
    paths = [mask["path"] for mask in report["masks"]] + [report["overlay"]]
    lines += [f"wrote {path}" for path in paths if path is not None]
    times = ", ".join(f"{name} {value:.2f} s" for name, value in report["seconds"].items())
    return "\n".join([*lines, f"{times} (compilation included)"])


if __name__ == "__main__":
    sys.exit(main())
