"""What rows amount to: one summary a method and density, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

from rich import box
from rich.table import Table

from sparsesam_jax.evaluation.rows import Row


class Summary(TypedDict):
    """One line of `summary.json`.

    `miou_change` is the difference to the dense encoder on the same images, `agreement` the mean
    IoU with its masks, `feature_error` the mean relative difference to its features, and `gmacs`
    the encoder's 10^9 multiply-accumulates an image, counted.
    """

    method: str
    density: float
    prompts: str
    protocol: str
    images: int
    miou: float
    boundary_iou: float
    miou_change: float
    agreement: float
    feature_error: float
    images_per_second: float
    gmacs: float


def summarise(
    rows: Sequence[Row],
    dense: Sequence[Row],
    *,
    method: str,
    density: float,
    gmacs: float,
    mean_batch: int | None,
) -> Summary:
    """The summary of one method at one density.

    Args:
        rows: Its rows, in the images' order.
        dense: The dense encoder's rows of the same images.
        method: What the summary calls it.
        density: What the summary calls its density.
        gmacs: Counted work of one image.
        mean_batch: Images whose mean is taken before the mean of all; None takes it at once.
    """

    def mean(value: Callable[[Row], float], of: Sequence[Row] = rows) -> float:
        values = [value(row) for row in of]
        size = mean_batch or len(values)
        batches = [values[i : i + size] for i in range(0, len(values), size)]
        # Exact sums, so that a resumed run's last digit is that of a whole one.
        return math.fsum(math.fsum(batch) / len(batch) for batch in batches) / len(batches)

    # Compilation is no part of the speed, unless every call had to compile.
    timed = [row.seconds for row in rows if not row.compiled] or [row.seconds for row in rows]
    miou = mean(lambda row: row.iou)
    return Summary(
        method=method,
        density=density,
        prompts=rows[0].prompts,
        protocol=rows[0].protocol,
        images=len(rows),
        miou=miou,
        boundary_iou=mean(lambda row: row.boundary_iou),
        miou_change=miou - mean(lambda row: row.iou, dense),
        agreement=mean(lambda row: row.agreement),
        feature_error=mean(lambda row: row.feature_error),
        images_per_second=len(timed) / sum(timed),
        gmacs=gmacs,
    )


def table(summaries: Sequence[Summary]) -> Table:
    """The summaries for reading."""
    first = summaries[0]
    result = Table(
        title=f"{first['images']} images, prompts {first['prompts']}, protocol {first['protocol']}",
        caption="Change: mIoU minus the dense encoder's. Agree: IoU with its masks. Features: "
        "relative difference to its features.",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("method", "density"):
        result.add_column(name, no_wrap=True)
    for name in ("mIoU", "change", "boundary", "agree", "features", "img/s", "GMAC"):
        result.add_column(name, justify="right", no_wrap=True)
    for s in summaries:
        result.add_row(
            s["method"],
            f"{s['density']:g}",
            f"{s['miou']:.4f}",
            f"{s['miou_change']:+.4f}",
            f"{s['boundary_iou']:.4f}",
            f"{s['agreement']:.4f}",
            f"{s['feature_error']:.3f}",
            f"{s['images_per_second']:.2f}",
            f"{s['gmacs']:.1f}",
        )
    return result
