"""How something grows: the exponent of a power law, by least squares over logarithms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.cases import shapes
from benchmarks.records import Record
from sparsesam_jax.config import Sparsity
from sparsesam_jax.sparsity.work import encoder_work

# The exponent of memory along each axis: tokens times images, whatever the density.
_MEMORY = {"batch": 1.0, "image_size": 2.0, "density": 0.0}
AXES = tuple(_MEMORY)
COLUMNS = {
    "against": "{against}",
    "model": "{model}",
    "implementation": "{implementation}",
    "density r": "{density}",
    "points": "{points}",
    "exponent of time ↓": "{time:.2f}",
    "expected of time": "{expected_time:.2f}",
    "exponent of memory ↓": "{memory:.2f}",
    "expected of memory": "{expected_memory:.2f}",
}


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The b of `y = a x^b`; None with fewer than two different x, or where one is not positive."""
    if len({x for x, _ in points}) < 2 or min(min(point) for point in points) <= 0:
        return None
    x, y = np.log(points).T
    return float(np.polyfit(x, y, 1)[0])


def fits(results: Sequence[Record]) -> list[dict[str, float | str | None]]:
    """Exponents of time and memory along every series of the scaling suite.

    What is expected of time is the exponent of the counted multiply-accumulates over the same
    points; of memory, that of what the temporary buffers hold.
    """
    found = []
    for (axis, model, implementation, density), line in series(results).items():
        found.append(
            {
                "axis": axis,
                "against": axis.replace("_", " "),
                "model": model,
                "implementation": implementation,
                "density": density,
                "points": ", ".join(f"{r[axis]:g}" for r in line),
                "time": exponent([(r[axis], r["median_ms"]) for r in line]),
                "expected_time": exponent([(r[axis], macs(r)) for r in line]),
                "memory": exponent([(r[axis], r["temp_mib"]) for r in line]),
                "expected_memory": _MEMORY[axis],
            }
        )
    return found


def macs(record: Record) -> float:
    """Multiply-accumulates of a record's whole batch."""
    config = shapes.model_config(record["model"]).image_encoder
    sparsity = Sparsity(**record["sparsity"]) if record["sparsity"] else None
    side = record["image_size"] // config.patch_size
    return float(encoder_work(config, sparsity, (side, side)).total) * record["batch"]


def series(results: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """The records along each axis, sorted; only density's axis mixes densities."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for r in results:
        if r["suite"] == "scaling" and r.get("median_ms") is not None and not r["not_run"]:
            for axis in r["axes"]:
                density = "all" if axis == "density" else f"{r['density']:g}"
                key = (axis, r["model"], r["implementation"], density)
                found.setdefault(key, []).append(r)
    return {
        key: sorted(line, key=lambda r: r[key[0]])
        for key, line in sorted(found.items())
        if len(line) > 1
    }
