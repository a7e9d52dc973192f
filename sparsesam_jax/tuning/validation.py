"""How good a model's masks are on photos that it was not tuned on: boxes, points and clicks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from sparsesam_jax.evaluation.datasets import Photo
from sparsesam_jax.evaluation.metrics import iou
from sparsesam_jax.evaluation.prompts import mask_prompt
from sparsesam_jax.model.sam import SamModel
from sparsesam_jax.predict.predictor import SamPredictor

CLICKS = (3, 5)


def validate(sam: SamModel, photos: Sequence[Photo]) -> dict[str, float]:
    """Mean IoU of the single mask for each kind of prompt, and how far its predicted IoU is off.

    Args:
        sam: The model.
        photos: Photos, each with one mask.

    Returns:
        `box`, `point` (the mask's innermost), `box+point`, `point_best_of_3` (of the proposals, by
        the truth), `clicks3` and `clicks5` (each further click where the mask before is wrong,
        which is the next one's mask input), and `iou_error`: the mean of
        |predicted - true| over the first three.
    """
    predictor = SamPredictor(sam)
    rows = [_photo_scores(predictor, photo) for photo in photos]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _photo_scores(predictor: SamPredictor, photo: Photo) -> dict[str, float]:
    predictor.set_image(photo.image)
    scores, errors = {}, []
    mask: Any = photo.mask
    low_res, arguments = None, {}
    for kind in ("box", "box+point", "point"):
        arguments = mask_prompt(photo.mask, kind).arguments
        masks, predicted, low_res = predictor.predict(**arguments, multimask_output=False)
        mask = masks[0]
        scores[kind] = iou(mask, photo.mask)
        errors.append(abs(float(predicted[0]) - scores[kind]))
    proposals = predictor.predict(**arguments)[0]
    scores["point_best_of_3"] = max(iou(proposal, photo.mask) for proposal in proposals)
    # The clicks go on from the point, the last prompt.
    points, labels = list(np.asarray(arguments["point_coords"])), [1]
    for count in range(2, max(CLICKS) + 1):
        point, label = next_click(mask, photo.mask)
        points.append(point)
        labels.append(label)
        masks, _, low_res = predictor.predict(
            np.array(points), np.array(labels), mask_input=low_res, multimask_output=False
        )
        mask = masks[0]
        if count in CLICKS:
            scores[f"clicks{count}"] = iou(mask, photo.mask)
    scores["iou_error"] = float(np.mean(errors))
    return scores


def next_click(
    mask: Bool[np.ndarray, "height width"], truth: Bool[np.ndarray, "height width"]
) -> tuple[np.ndarray, int]:
    """The innermost point (x, y) of what is wrong, and whether it belongs to the object.

    Beyond the photo's edge nothing is wrong. A mask without a fault gets the object's innermost.
    """
    wrong = mask ^ truth
    wrong = wrong if wrong.any() else truth
    depth = np.asarray(ndimage.distance_transform_edt(np.pad(wrong & truth, 1)))
    other = np.asarray(ndimage.distance_transform_edt(np.pad(wrong & ~truth, 1)))
    distance = np.maximum(depth, other)[1:-1, 1:-1]
    row, col = np.unravel_index(distance.argmax(), distance.shape)
    return np.array([col, row], np.float64), int(truth[row, col])
