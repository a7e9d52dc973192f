"""All masks of a photo: the whole call, its parts, and transformers' mask-generation pipeline.

A random image encoder with the decoder of `vit_t`, on a photo of scikit-image's. The thresholds
are such that half of the masks have a high predicted IoU and are measured, a fifth of these is
stable enough, and about a hundred masks survive the comparison of boxes. Before that, records of a
small grid are compared with those that the host makes of the same logits.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image
from skimage import data

from benchmarks import records
from benchmarks.cases import shapes
from benchmarks.peers.jax_models import JAX
from benchmarks.records import Record
from benchmarks.report import tables
from benchmarks.run.timing import Spread, time_ms
from sparsesam_jax import Sam, SamPredictor
from sparsesam_jax.checkpoints import convert_checkpoint, native
from sparsesam_jax.checkpoints.sources import locate
from sparsesam_jax.predict.automatic_masks import (
    PIXELS_AT_ONCE,
    AutomaticMaskGenerator,
    suppress,
)
from sparsesam_jax.predict.mask_measures import measure_on_device
from sparsesam_jax.predict.mask_pool import AT_ONCE
from sparsesam_jax.predict.prompt_arrays import ImagePrompt, pad_together

KEYS = ("what", "masks", "peak_mib")
SURVIVORS = 100
SMALL_GRID = 8
OFFSET = 0.1  # of the stability: on random features no mask's edge is as steep as on a photo's


def run(model: str, dtype: str, side: int, runs: int, peer: bool, out: Path | None) -> None:
    """Measure, write and print."""
    found = []
    with records.writer(out) as write, tempfile.TemporaryDirectory() as folder:
        for record in _measure(model, dtype, side, runs, peer, Path(folder)):
            write(record)
            found.append(record)
    tables.show("everything", found, KEYS)


def _measure(
    model: str, dtype: str, side: int, runs: int, peer: bool, folder: Path
) -> Iterator[Record]:
    config = shapes.model_config(model)
    weights = folder / "model.safetensors"
    arrays = shapes.random_weights(config)
    decoder = native.read(locate("vit_t"))[1]
    own = {name: x for name, x in decoder.items() if not name.startswith("image_encoder")}
    native.write(weights, config, arrays | {name: x.astype(np.float32) for name, x in own.items()})
    height, width = shapes.photo_size(config)
    image = np.asarray(Image.fromarray(data.coffee()).resize((width, height)))
    sam = Sam.from_pretrained(weights, dtype=dtype, param_dtype=dtype)
    mib = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(sam))) / 2**20
    predictor = SamPredictor(sam, transforms="device")
    options: dict[str, Any] = {
        "points_per_side": SMALL_GRID,
        "pred_iou_thresh": 0.0,
        "stability_score_offset": OFFSET,
    }

    def generator(predictor: SamPredictor = predictor, **more: Any) -> AutomaticMaskGenerator:
        return AutomaticMaskGenerator(predictor, **options | more)

    every = generator(stability_score_thresh=0.0, box_nms_thresh=1.0).generate(image)
    good = float(np.median([record["predicted_iou"] for record in every]))
    stability = [r["stability_score"] for r in every if r["predicted_iou"] > good]
    options["pred_iou_thresh"] = good
    options["stability_score_thresh"] = float(np.nanquantile(stability, 0.8))
    # Calls of as many points, for in 16 bits those of others have other logits.
    same: dict[str, Any] = {"points_per_batch": predictor.prompts_at_once}
    error = _difference(
        generator(**same).generate(image),
        generator(SamPredictor(sam, transforms="host"), **same).generate(image),
    )
    options["points_per_side"] = side
    rle = generator(box_nms_thresh=1.0, output_mode="coco_rle").generate(image)
    boxes = np.array([record["bbox"] for record in rle], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.array([record["predicted_iou"] for record in rle])
    left = {iou: len(suppress(boxes, scores, iou)) for iou in np.arange(0.05, 1, 0.05).round(2)}
    options["box_nms_thresh"] = min(left, key=lambda iou: abs(left[iou] - SURVIVORS))
    common = {
        "suite": "everything",
        "model": model,
        "dtype": dtype,
        "image": (height, width),
        "points": side**2,
        "options": options,
        "candidates": len(rle),
        "max_error": error,
        "device": JAX.name,
        "versions": records.versions(),
        "commit": records.commit(),
        "not_run": None,
    }
    masks = 0
    for mode in ("binary_mask", "coco_rle"):
        whole = generator(output_mode=mode)
        masks = len(whole.generate(image))
        times = Spread.of([time_ms(lambda call=whole: call.generate(image)) for _ in range(runs)])
        peak = JAX.peak()["peak_mib"]
        beside = None if peak is None else peak - mib
        yield common | times._asdict() | {"what": mode, "masks": masks, "peak_mib": beside}
    for name, call in _parts(generator(), image, boxes, scores, masks).items():
        call()
        times = Spread.of([time_ms(call) for _ in range(runs)])
        yield common | times._asdict() | {"what": f"part: {name}", "masks": masks}
    if peer:
        convert_checkpoint(weights, folder / "huggingface", to="huggingface")
        for kind in dict.fromkeys((dtype, "float32")):
            yield common | _transformers(folder / "huggingface", kind, image, options)


def _difference(own: list[dict[str, Any]], host: list[dict[str, Any]]) -> float:
    """The largest difference of masks (1 - IoU), scores, boxes and areas of records.

    Raises:
        ValueError: There are more or others of them.
    """
    if len(own) != len(host):
        raise ValueError(f"the device's masks must be the host's, got {len(own)} for {len(host)}")
    worst = 0.0
    for one, other in zip(own, host, strict=True):
        a, b = one["segmentation"], other["segmentation"]
        differences = [
            (a ^ b).sum() / max(1, (a | b).sum()),
            abs(one["stability_score"] - other["stability_score"]),
            abs(one["predicted_iou"] - other["predicted_iou"]),
            np.abs(np.subtract(one["bbox"], other["bbox"])).max() / max(a.shape),
            abs(one["area"] - int(a.sum())) / a.size,
        ]
        worst = max(worst, *map(float, differences))
    if worst > 1e-2:
        raise ValueError(f"the device's masks must be the host's, got a difference of {worst}")
    return worst


def _parts(
    own: AutomaticMaskGenerator, image: np.ndarray, boxes: Any, scores: Any, masks: int
) -> dict[str, Callable[[], Any]]:
    predictor = own.predictor
    predictor.set_image(image)
    embedding, transforms = predictor.embedding, predictor.transforms
    points = own.point_grids[0] * image.shape[1::-1]
    labels, batch = np.ones((len(points), 1), np.int32), own.points_per_batch
    arrays = ImagePrompt(points[:, None], labels, None, None).arrays(embedding.sizes[0], (0, 0))
    parts = [arrays.part(start, start + batch) for start in range(0, len(points), batch)]
    side, sizes = predictor.image_size, embedding.sizes[0]
    frame = ((side, side), sizes.resized, sizes.original)

    def set_image() -> None:
        predictor.set_image(image)
        jax.block_until_ready(predictor.embedding.features)

    def decode() -> Any:
        calls = [
            predictor.compiled.decode(embedding.arrays, *pad_together([part], batch, 2))
            for part in parts
        ]
        return jax.block_until_ready(calls[-1])

    low_res = decode()[0]
    half = np.arange(0, 3 * batch, 2)

    def measure() -> Any:
        begun = [measure_on_device(low_res, half, *frame, offset=OFFSET) for _ in parts]
        return [wait() for wait in begun]

    one = low_res.reshape(-1, 1, *low_res.shape[-2:])[:AT_ONCE]
    at_once = min(AT_ONCE, max(1, PIXELS_AT_ONCE // math.prod(frame[2])))

    def survivors() -> list[Any]:
        counts = [min(at_once, masks - start) for start in range(0, masks, at_once)]
        return [transforms.resize_masks(one, range(count), *frame) for count in counts]

    return {
        "set_image": set_image,
        f"decode, {len(parts)} calls": decode,
        f"measure half of them, {len(parts)} calls": measure,
        "suppress boxes": lambda: suppress(boxes, scores, own.box_nms_thresh),
        "survivors to the host": survivors,
    }


def _transformers(folder: Path, dtype: str, image: np.ndarray, options: Any) -> Record:
    """The pipeline, which calls the threshold of its boxes that of its crops."""
    import torch
    from transformers import SamImageProcessor, pipeline

    from benchmarks.peers import torch_models

    device = torch_models.Torch("transformers", dtype)
    config = native.read(folder.parent / "model.safetensors")[0]
    sam = torch_models.load_transformers(config, "transformers", device, str(folder))
    side = config.image_encoder.image_size
    images = SamImageProcessor(
        size={"longest_edge": side}, pad_size={"height": side, "width": side}
    )
    made: Any = pipeline("mask-generation", model=sam, image_processor=images, device=device.place)
    chosen = {
        "points_per_batch": 64,
        "points_per_crop": options["points_per_side"],
        "pred_iou_thresh": options["pred_iou_thresh"],
        "stability_score_thresh": options["stability_score_thresh"],
        "stability_score_offset": OFFSET,
        "crops_nms_thresh": options["box_nms_thresh"],
    }
    record = {"what": "transformers, mask-generation", "dtype": dtype, "masks": None}
    try:
        with torch.inference_mode():
            photo = Image.fromarray(image)
            made(photo, **chosen | {"points_per_crop": SMALL_GRID})
            device.start_peak()
            found: list[Any] = []
            times = [time_ms(lambda: found.append(made(photo, **chosen))) for _ in range(2)]
    except (ImportError, RuntimeError, TypeError) as error:
        return record | {"median_ms": None, "not_run": " ".join(str(error).split())[:200]}
    masks = len(found[-1]["masks"])
    return record | Spread.of(times)._asdict() | device.peak() | {"masks": masks}
