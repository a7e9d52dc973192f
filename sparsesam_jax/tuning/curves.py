"""The curves of a run's log as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from sparsesam_jax.checkpoints.atomic import atomic_path

_PANELS = {
    "loss": ("loss",),
    "IoU while tuning": ("iou_0", "best_iou_0"),
    "learning rate": ("learning_rate",),
}


def draw_curves(log: Path, path: Path) -> None:
    """Draw loss, IoU, learning rate and validation over the steps; matplotlib is needed.

    Args:
        log: The run's `log.jsonl`.
        path: The picture, PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [json.loads(row) for row in log.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "validation" in row]
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, 2).flat)
    for axis, (title, names) in zip(axes, _PANELS.items(), strict=False):
        for name in names:
            axis.plot([row["step"] for row in steps], [row[name] for row in steps], label=name)
        axis.set(title=title, xlabel="step")
        axis.legend()
    last = axes[3]
    for name in validations[0]["validation"] if validations else ():
        values = [row["validation"][name] for row in validations]
        last.plot([row["step"] for row in validations], values, marker="o", label=name)
    last.set(title="validation", xlabel="step")
    if validations:
        last.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
