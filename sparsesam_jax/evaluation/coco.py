"""`sparsesam evaluate-coco`: segm AP of masks that a detector's boxes ask for.

Every detection is one box prompt and gets one mask (no multimask output) and keeps its class and
score, so that AP changes with the masks alone; COCO's own code counts it (pycocotools).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pallas_kernels.implementation import Implementation
from sparsesam_jax import methods
from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.checkpoints.pretrained import Sam, locate
from sparsesam_jax.evaluation.candidates import DENSE, Candidate
from sparsesam_jax.evaluation.coco_masks import Detection, ImageMasks, MaskFile
from sparsesam_jax.evaluation.run_settings import settle
from sparsesam_jax.predict.image_files import read_image
from sparsesam_jax.predict.predictor import SamPredictor

_STATISTICS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}


class CocoSummary(TypedDict):
    """One line of `summary.json`; `ap_change` is the difference to dense on the same boxes.

    AP of a size is -1 where no object has it, as pycocotools says it.
    """

    method: str
    density: float
    images: int
    detections: int
    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ap_change: float
    images_per_second: float
    gmacs: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure and how.

    Attributes:
        annotations: COCO's instances, JSON.
        detections: A detector's results in COCO's format, JSON.
        images: Folder with the images that the annotations name.
        candidates: Methods and densities; dense is measured too.
        out: Folder for the results.
        weights: Name or path of the weights.
        dtype: What is computed in.
        implementation: As for `Sam`.
        limit: Only the first so many images of the annotations; the release took 500.
        min_score: Detections below it are left out.
        resume: Whether to continue what `out` holds.
    """

    annotations: Path
    detections: Path
    images: Path
    candidates: tuple[Candidate, ...]
    out: Path
    weights: str = "vit_t"
    dtype: str = "float32"
    implementation: Implementation = "auto"
    limit: int | None = None
    min_score: float = 0.0
    resume: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be positive, got {self.limit}")
        for candidate in self.candidates:
            if candidate.sparsity is None:
                methods.check(candidate.method, candidate.density)


class Item(NamedTuple):
    """An image of the annotations and its detections."""

    record: dict[str, Any]
    detections: list[Detection]


class Report(NamedTuple):
    """What a run found: one summary a candidate, and what was wrong with images left out."""

    summaries: list[CocoSummary]
    problems: dict[str, str]


def check_pycocotools() -> None:
    """Raise ValueError where pycocotools, an optional dependency, is missing."""
    if importlib.util.find_spec("pycocotools") is None:
        raise ValueError("COCO's AP needs pycocotools: pip install 'sparsesam-jax[eval]'")


def run(options: Options, console: Console) -> Report:
    """Evaluate, write masks and `summary.json` into `options.out`, print the table.

    The masks of a candidate are `METHOD_DENSITY.json`, COCO results with compressed run lengths;
    `METHOD_DENSITY.jsonl` has them image by image as they are found, so that a killed run can be
    resumed.

    Raises:
        ValueError: A file is not in COCO's format, `out` holds another run, or no image is usable.
    """
    check_pycocotools()
    truth = _load_truth(options.annotations)
    items = _items(options, truth)
    sam = Sam.from_pretrained(
        options.weights, dtype=options.dtype, implementation=options.implementation
    )
    if not options.out.absolute().parent.is_dir():
        raise ValueError(f"out must be a new folder in a folder, got {str(options.out)!r}")
    problems: dict[str, str] = {}
    usable = [item for item in items if _is_usable(options.images, item, problems)]
    if not usable:
        raise ValueError(f"at least one of {len(items)} images must be usable: {problems}")
    settle(options.out, _settings(options, items), resume=options.resume)
    found: dict[Candidate, CocoSummary] = {}
    for candidate in [DENSE, *(c for c in options.candidates if not c.is_dense)]:
        images = _measure(options, candidate, sam, usable, console)
        results = [result for image in images for result in image.results]
        with atomic_path(options.out / f"{_file_stem(candidate)}.json") as path:
            path.write_text(json.dumps(results) + "\n", "utf-8")
        statistics = average_precision(truth, results, [image.image for image in images])
        base = found.get(DENSE)
        seconds = [image.seconds for image in images]
        warm = [image.seconds for image in images if not image.compiled]
        found[candidate] = CocoSummary(
            method=candidate.method,
            density=candidate.density,
            images=len(images),
            detections=len(results),
            **statistics,
            ap_change=0.0 if base is None else statistics["ap"] - base["ap"],
            images_per_second=1 / float(np.mean(warm or seconds)),
            gmacs=candidate.gmacs(sam.config.image_encoder),
        )
    summaries = list(found.values())
    for name, value in (("summary.json", summaries), ("problems.json", problems)):
        with atomic_path(options.out / name) as path:
            path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    console.print(table(summaries))
    return Report(summaries, problems)


def _measure(
    options: Options, candidate: Candidate, sam: Sam, items: Sequence[Item], console: Console
) -> list[ImageMasks]:
    """The masks of all images, of which those that are on disk already are not found again."""
    file = MaskFile(options.out / f"{_file_stem(candidate)}.jsonl", resume=options.resume)
    todo = [item for item in items if item.record["id"] not in file.images]
    predictor = SamPredictor(candidate.model(sam))
    compiled = True  # the first image compiles
    for item in track(todo, f"{candidate.method} {candidate.density:g}", console=console):
        image = read_image(options.images / item.record["file_name"])
        start = time.perf_counter()
        results = segment(predictor, image, item.detections)
        seconds = time.perf_counter() - start
        found = ImageMasks(
            image=item.record["id"], results=results, seconds=seconds, compiled=compiled
        )
        file.append(found)
        compiled = False
    return [file.images[item.record["id"]] for item in items]


