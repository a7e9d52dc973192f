"""Masks and features of batches of photos from a model, by a protocol."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsesam_jax.evaluation.datasets import Photo
from sparsesam_jax.evaluation.protocols import Protocol, Query
from sparsesam_jax.predict.finite import check_finite
from sparsesam_jax.predict.predictor import SamPredictor


class Predictions(NamedTuple):
    """What a model says of a batch of photos, without the batch's filling.

    Attributes:
        masks: One a photo, at the photo's size.
        features: The image encoder's, each [1, Gh, Gw, C].
        seconds: Wall time of the whole call.
    """

    masks: list[Bool[np.ndarray, "height width"]]
    features: list[Float[Array, "1 Gh Gw C"]]
    seconds: float


def predict(
    predictor: SamPredictor,
    photos: Sequence[Photo],
    queries: Sequence[Query],
    *,
    protocol: Protocol,
    batch: int,
) -> Predictions:
    """One mask a photo, in one call of the encoder and one of the decoder for every grid.

    Args:
        predictor: The model's; threads may share it, for its image is left alone.
        photos: At most `batch`; a smaller number is filled up, because another one would compile
            again.
        queries: What `protocol` makes of each photo.
        protocol: How logits become masks.
        batch: Images of a call.

    Raises:
        ValueError: The prediction holds NaN.
    """
    start = time.perf_counter()
    filled = list(itertools.islice(itertools.cycle(queries), batch))
    predictor = copy.copy(predictor)
    predictor.set_image_batch([query.image for query in filled])
    arguments = [query.prompt.arguments for query in filled]
    logits, iou, low_res = predictor.predict_batch(
        [prompt["point_coords"] for prompt in arguments],
        [prompt["point_labels"] for prompt in arguments],
        [prompt["box"] for prompt in arguments],
        multimask_output=False,
        return_logits=True,
    )
    check_finite(predictor.sam, *iou, *low_res)
    masks = [
        protocol.mask(photo, whole[0], small[0])
        for photo, whole, small in zip(photos, logits, low_res, strict=False)
    ]
    embeddings = predictor.embeddings[: len(photos)]
    features = jax.block_until_ready([embedding.features for embedding in embeddings])
    return Predictions(masks, features, time.perf_counter() - start)
