"""Masks of everything in a photo: a grid of points as prompts, and what is good and new of it.

The method, its parameters and its records are those of facebookresearch/segment-anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, Int, UInt8

from sparsesam_jax.model.sam import SamModel
from sparsesam_jax.model.transforms import MASK_THRESHOLD, resize_mask_logits
from sparsesam_jax.predict.mask_formats import rle_text, run_lengths
from sparsesam_jax.predict.predictor import SamPredictor, check_image
from sparsesam_jax.predict.prompt_arrays import MIN_POINTS, ImagePrompt, pad_together

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1

_CROP_EDGE = 20.0  # Pixels from a crop's edge within which a mask may have been cut off.
_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


class Crop(NamedTuple):
    """A part of the photo that is looked at by itself, and how deep in the layers it lies."""

    box: Box
    layer: int


class AutomaticMaskGenerator:
    """Finds masks for a whole photo, without prompts.

    Every point of a grid is a prompt, in the photo and in its crops. Of the masks that remain those
    with a high predicted IoU, a boundary that hardly moves with the threshold, and no edge along a
    crop's edge; of masks with nearly the same box the best one.

    Args:
        model: The model, or a predictor of it, whose image is overwritten.
        points_per_side: Points along a side of the grid; None where `point_grids` is given.
        points_per_batch: Prompts of one decoder call at most; a CPU decodes one by one.
        pred_iou_thresh: Least predicted IoU, not itself included; 0 keeps all.
        stability_score_thresh: Least stability; 0 keeps all.
        stability_score_offset: How far the threshold of the logits is moved for the stability,
            which is the area at the higher over the area at the lower threshold.
        box_nms_thresh: IoU of two boxes above which the lower predicted IoU goes.
        crop_n_layers: Layers of crops beside the whole photo; layer i has 4^i crops.
        crop_nms_thresh: As `box_nms_thresh`, between crops; the smaller crop stays.
        crop_overlap_ratio: Overlap of the first layer's crops, as a share of the shorter side.
        crop_n_points_downscale_factor: Layer i has `points_per_side` over this to the power i.
        point_grids: A grid a layer, each [N, 2] of (x, y) in [0, 1].
        min_mask_region_area: Holes and islands of fewer pixels are removed; 0 leaves them.
        output_mode: Form of `segmentation`: a boolean array, or run lengths as a list
            (`uncompressed_rle`) or as COCO's text (`coco_rle`).

    Raises:
        ValueError: Not exactly one of `points_per_side` and `point_grids` is given, a layer has no
            points or no grid, or `output_mode` is unknown.
    """

    def __init__(
        self,
        model: SamModel | SamPredictor,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[Float[np.ndarray, "N 2"]] | None = None,
        min_mask_region_area: int = 0,
        output_mode: OutputMode = "binary_mask",
    ):
        if (points_per_side is None) == (point_grids is None):
            raise ValueError(
                "exactly one of points_per_side and point_grids must be given, "
                f"got {'neither' if point_grids is None else 'both'}"
            )
        if points_per_side is not None:
            sides = [
                int(points_per_side / crop_n_points_downscale_factor**layer)
                for layer in range(crop_n_layers + 1)
            ]
            if min(sides) < 1:
                layer = next(layer for layer, side in enumerate(sides) if side < 1)
                raise ValueError(
                    f"points_per_side must leave a point in every layer, got none in layer {layer}"
                )
            point_grids = [point_grid(side) for side in sides]
        assert point_grids is not None
        if len(point_grids) <= crop_n_layers:
            raise ValueError(
                f"point_grids must have one grid a layer ({crop_n_layers + 1}), "
                f"got {len(point_grids)}"
            )
        if output_mode not in get_args(OutputMode):
            expected = ", ".join(get_args(OutputMode))
            raise ValueError(f"output_mode must be one of {expected}; got {output_mode!r}")
        if points_per_batch < 1:
            raise ValueError(f"points_per_batch must be positive, got {points_per_batch}")
        self.predictor = model if isinstance(model, SamPredictor) else SamPredictor(model)
        self.point_grids = [np.asarray(grid, np.float64) for grid in point_grids]
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self.min_mask_region_area = min_mask_region_area
        self.output_mode: OutputMode = output_mode

    def generate(self, image: UInt8[np.ndarray, "height width 3"]) -> list[dict[str, Any]]:
        """Masks of everything in a photo.

        Args:
            image: RGB, 0 to 255, any size.

        Returns:
            A record a mask: `segmentation` (see `output_mode`), `area` in pixels, `bbox` (x, y,
            width, height), `predicted_iou`, `point_coords` [[x, y]], the prompt, `stability_score`,
            and `crop_box` (x, y, width, height), in pixels of the photo.

        Raises:
            ValueError: The image is no uint8 [height, width, 3] array.
        """
        image = check_image(image)
        size = (image.shape[0], image.shape[1])
        crops = crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        found = [mask for crop in crops for mask in self._masks_of_crop(image, crop)]
        if len(crops) > 1:
            scores = [1 / _area(mask.crop_box) for mask in found]
            found = _distinct(found, scores, self.crop_nms_thresh)
        if self.min_mask_region_area > 0:
            found = self._without_small_regions(found, size)
        return [self._record(mask, size) for mask in found]

    def _masks_of_crop(self, image: np.ndarray, crop: Crop) -> list[_Mask]:
        x0, y0, x1, y1 = crop.box
        self.predictor.set_image(image[y0:y1, x0:x1])
        points = self.point_grids[crop.layer] * (x1 - x0, y1 - y0)
        found = list(self._masks_of_points(points, crop.box, (image.shape[0], image.shape[1])))
        self.predictor.reset_image()
        return _distinct(found, [mask.predicted_iou for mask in found], self.box_nms_thresh)

    def _masks_of_points(
        self, points: Float[np.ndarray, "N 2"], crop: Box, size: tuple[int, int]
    ) -> Iterator[_Mask]:
        """Masks that are good enough, prompt by prompt; one is at the photo's size at a time."""
        predictor, embedding = self.predictor, self.predictor.embedding
        rows, cols = (4 * side for side in embedding.features.shape[1:3])
        side, sizes = predictor.image_size, embedding.sizes[0]
        frame = ((side, side), sizes.resized, sizes.original)
        labels = np.ones((len(points), 1), np.int32)
        prompt = ImagePrompt(points[:, None], labels, None, None)
        arrays = prompt.arrays(sizes, (rows, cols))
        at_once = min(self.points_per_batch, predictor.prompts_at_once)
        for start in range(0, len(points), at_once):
            parts = [arrays.part(start, start + at_once)]
            low_res, iou = predictor.compiled.decode(
                embedding.arrays, *pad_together(parts, at_once, MIN_POINTS)
            )
            iou, logits = np.asarray(iou)[0], None
            for index, point in enumerate(points[start : start + at_once]):
                for mask in range(iou.shape[1]):
                    score = iou[index, mask]
                    if self.pred_iou_thresh > 0 and not score > self.pred_iou_thresh:
                        continue
                    logits = np.asarray(low_res)[0] if logits is None else logits
                    resized = resize_mask_logits(logits[index, mask], *frame)
                    good = self._checked(resized, float(score), point, crop, size)
                    if good is not None:
                        yield good

    def _checked(
        self,
        logits: Float[np.ndarray, "height width"],
        predicted_iou: float,
        point: Float[np.ndarray, " 2"],
        crop: Box,
        size: tuple[int, int],
    ) -> _Mask | None:
        """The mask of a crop in the photo, if it is stable and the crop's edge has not cut it."""
        stability = stability_score(logits, self.stability_score_offset)
        if self.stability_score_thresh > 0 and not stability >= self.stability_score_thresh:
            return None
        mask = logits > MASK_THRESHOLD
        x, y = crop[:2]
        x0, y0, x1, y1 = mask_box(mask)
        box = (x0 + x, y0 + y, x1 + x, y1 + y)
        if _is_cut(box, crop, (0, 0, size[1], size[0])):
            return None
        whole = np.zeros(size, bool)
        whole[crop[1] : crop[3], crop[0] : crop[2]] = mask
        at = (float(point[0] + x), float(point[1] + y))
        return _Mask(run_lengths(whole), box, predicted_iou, at, stability, crop)

    def _without_small_regions(self, found: list[_Mask], size: tuple[int, int]) -> list[_Mask]:
        """Masks without small holes and islands; of nearly equal ones those that had none."""
        changed, scores = [], []
        for mask in found:
            pixels, holes = remove_small_regions(
                _from_run_lengths(mask.lengths, size), self.min_mask_region_area, "holes"
            )
            pixels, islands = remove_small_regions(pixels, self.min_mask_region_area, "islands")
            if holes or islands:
                mask = mask._replace(lengths=run_lengths(pixels), box=mask_box(pixels))
            changed.append(mask)
            scores.append(0.0 if holes or islands else 1.0)
        return _distinct(changed, scores, max(self.box_nms_thresh, self.crop_nms_thresh))

    def _record(self, mask: _Mask, size: tuple[int, int]) -> dict[str, Any]:
        segmentation: Any
        if self.output_mode == "binary_mask":
            segmentation = _from_run_lengths(mask.lengths, size)
        elif self.output_mode == "coco_rle":
            segmentation = {"size": list(size), "counts": rle_text(mask.lengths).decode()}
        else:
            segmentation = {"size": list(size), "counts": mask.lengths.tolist()}
        return {
            "segmentation": segmentation,
            "area": int(mask.lengths[1::2].sum()),
            "bbox": _xywh(mask.box),
            "predicted_iou": mask.predicted_iou,
            "point_coords": [list(mask.point)],
            "stability_score": mask.stability_score,
            "crop_box": _xywh(mask.crop_box),
        }


