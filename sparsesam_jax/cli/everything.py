"""`sparsesam everything`: all masks of photos, in the files that Meta's `amg.py` writes."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
)
from sparsesam_jax.cli.progress import progress
from sparsesam_jax.config import Sparsity

if TYPE_CHECKING:
    import numpy as np

_BOX = ("x0", "y0", "w", "h")
_COLUMNS = (
    "id",
    "area",
    *(f"bbox_{name}" for name in _BOX),
    "point_input_x",
    "point_input_y",
    "predicted_iou",
    "stability_score",
    *(f"crop_box_{name}" for name in _BOX),
)


def everything(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE ...", help="Photos, folders of photos, patterns as '*.jpg'."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the masks; made if need be.")],
    weights: WeightsOption = "vit_t",
    density: Annotated[
        float | None, typer.Option(help="What the encoder keeps, (0, 1]. Without it: dense SAM.")
    ] = None,
    convert_to_rle: Annotated[
        bool,
        typer.Option("--convert-to-rle", help="PHOTO.json of COCO's run lengths instead of PNGs."),
    ] = False,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also PHOTO_overlay.png, every mask in a colour.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave photos whose masks OUT holds as they are.")
    ] = False,
    points_per_side: Annotated[int, typer.Option(help="Points along a side of the grid.")] = 32,
    points_per_batch: Annotated[int, typer.Option(help="Points of one decoder call.")] = 64,
    pred_iou_thresh: Annotated[float, typer.Option(help="Least predicted IoU.")] = 0.88,
    stability_score_thresh: Annotated[float, typer.Option(help="Least stability.")] = 0.95,
    stability_score_offset: Annotated[
        float, typer.Option(help="How far the threshold moves for the stability.")
    ] = 1.0,
    box_nms_thresh: Annotated[
        float, typer.Option(help="IoU of two boxes above which the worse mask goes.")
    ] = 0.7,
    crop_n_layers: Annotated[
        int, typer.Option(help="Layers of crops that are looked at too; layer i has 4^i.")
    ] = 0,
    crop_nms_thresh: Annotated[float, typer.Option(help="The same IoU between crops.")] = 0.7,
    crop_overlap_ratio: Annotated[
        float, typer.Option(help="Overlap of the first layer's crops, of the shorter side.")
    ] = 512 / 1500,
    crop_n_points_downscale_factor: Annotated[
        int, typer.Option(help="Layer i has 1 / this^i of the points a side.")
    ] = 1,
    min_mask_region_area: Annotated[
        int, typer.Option(help="Holes and islands of fewer pixels are removed.")
    ] = 0,
    implementation: ImplementationOption = "auto",
    dtype: DtypeOption = "float32",
    products: ProductsOption = "dtype",
    padding: PaddingOption = "square",
    bits: BitsOption = None,
    value_range: ValueRangeOption = None,
    max_pixels: MaxPixelsOption = None,
) -> None:
    """Find the masks of everything in photos, without prompts.

    Options and files are those of Meta's amg.py: a folder OUT/PHOTO with 0.png, 1.png ..., each 0
    and 255, and metadata.csv, or OUT/PHOTO.json with COCO's run lengths.

    A photo that cannot be read is reported and left out; the exit code is then 1. What is written
    of a photo is whole once its metadata.csv or its .json is there.
    """
    options = {
        "points_per_side": points_per_side,
        "points_per_batch": points_per_batch,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_score_thresh,
        "stability_score_offset": stability_score_offset,
        "box_nms_thresh": box_nms_thresh,
        "crop_n_layers": crop_n_layers,
        "crop_nms_thresh": crop_nms_thresh,
        "crop_overlap_ratio": crop_overlap_ratio,
        "crop_n_points_downscale_factor": crop_n_points_downscale_factor,
        "min_mask_region_area": min_mask_region_area,
    }
    from sparsesam_jax.checkpoints.atomic import check_folder
    from sparsesam_jax.checkpoints.sources import locate
    from sparsesam_jax.predict.image_files import PhotoReader, find_photos

    reader = PhotoReader(bits=bits, value_range=value_range, max_pixels=max_pixels)
    sparsity = None if density is None else Sparsity(density)
    paths = find_photos(images)
    check_folder(out, "--out")
    outputs = {path: _Output(out, path.stem, convert_to_rle, overlay) for path in paths}
    _check_names(paths)
    locate(weights)
    left = [path for path in paths if not (resume and outputs[path].is_there)]
    if len(left) == 1:
        reader.read(left[0])  # what is wrong with the only photo is an error
    check_implementation(implementation, "everything")
    if len(left) < len(paths):
        typer.echo(f"{len(paths) - len(left)} of {len(paths)} photos are there already")
    if not left:
        return

    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.predict.automatic_masks import AutomaticMaskGenerator
    from sparsesam_jax.predict.predictor import SamPredictor

    sam = Sam.from_pretrained(
        weights,
        dtype=dtype,
        implementation=implementation,
        sparsity=sparsity,
        products=products,
    )
    mode = "coco_rle" if convert_to_rle and not overlay else "binary_mask"
    generator = AutomaticMaskGenerator(
        SamPredictor(sam, padding=padding), output_mode=mode, **options
    )
    problems = 0
    with progress("looking for masks", len(left)) as advance:
        for path in left:
            try:
                photo = reader.read(path)
            except ValueError as error:
                problems += 1
                typer.echo(f"left out: {path}: {error}", err=True)
            else:
                start = time.perf_counter()
                records = generator.generate(photo)
                seconds = time.perf_counter() - start
                written = outputs[path].write(photo, records)
                height, width = photo.shape[:2]
                typer.echo(
                    f"{path}: {width} x {height}, {len(records)} masks, {seconds:.2f} s, "
                    f"wrote {written}"
                )
            advance()
    if problems:
        typer.echo(f"{problems} of {len(paths)} photos left out", err=True)
        raise typer.Exit(1)


def _check_names(paths: Sequence[Path]) -> None:
    """Raise ValueError where two photos would be written to the same files."""
    seen: dict[str, Path] = {}
    for path in paths:
        if (other := seen.setdefault(path.stem, path)) != path:
            raise ValueError(f"images must have different names, got {other} and {path}")


class _Output(NamedTuple):
    """The files of one photo.

    Attributes:
        folder: `--out`.
        name: The photo's name without suffix.
        rle: Whether masks are run lengths in one JSON file.
        overlay: Whether there is a picture of all masks.
    """

    folder: Path
    name: str
    rle: bool
    overlay: bool

    @property
    def _last(self) -> Path:
        """The file that is written last."""
        return self.folder / (f"{self.name}.json" if self.rle else f"{self.name}/metadata.csv")

    @property
    def is_there(self) -> bool:
        """Whether all has been written."""
        return self._last.is_file() and (not self.overlay or self._overlay.is_file())

    @property
    def _overlay(self) -> Path:
        return self.folder / f"{self.name}_overlay.png"

    def write(self, photo: np.ndarray, records: Sequence[dict[str, Any]]) -> Path:
        """Write the masks of a photo; those of an earlier run go first."""
        from PIL import Image

        from sparsesam_jax.checkpoints.atomic import atomic_path
        from sparsesam_jax.predict.image_files import write_images
        from sparsesam_jax.predict.mask_formats import encode_rle
        from sparsesam_jax.predict.overlay import draw_all_masks

        self._last.parent.mkdir(parents=True, exist_ok=True)
        self._last.unlink(missing_ok=True)
        masks = [record["segmentation"] for record in records]
        if self.overlay:
            write_images({self._overlay: draw_all_masks(photo, masks)})
        if self.rle:
            if self.overlay:
                runs = [encode_rle(mask) for mask in masks]
                masks = [{**run, "counts": run["counts"].decode()} for run in runs]
            found = [
                # Of an empty mask, whose stability is 0 / 0, JSON has no number.
                {**record, "segmentation": mask, "stability_score": score if score >= 0 else None}
                for record, mask in zip(records, masks, strict=True)
                for score in (record["stability_score"],)
            ]
            with atomic_path(self._last) as path:
                path.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
            return self._last
        for old in self._last.parent.glob("*.png"):
            if old.stem.isdecimal():
                old.unlink()
        for index, mask in enumerate(masks):
            picture = Image.fromarray(mask).convert("L")
            write_images({self._last.parent / f"{index}.png": picture})
        with atomic_path(self._last) as path, path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(_COLUMNS)
            table.writerows(_row(index, record) for index, record in enumerate(records))
        return self._last.parent


def _row(index: int, record: dict[str, Any]) -> list[Any]:
    return [
        index,
        record["area"],
        *record["bbox"],
        *record["point_coords"][0],
        record["predicted_iou"],
        record["stability_score"],
        *record["crop_box"],
    ]
