"""Plots of an evaluation, with matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.evaluation.summary import Summary


def check_matplotlib() -> None:
    """Raise ValueError where matplotlib, an optional dependency, is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'sparsesam-jax[eval]'")


def quality_by_density(summaries: Sequence[Summary], path: Path) -> None:
    """Draw mIoU and boundary IoU over density, and mIoU over counted work, one line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        ("density", "miou", "density", "mIoU"),
        ("density", "boundary_iou", "density", "boundary IoU"),
        ("gmacs", "miou", "GMAC an image, counted", "mIoU"),
    )
    methods = list(dict.fromkeys(summary["method"] for summary in summaries))
    for axis, (x, y, x_title, y_title) in zip(axes, panels, strict=True):
        for method in methods:
            points = sorted((s[x], s[y]) for s in summaries if s["method"] == method)
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set_xlabel(x_title)
        axis.set_ylabel(y_title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    first = summaries[0]
    figure.suptitle(
        f"{first['images']} images, prompts {first['prompts']}, protocol {first['protocol']}"
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