class _Mask(NamedTuple):
    """A mask that was found; boxes (x0, y0, x1, y1) and run lengths are the photo's."""

    lengths: Int[np.ndarray, " runs"]
    box: Box
    predicted_iou: float
    point: tuple[float, float]
    stability_score: float
    crop_box: Box


def point_grid(side: int) -> Float[np.ndarray, "side*side 2"]:
    """Points (x, y) in the middles of side x side equal cells of [0, 1]^2, row by row."""
    middles = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(middles, middles), -1).reshape(-1, 2)


def crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[Crop]:
    """The photo, and for layer i 2^i x 2^i crops of it that overlap.

    Args:
        size: The photo's height and width.
        layers: How many layers of crops.
        overlap_ratio: Overlap in the first layer, as a share of the photo's shorter side; it
            halves with every layer.
    """
    height, width = size
    crops = [Crop((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * 2 / count)
        crop_width, crop_height = (
            math.ceil((overlap * (count - 1) + side) / count) for side in (width, height)
        )
        for column, row in itertools.product(range(count), repeat=2):
            x, y = (crop_width - overlap) * column, (crop_height - overlap) * row
            box = (x, y, min(x + crop_width, width), min(y + crop_height, height))
            crops.append(Crop(box, layer))
    return crops


def stability_score(logits: Float[np.ndarray, "height width"], offset: float) -> float:
    """Area above the higher over area above the lower threshold; NaN where both are empty."""
    inner = np.count_nonzero(logits > MASK_THRESHOLD + offset)
    outer = np.count_nonzero(logits > MASK_THRESHOLD - offset)
    return float(np.float32(inner) / np.float32(outer)) if outer else math.nan


def mask_box(mask: Bool[np.ndarray, "height width"]) -> Box:
    """First and last column and row of a mask, as (x0, y0, x1, y1); zeros for an empty one."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return int(cols[0]), int(rows[0]), int(cols[-1]), int(rows[-1])


def suppress(
    boxes: Float[np.ndarray, "N 4"], scores: Float[np.ndarray, " N"], threshold: float
) -> list[int]:
    """Non-maximum suppression: the boxes that stay, best first.

    Args:
        boxes: (x0, y0, x1, y1).
        scores: Of two boxes with the same score the first is the better one.
        threshold: A box goes where its IoU with a better one that stays is higher.
    """
    order = np.argsort(-scores, kind="stable")
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[order, :2])
        high = np.minimum(boxes[best, 2:], boxes[order, 2:])
        common = np.prod(np.maximum(high - low, 0), 1)
        union = areas[best] + areas[order] - common
        order = order[common <= threshold * union]
    return kept


def remove_small_regions(
    mask: Bool[np.ndarray, "height width"], area: int, kind: Literal["holes", "islands"]
) -> tuple[Bool[np.ndarray, "height width"], bool]:
    """Fill holes or remove islands of less than `area` pixels; the largest island stays.

    Pixels that touch at a corner are of one region.

    Returns:
        The mask, and whether it was changed.
    """
    pixels = ~mask if kind == "holes" else mask
    regions = np.empty(mask.shape, np.int32)
    scipy.ndimage.label(pixels, _EIGHT_NEIGHBOURS, output=regions)
    sizes = np.bincount(regions.reshape(-1))
    small = sizes < area
    small[0] = False  # the rest, which is no region
    if not small.any():
        return mask, False
    if kind == "holes":
        return mask | small[regions], True
    if small[1:].all():
        small[1 + sizes[1:].argmax()] = False
    return mask & ~small[regions], True


def _distinct(found: list[_Mask], scores: Sequence[float], threshold: float) -> list[_Mask]:
    """What non-maximum suppression leaves of masks, best first."""
    boxes = np.array([mask.box for mask in found], np.float64).reshape(-1, 4)
    return [found[index] for index in suppress(boxes, np.array(scores, np.float64), threshold)]


def _is_cut(box: Box, crop: Box, photo: Box) -> bool:
    """Whether a side of the box is near a side of the crop that is none of the photo."""
    sides = np.array(box)
    near_crop = np.abs(sides - crop) <= _CROP_EDGE
    return bool((near_crop & ~(np.abs(sides - photo) <= _CROP_EDGE)).any())


def _from_run_lengths(lengths: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape(size[::-1]).T


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _xywh(box: Box) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
