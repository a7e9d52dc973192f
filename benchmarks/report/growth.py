"""How something grows: the exponent of a power law, by least squares over logarithms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks import shapes
from benchmarks.records import Record
from sparsesam_jax.config import Sparsity
from sparsesam_jax.sparsity.work import encoder_work

AXES = ("batch", "image_size", "density")


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The b of `y = a x^b`; None with fewer than two different positive x, or a y of zero."""
    kept = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len(kept) < len(points) or len({x for x, _ in kept}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(kept) for values in zip(*kept, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in kept)
    return above / sum((x - mean_x) ** 2 for x, _ in kept)


def fits(results: Sequence[Record]) -> list[dict[str, float | str | None]]:
    """Exponents of time and memory along every series of the scaling suite.

    What is expected of time is the exponent of the counted multiply-accumulates over the same
    points; of memory, that of what the temporary buffers hold: tokens times images, whatever the
    density.
    """
    found = []
    for key, line in series(results).items():
        axis, model, implementation, density = key
        power = {
            name: exponent([(r[axis], value(r)) for r in line])
            for name, value in (
                ("time", lambda r: r["median_ms"]),
                ("memory", lambda r: r["temp_mib"]),
                ("macs", macs),
            )
        }
        found.append(
            {
                "axis": axis,
                "model": model,
                "implementation": implementation,
                "density": density,
                "points": ", ".join(f"{r[axis]:g}" for r in line),
                "time": power["time"],
                "expected_time": power["macs"],
                "memory": power["memory"],
                "expected_memory": {"batch": 1.0, "image_size": 2.0, "density": 0.0}[axis],
            }
        )
    return found


def macs(record: Mapping[str, object]) -> float:
    """Multiply-accumulates of a record's whole batch."""
    config = shapes.model_config(str(record["model"])).image_encoder
    kept = record["sparsity"]
    sparsity = Sparsity(**kept) if isinstance(kept, dict) else None
    side = int(str(record["image_size"])) // config.patch_size
    return float(encoder_work(config, sparsity, (side, side)).total) * int(str(record["batch"]))


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
