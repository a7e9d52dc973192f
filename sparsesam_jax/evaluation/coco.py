"""`sparsesam evaluate-coco`: segm AP of masks that a detector's boxes ask for.

Every detection is one box prompt and gets one mask (no multimask output) and keeps its class and
score, so that AP changes with the masks alone; COCO's own code counts it (pycocotools).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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

from sparsesam_jax.checkpoints.atomic import atomic_path, check_folder
from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.datasets.loading import load_ahead
from sparsesam_jax.evaluation.candidates import DENSE, Candidate
from sparsesam_jax.evaluation.coco_masks import Detection, ImageMasks, MaskFile
from sparsesam_jax.evaluation.runs import RunOptions, write_json
from sparsesam_jax.predict.finite import check_finite
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
class Options(RunOptions):
    """What `sparsesam evaluate-coco` measures; dense is measured too.

    Attributes:
        annotations: COCO's instances, JSON.
        detections: A detector's results in COCO's format, JSON.
        images: Folder with the images that the annotations name.
        limit: Only the first so many images of the annotations; the release took 500.
        min_score: Detections below it are left out.
    """

    annotations: Path
    detections: Path
    images: Path
    limit: int | None = None
    min_score: float = 0.0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be positive, got {self.limit}")
        super().__post_init__()


class Item(NamedTuple):
    """An image of the annotations and its detections."""

    record: dict[str, Any]
    detections: list[Detection]


class Report(NamedTuple):
    """What a run found.

    Attributes:
        summaries: One a candidate.
        problems: What was wrong with an image that was left out, by its name.
        images: Images that were asked for.
    """

    summaries: list[CocoSummary]
    problems: dict[str, str]
    images: int


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
    check_folder(options.out)
    sam = options.sam()
    found_problems = zip(
        items, load_ahead(items, functools.partial(_problem, options)), strict=True
    )
    problems = {item.record["file_name"]: text for item, text in found_problems if text}
    usable = [item for item in items if item.record["file_name"] not in problems]
    if not usable:
        raise ValueError(f"at least one of {len(items)} images must be usable: {problems}")
    own = {
        "min_score": options.min_score,
        "detections": hashlib.sha256(options.detections.read_bytes()).hexdigest(),
    }
    options.settle([item.record["id"] for item in items], own)
    found: dict[Candidate, CocoSummary] = {}
    for candidate in [DENSE, *(c for c in options.candidates if not c.is_dense)]:
        images = _measure(options, candidate, sam, usable, console)
        results = [result for image in images for result in image.results]
        with atomic_path(options.out / f"{_file_stem(candidate)}.json") as path:
            path.write_text(json.dumps(results, allow_nan=False) + "\n", "utf-8")
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
    write_json(options.out / "summary.json", summaries)
    write_json(options.out / "problems.json", problems)
    console.print(table(summaries))
    return Report(summaries, problems, len(items))


def _measure(
    options: Options, candidate: Candidate, sam: Sam, items: Sequence[Item], console: Console
) -> list[ImageMasks]:
    """The masks of all images, of which those that are on disk already are not found again."""
    file = MaskFile(options.out / f"{_file_stem(candidate)}.jsonl", resume=options.resume)
    todo = [item for item in items if item.record["id"] not in file.found]
    predictor = SamPredictor(candidate.model(sam), padding=options.padding)
    compiled = True  # the first image compiles
    images = load_ahead(todo, functools.partial(_read, options))
    name = f"{candidate.method} {candidate.density:g}"
    for item, image in zip(track(todo, name, console=console), images, strict=True):
        start = time.perf_counter()
        results = segment(predictor, image, item.detections)
        seconds = time.perf_counter() - start
        found = ImageMasks(
            image=item.record["id"], results=results, seconds=seconds, compiled=compiled
        )
        file.append([found])
        compiled = False
    return [file.found[item.record["id"]] for item in items]


def _file_stem(candidate: Candidate) -> str:
    return f"{candidate.method}_{candidate.density:g}"


def segment(
    predictor: SamPredictor, image: np.ndarray, detections: Sequence[Detection]
) -> list[Detection]:
    """COCO results of one image: every detection with the mask that its box asks for."""
    if not detections:
        return []
    corners = np.array([detection["bbox"] for detection in detections], np.float64)
    corners[:, 2:] += corners[:, :2]
    predictor.set_image(image)
    masks: Any
    masks, *rest = predictor.predict(box=corners, multimask_output=False, mask_format="rle")
    check_finite(predictor.sam, *rest)
    results = []
    # One box gives the list of its masks, several a list of these.
    for detection, (mask,) in zip(detections, masks if len(masks) > 1 else [masks], strict=True):
        kept = {key: detection[key] for key in ("image_id", "category_id", "score")}
        rle = {"size": mask["size"], "counts": mask["counts"].decode("ascii")}
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


def _read(options: Options, item: Item) -> np.ndarray:
    return options.reader.read(options.images / item.record["file_name"])


def _problem(options: Options, item: Item) -> str:
    """Why the image cannot be read or has not its annotated size; empty if it is usable."""
    try:
        size = _read(options, item).shape[:2]
    except ValueError as error:
        return str(error)
    expected = (item.record["height"], item.record["width"])
    return "" if size == expected else f"must have its annotated size {expected}, got {size}"


def _read_json(argument: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{argument} must be a JSON file, got {str(path)!r}: {error}") from error
