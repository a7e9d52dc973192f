"""`sparsesam demo`: one photo, dense and sparse, from a point and from a box."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import typer
from jaxtyping import Bool, UInt8

from sparsesam_jax.cli.options import (
    DtypeOption,
    ImplementationOption,
    ProductsOption,
    WeightsOption,
    check_implementation,
)
from sparsesam_jax.predict.prompts import Prompt

if TYPE_CHECKING:
    from sparsesam_jax.checkpoints.pretrained import Sam

# On scikit-image's coffee photo (600 x 400) the point is on the saucer, the box around the cup.
PROMPTS = {
    "point": Prompt(np.array([[150.0, 200.0]]), np.array([1], np.int32), None),
    "box": Prompt(np.zeros((0, 2)), np.zeros(0, np.int32), np.array([165.0, 10.0, 435.0, 215.0])),
}
_WARM_CALLS = 3


def demo(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("overlay.png"),
    density: Annotated[float, typer.Option(help="What the sparse model keeps, (0, 1].")] = 0.4,
    weights: WeightsOption = "vit_t",
    implementation: ImplementationOption = "auto",
    dtype: DtypeOption = "float32",
    products: ProductsOption = "dtype",
) -> None:
    """Segment a photo from a point and from a box, dense and sparse, and compare.

    Prints the encoder's time with and without compilation and the IoU of dense and sparse masks.
    The overlay shows both models side by side: blue the point's mask, yellow the box's.
    """
    from sparsesam_jax.checkpoints.sources import locate
    from sparsesam_jax.config import Sparsity
    from sparsesam_jax.predict.image_files import check_writable, write_images

    check_writable(out)
    sparsity = Sparsity(density)
    locate(weights)
    check_implementation(implementation, "demo")

    import jax
    from skimage import data

    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.predict.overlay import draw_masks, side_by_side

    image = data.coffee()
    dense = Sam.from_pretrained(
        weights, dtype=dtype, implementation=implementation, products=products
    )
    models = {"dense": dense, f"density {density:g}": dense.with_sparsity(sparsity)}
    computed = [dtype] if products == "dtype" else [dtype, f"products in {products}"]
    typer.echo(
        f"coffee (scikit-image, CC0), {image.shape[1]} x {image.shape[0]} pixels; "
        f"{weights} in {', '.join(computed)} on {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}"
    )
    typer.echo(f"{'image encoder':16}{'first call, compiles':>22}{'warm (median of 3)':>22}")
    results: list[_Result] = []
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


class _Result(NamedTuple):
    """Masks of one model, by the prompt's name, and the encoder's seconds."""

    masks: dict[str, Bool[np.ndarray, "height width"]]
    first_s: float
    warm_s: float


def _segment(sam: Sam, image: UInt8[np.ndarray, "height width 3"]) -> _Result:
    from sparsesam_jax.predict import predictor as predictors
    from sparsesam_jax.predict.finite import check_finite

    predictor = predictors.SamPredictor(sam)
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
        proposals, *rest = predictor.predict(**prompt.arguments, multimask_output=True)
        check_finite(sam, *rest)
        masks[name] = proposals[rest[0].argmax()]
    return _Result(masks, seconds[0], statistics.median(seconds[1:]))


def _iou(a: Bool[np.ndarray, "*shape"], b: Bool[np.ndarray, "*shape"]) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))