def _file_stem(candidate: Candidate) -> str:
    return f"{candidate.method}_{candidate.density:g}"


def _settings(options: Options, items: Sequence[Item]) -> dict[str, Any]:
    """What the masks in one folder must share."""
    return {
        "weights": options.weights,
        "weights_bytes": locate(options.weights).stat().st_size,
        "dtype": options.dtype,
        "implementation": options.implementation,
        "min_score": options.min_score,
        "sparsities": {
            candidate.method: dataclasses.asdict(candidate.sparsity)
            for candidate in options.candidates
            if candidate.sparsity is not None
        },
        "detections": hashlib.sha256(options.detections.read_bytes()).hexdigest(),
        "images": [item.record["id"] for item in items],
    }


def segment(
    predictor: SamPredictor, image: np.ndarray, detections: Sequence[Detection]
) -> list[Detection]:
    """COCO results of one image: every detection with the mask that its box asks for."""
    if not detections:
        return []
    corners = np.array([detection["bbox"] for detection in detections], np.float64)
    corners[:, 2:] += corners[:, :2]
    predictor.set_image(image)
    runs, _, _ = predictor.predict(box=corners, multimask_output=False, mask_format="rle")
    if len(detections) > 1:  # of one box there is no axis of prompts
        runs = [run for (run,) in runs]
    results = []
    for detection, run in zip(detections, runs, strict=True):
        rle = {"size": run["size"], "counts": run["counts"].decode("ascii")}
        kept = {key: detection[key] for key in ("image_id", "category_id", "score")}
        results.append(kept | {"segmentation": rle})
    return results


def average_precision(
    truth: Any, results: Sequence[Detection], image_ids: Sequence[int]
) -> dict[str, Any]:
    """COCO's segm AP over some images; `truth` is a `pycocotools.coco.COCO`."""
    from pycocotools.cocoeval import COCOeval

    if not results:
        return dict.fromkeys(_STATISTICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes adds areas and boxes to what it is given.
        evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "segm")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(evaluation.stats[index]) for name, index in _STATISTICS.items()}


def table(summaries: Sequence[CocoSummary]) -> Table:
    """The summaries for reading."""
    first = summaries[0]
    result = Table(
        title=f"COCO segm AP, {first['images']} images, {first['detections']} boxes",
        caption="Change: AP minus the dense encoder's. -1: no object of that size.",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    result.add_column("method", no_wrap=True)
    columns = {"density": "g", "ap": ".3f", "ap_change": "+.3f", "ap50": ".3f", "ap75": ".3f"}
    columns |= {"ap_small": ".3f", "ap_medium": ".3f", "ap_large": ".3f", "gmacs": ".1f"}
    titles = {"ap_change": "change", "gmacs": "GMAC"}
    for name in columns:
        title = titles.get(name, name.replace("ap_", "").replace("ap", "AP"))
        result.add_column(title, justify="right", no_wrap=True)
    for summary in summaries:
        values = [format(summary[name], form) for name, form in columns.items()]
        result.add_row(summary["method"], *values)
    return result


def _load_truth(path: Path) -> Any:
    from pycocotools.coco import COCO

    content = _read_json("annotations", path)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise ValueError(
            f"annotations must be COCO's object of images, annotations and categories, got {path}"
        )
    truth: Any = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    # pycocotools copies these into results, and some data sets have none.
    content.setdefault("info", {})
    content.setdefault("licenses", [])
    return truth


def _items(options: Options, truth: Any) -> list[Item]:
    detections = _read_json("detections", options.detections)
    keys = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(detections, list) or not all(
        isinstance(entry, dict) and keys <= set(entry) and len(entry["bbox"]) == 4
        for entry in detections
    ):
        raise ValueError(
            f"detections must be a JSON list of objects with {', '.join(sorted(keys))}, "
            f"got {options.detections}"
        )
    unknown = {entry["image_id"] for entry in detections} - set(truth.imgs)
    if unknown:
        raise ValueError(f"detections must be of the annotations' images, got {min(unknown)!r}")
    of_image: dict[Any, list[Detection]] = {}
    for entry in detections:
        if entry["score"] >= options.min_score:
            of_image.setdefault(entry["image_id"], []).append(entry)
    records = list(truth.imgs.values())[: options.limit]
    return [Item(record, of_image.get(record["id"], [])) for record in records]


def _is_usable(folder: Path, item: Item, problems: dict[str, str]) -> bool:
    """Whether the image can be read and has its annotated size; else the problem is noted."""
    record = item.record
    try:
        size = read_image(folder / record["file_name"]).shape[:2]
    except ValueError as error:
        problems[record["file_name"]] = str(error)
        return False
    expected = (record["height"], record["width"])
    if size != expected:
        problems[record["file_name"]] = f"must have its annotated size {expected}, got {size}"
    return size == expected


def _read_json(argument: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{argument} must be a JSON file, got {str(path)!r}: {error}") from error
