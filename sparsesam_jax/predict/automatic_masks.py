"""Masks of everything in a photo: a grid of points as prompts, and what is good and new of it.

The method, its parameters and its records are those of facebookresearch/segment-anything. There
every mask is made at the photo's size to be judged. Here it is judged in the same pixels, which
exist only inside of the sums over them; at the photo's size there are only the masks that survive.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import scipy.ndimage
from jaxtyping import Array, Bool, Float, Int, UInt8

from sparsesam_jax.model.sam import SamModel
from sparsesam_jax.model.transforms import Packing, ResizedMasks
from sparsesam_jax.predict.finite import check_finite
from sparsesam_jax.predict.mask_formats import packed_run_lengths, rle_text, run_lengths
from sparsesam_jax.predict.mask_measures import (
    MaskMeasures,
    mask_box,
    measure_on_device,
    measure_on_host,
)
from sparsesam_jax.predict.mask_pool import DevicePool, HostPool
from sparsesam_jax.predict.predictor import SamPredictor, check_image
from sparsesam_jax.predict.prompt_arrays import ImagePrompt, pad_together

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1
T = TypeVar("T")

PIXELS_AT_ONCE = 2**26  # Of masks that come to the host in one array that needs no copy.
_CROP_EDGE = 20.0  # Pixels from a crop's edge within which a mask may have been cut off.
_POINTS_ON_CPU = 4  # of a call: a sixth less time than one by one
_TOKENS = 2  # of a prompt: its point, and the one that SAM adds to points without a box
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
        points_per_batch: Prompts of one decoder call, fewer on a CPU; as many are decoded where
            fewer are left, so that one compiled size serves all.
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
            and `crop_box` (x, y, width, height), in pixels of the photo. Boolean arrays that come
            from a device are read-only.

        Raises:
            ValueError: The image is no uint8 [height, width, 3] array, or scores are not finite.
        """
        return self.generate_batch([check_image(image)])[0]

    def generate_batch(
        self, images: Iterable[UInt8[np.ndarray, "height width 3"]]
    ) -> list[list[dict[str, Any]]]:
        """Masks of everything in several photos of any sizes, which are encoded together.

        Args:
            images: As for `generate`.

        Returns:
            What `generate` returns, a list a photo; an empty one for no photo.

        Raises:
            ValueError: As `generate`.
        """
        images = [check_image(image) for image in images]
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        crops = [crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio) for size in sizes]
        pool = DevicePool() if self.predictor.on_device else HostPool()
        found: list[list[_Mask]] = [[] for _ in images]
        # All photos have as many crops; those at one place in the layers go together.
        for together in zip(*crops, strict=True):
            parts = [
                image[y0:y1, x0:x1]
                for image, ((x0, y0, x1, y1), _) in zip(images, together, strict=True)
            ]
            self.predictor.set_image_batch(parts)
            for masks, more in zip(found, self._masks_of_crops(together, sizes, pool), strict=True):
                masks += more
            self.predictor.reset_image()
        return [
            self._finished(masks, size, len(own) > 1, pool)
            for masks, size, own in zip(found, sizes, crops, strict=True)
        ]

    def _masks_of_crops(
        self, crops: Sequence[Crop], sizes: Sequence[tuple[int, int]], pool: HostPool | DevicePool
    ) -> list[list[_Mask]]:
        """The good and distinct masks of the crops whose embeddings are set, one a photo.

        While a call is decoded, the call before it is measured, and the one before that filtered.
        """
        found: list[list[_Mask]] = [[] for _ in crops]
        calls = _ahead(self._decoded(crops))
        for call, iou, which, measures in _ahead(map(self._measured, calls)):
            crop, found_here = crops[call.image], found[call.image]
            good, stability, boxes = self._filtered(measures(), crop.box, sizes[call.image])
            handles = pool.keep(call.low_res, which[good])
            areas = measures().area[good]
            for place, index in enumerate(which[good]):
                x, y = call.points[index // iou.shape[-1]] + crop.box[:2]
                found_here.append(
                    _Mask(
                        handle=handles[place],
                        frame=call.frame,
                        area=int(areas[place]),
                        box=tuple(boxes[place].tolist()),
                        predicted_iou=float(iou.reshape(-1)[index]),
                        point=(float(x), float(y)),
                        stability_score=float(stability[place]),
                        crop_box=crop.box,
                    )
                )
        return [
            _distinct(masks, [mask.predicted_iou for mask in masks], self.box_nms_thresh)
            for masks in found
        ]

    def _decoded(self, crops: Sequence[Crop]) -> Iterator[_Call]:
        """Calls of the decoder for the grids of all crops; they are under way."""
        predictor = self.predictor
        patch = predictor.compiled.config.image_encoder.patch_size
        at_once = self.points_per_batch
        if not predictor.on_device:
            at_once = min(at_once, max(_POINTS_ON_CPU, predictor.prompts_at_once))
        for image, (crop, embedding) in enumerate(zip(crops, predictor.embeddings, strict=True)):
            (size,), (rows, cols) = embedding.sizes, embedding.features.shape[1:3]
            frame = ((rows * patch, cols * patch), size.resized, size.original)
            points = self.point_grids[crop.layer] * size.original[::-1]
            labels = np.ones((len(points), 1), np.int32)
            arrays = ImagePrompt(points[:, None], labels, None, None).arrays(size, (0, 0))
            for start in range(0, len(points), at_once):
                part = arrays.part(start, start + at_once)
                low_res, iou = predictor.compiled.decode(
                    embedding.arrays,
                    *pad_together([part], at_once, _TOKENS),
                    frame=embedding.frame,
                )
                iou.copy_to_host_async()
                yield _Call(image, points[start : start + at_once], frame, low_res, iou)

    def _measured(self, call: _Call) -> tuple[_Call, np.ndarray, np.ndarray, _Measures]:
        """A call, its predicted IoU, which masks have a high one, and what they measure."""
        iou = np.asarray(call.iou)[0, : len(call.points)]
        check_finite(self.predictor.sam, iou)
        which = np.arange(iou.size)
        if self.pred_iou_thresh > 0:
            which = which[iou.reshape(-1) > self.pred_iou_thresh]
        measure = measure_on_device if self.predictor.on_device else measure_on_host
        offset = self.stability_score_offset
        return call, iou, which, measure(call.low_res, which, *call.frame, offset=offset)

    def _filtered(
        self, measures: MaskMeasures, crop: Box, size: tuple[int, int]
    ) -> tuple[Bool[np.ndarray, " N"], Float[np.ndarray, " good"], Int[np.ndarray, "good 4"]]:
        """Which masks are stable and not cut by the crop's edge; their stability and boxes."""
        with np.errstate(invalid="ignore"):  # 0 / 0 is no stability, and is NaN
            stability = measures.inner.astype(np.float32) / measures.outer.astype(np.float32)
        boxes = measures.boxes + np.array([*crop[:2], *crop[:2]])
        good = ~_is_cut(boxes, crop, (0, 0, size[1], size[0]))
        if self.stability_score_thresh > 0:
            good &= stability >= self.stability_score_thresh
        return good, stability[good], boxes[good]

    def _finished(
        self,
        found: list[_Mask],
        size: tuple[int, int],
        several_crops: bool,
        pool: HostPool | DevicePool,
    ) -> list[dict[str, Any]]:
        """Records of a photo's masks, of which the last duplicates go."""
        if several_crops:
            scores = [1 / _area(mask.crop_box) for mask in found]
            found = _distinct(found, scores, self.crop_nms_thresh)
        if self.min_mask_region_area > 0:
            found, masks = self._without_small_regions(found, self._binary(found, size, pool))
            if self.output_mode != "binary_mask":
                masks = [run_lengths(mask) for mask in masks]
        elif self.output_mode == "binary_mask":
            masks = self._binary(found, size, pool)
        else:
            masks = self._run_lengths(found, size, pool)
        return [
            {
                "segmentation": self._segmentation(segmentation, size),
                "area": mask.area,
                "bbox": _xywh(mask.box),
                "predicted_iou": mask.predicted_iou,
                "point_coords": [list(mask.point)],
                "stability_score": mask.stability_score,
                "crop_box": _xywh(mask.crop_box),
            }
            for mask, segmentation in zip(found, masks, strict=True)
        ]

    def _segmentation(self, mask: np.ndarray, size: tuple[int, int]) -> Any:
        if self.output_mode == "binary_mask":
            return mask
        counts = mask.tolist() if self.output_mode != "coco_rle" else rle_text(mask).decode()
        return {"size": list(size), "counts": counts}

    def _binary(
        self, found: list[_Mask], size: tuple[int, int], pool: HostPool | DevicePool
    ) -> list[Bool[np.ndarray, "height width"]]:
        masks = []
        for (x0, y0, x1, y1), own in self._at_size(found, pool):
            if own.shape[-2:] != size:
                own, part = np.zeros((len(own), *size), bool), own
                own[:, y0:y1, x0:x1] = part
            masks += list(own)
        return masks

    def _run_lengths(
        self, found: list[_Mask], size: tuple[int, int], pool: HostPool | DevicePool
    ) -> list[Int[np.ndarray, " runs"]]:
        masks = []
        for crop, packed in self._at_size(found, pool, packing="columns"):
            masks += [packed_run_lengths(mask, size, crop[:2]) for mask in packed]
        return masks

    def _at_size(
        self, found: list[_Mask], pool: HostPool | DevicePool, packing: Packing | None = None
    ) -> Iterator[tuple[Box, ResizedMasks]]:
        """Masks of a crop at its size, as many as one program makes, and the crop."""
        resize = self.predictor.transforms.resize_masks
        for (crop, frame), masks in itertools.groupby(found, lambda m: (m.crop_box, m.frame)):
            handles = [mask.handle for mask in masks]
            step = min(pool.at_once, max(1, PIXELS_AT_ONCE // _area(crop)))
            for start in range(0, len(handles), step):
                part = handles[start : start + step]
                low_res = pool.take(part)[:, None]
                yield crop, resize(low_res, range(len(part)), *frame, packing=packing)[:, 0]

    def _without_small_regions(
        self, found: list[_Mask], masks: list[np.ndarray]
    ) -> tuple[list[_Mask], list[np.ndarray]]:
        """Masks without small holes and islands; of nearly equal ones those that had none."""
        changed: list[tuple[_Mask, np.ndarray]] = []
        scores = []
        for mask, pixels in zip(found, masks, strict=True):
            pixels, holes = remove_small_regions(pixels, self.min_mask_region_area, "holes")
            pixels, islands = remove_small_regions(pixels, self.min_mask_region_area, "islands")
            if holes or islands:
                mask = mask._replace(area=int(pixels.sum()), box=mask_box(pixels))
            changed.append((mask, pixels))
            scores.append(0.0 if holes or islands else 1.0)
        boxes = np.array([mask.box for mask, _ in changed], np.float64).reshape(-1, 4)
        threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
        kept = [changed[index] for index in suppress(boxes, np.array(scores), threshold)]
        return [mask for mask, _ in kept], [pixels for _, pixels in kept]


_Measures = Callable[[], MaskMeasures]
_Frame = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # as `transforms` takes it


class _Call(NamedTuple):
    """A call of the decoder for points of a photo's grid; its arrays are the device's."""

    image: int
    points: Float[np.ndarray, "P 2"]
    frame: _Frame
    low_res: Array
    iou: Array


class _Mask(NamedTuple):
    """A mask that was found; boxes (x0, y0, x1, y1) are the photo's."""

    handle: Any
    frame: _Frame
    area: int
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


def _ahead(items: Iterable[T]) -> Iterator[T]:
    """Items, of which the next one has been begun whenever one is taken."""
    begun: deque[T] = deque()
    for item in items:
        begun.append(item)
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun


def _distinct(found: list[_Mask], scores: Sequence[float], threshold: float) -> list[_Mask]:
    """What non-maximum suppression leaves of masks, best first."""
    boxes = np.array([mask.box for mask in found], np.float64).reshape(-1, 4)
    return [found[index] for index in suppress(boxes, np.array(scores, np.float64), threshold)]


def _is_cut(boxes: Int[np.ndarray, "N 4"], crop: Box, photo: Box) -> Bool[np.ndarray, " N"]:
    """Whether a side of a box is near a side of the crop that is none of the photo."""
    near_crop = np.abs(boxes - np.array(crop)) <= _CROP_EDGE
    return np.any(near_crop & ~(np.abs(boxes - np.array(photo)) <= _CROP_EDGE), axis=1)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _xywh(box: Box) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
