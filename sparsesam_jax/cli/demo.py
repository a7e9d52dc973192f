"""`sparsesam demo`: one photo, dense and sparse, from a point and from a box."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import typer
from jax.typing import DTypeLike
from jaxtyping import Bool, UInt8

from pallas_kernels.implementation import Implementation
from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.config import Sparsity
from sparsesam_jax.predict.image_files import write_images
from sparsesam_jax.predict.overlay import draw_masks, side_by_side
from sparsesam_jax.predict.predictor import SamPredictor
from sparsesam_jax.predict.prompts import Prompt

# On scikit-image's coffee photo (600 x 400) the point is on the saucer, the box around the cup.
PROMPTS = {
    "point": Prompt(np.array([[150.0, 200.0]]), np.array([1], np.int32), None),
    "box": Prompt(np.zeros((0, 2)), np.zeros(0, np.int32), np.array([165.0, 10.0, 435.0, 215.0])),
}
_WARM_CALLS = 3


class Result(NamedTuple):
    """Masks of one model, by the prompt's name, and the encoder's seconds."""

    masks: dict[str, Bool[np.ndarray, "height width"]]
    first_s: float
    warm_s: float


def run(
    out: Path, density: float, weights: str, implementation: Implementation, dtype: DTypeLike
) -> None:
    """Segment the photo with both models, print times and agreement and write the overlay."""
    from skimage import data

    sparsity = Sparsity(density)
    image = data.coffee()
    dense = Sam.from_pretrained(weights, dtype=dtype, implementation=implementation)
    models = {"dense": dense, f"density {density:g}": dense.with_sparsity(sparsity)}
    device = jax.devices()[0]
    typer.echo(
        f"coffee (scikit-image, CC0), {image.shape[1]} x {image.shape[0]} pixels; "
        f"{weights} in {np.dtype(dtype).name} on {device.device_kind}, jax {jax.__version__}"
    )
    typer.echo(f"{'image encoder':16}{'first call, compiles':>22}{'warm (median of 3)':>22}")
    results: list[Result] = []
    for title, model in models.items():
        results.append(_segment(model, image))
        typer.echo(f"{title:16}{results[-1].first_s:20.2f} s{results[-1].warm_s:20.2f} s")
    agreement = ", ".join(
        f"{name} {_iou(*(result.masks[name] for result in results)):.3f}" for name in PROMPTS
    )
    typer.echo(f"agreement of the two (IoU of their masks): {agreement}")
    panels = [
        (title, draw_masks(image, [*result.masks.values()], [*PROMPTS.values()]))
        for title, result in zip(models, results, strict=True)
    ]
    write_images({out: side_by_side(panels)})
    typer.echo(f"wrote {out}")


def _segment(sam: Sam, image: UInt8[np.ndarray, "height width 3"]) -> Result:
    predictor = SamPredictor(sam)
    seconds = []
    for _ in range(1 + _WARM_CALLS):
        start = time.perf_counter()
        predictor.set_image(image)
        predictor.get_image_embedding().block_until_ready()
        seconds.append(time.perf_counter() - start)
    masks = {}
    for name, prompt in PROMPTS.items():
        # A point is ambiguous, so the proposal with the best score is taken; likewise for the box,
        # which then shares the compilation.
        proposals, scores, _ = predictor.predict(**prompt.arguments, multimask_output=True)
        masks[name] = proposals[scores.argmax()]
    return Result(masks, seconds[0], statistics.median(seconds[1:]))


def _iou(a: Bool[np.ndarray, "*shape"], b: Bool[np.ndarray, "*shape"]) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))
