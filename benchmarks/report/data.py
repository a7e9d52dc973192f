"""What the report reads: the newest record of every case, from all raw files, and how it grows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records
from benchmarks.cases.shapes import MODELS, model_config
from benchmarks.peers import PEERS
from benchmarks.records import Record
from sparsesam_jax.config import Sparsity
from sparsesam_jax.sparsity.work import encoder_work

SUITES = ("encoder", "kernels", "ceilings", "end-to-end", "scaling", "cpu")
# Kernels by what they compute, the first that fits.
PARTS = {
    "attention": r"stripe_attention|window_attention|attention|fmha|sdpa",
    "position bias": r"relative_position|tile_position",
    "LayerNorm": r"norm",
    "products": r"matmul|nvjet|gemm|cutlass|xmma|cublas|dot",
}
OTHER = "other"


def _place(names: Sequence[str]) -> Callable[[Any], tuple[int, str]]:
    return lambda name: (names.index(name) if name in names else len(names), str(name))


def _descending(value: Any) -> float:
    return -(value or 0)


# The fields that make a case, and the order of the cases.
_ORDER: dict[str, Callable[[Any], Any]] = {
    "suite": SUITES.index,
    "device": str,
    "model": _place(list(MODELS)),
    "op": str,
    "batch": _descending,
    "image_size": lambda side: side or 0,
    "density": _descending,
    "order": str,
    "sparse": str,
    "implementation": _place(list(PEERS)),
    "peer": str,
    "prompts": lambda count: count or 0,
    "dtype": str,
    "threads": str,
}


def newest(folder: Path) -> list[Record]:
    """The newest measurement of every case in a folder's `*.jsonl`, in a fixed order.

    Raises:
        ValueError: There is no record of any suite.
    """
    found: dict[tuple[str, ...], Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for r in records.read(path):
            known = r.get("suite") in SUITES and r.get("peer") != "reference"
            if not known or r.get("timed") is False:
                continue
            record = _completed(r, path.name)
            key = _key(record)
            older = found.get(key)
            if older is None or _age(record) >= _age(older):
                found[key] = record
            if older is not None and "axes" in record:  # axes meet, and may be runs of their own
                found[key]["axes"] = sorted({*older["axes"], *record["axes"]})
    if not found:
        raise ValueError(f"results must hold records of a suite, got none in {str(folder)!r}")
    # What could not run names no device, and does not matter once it ran on some device.
    ran = {_anywhere(r) for r in found.values() if not r["not_run"]}
    kept = (r for r in found.values() if not r["not_run"] or _anywhere(r) not in ran)
    return sorted(kept, key=lambda r: [place(r.get(name)) for name, place in _ORDER.items()])


def _key(record: Record, left_out: Sequence[str] = ()) -> tuple[str, ...]:
    return tuple(str(record.get(name)) for name in _ORDER if name not in left_out)


def _anywhere(record: Record) -> tuple[str, ...]:
    # A ceilings case that did not run names none of the programs that it has when it runs.
    ceilings = record["suite"] == "ceilings"
    return _key(record, ("device", "implementation") if ceilings else ("device",))


def _completed(record: Record, file: str) -> Record:
    """Older records lack what has been added since."""
    full = {"not_run": None, "time": "", "device": None, "file": file, **record}
    if full["suite"] == "encoder":
        full.setdefault("sparse", None if full["density"] == 1 else "attention and MLP")
        full.setdefault("image_size", 1024)
    return full


def _age(record: Record) -> tuple[bool, str]:
    """What was measured counts more than what could not run."""
    return record.get("median_ms") is not None, record["time"]


def measured(found: Iterable[Record], suite: str, device: str | None = None) -> list[Record]:
    """What a suite timed, on one device or on all."""
    timed = [r for r in found if r["suite"] == suite and r.get("median_ms") is not None]
    return [r for r in timed if device is None or r["device"] == device]


def most(found: Sequence[Record], field: str) -> str | None:
    """The device (or dtype) of most encoders: pictures show it alone, tables the dtype."""
    names = [str(r[field]) for r in measured(found, "encoder")]
    return max(sorted(set(names)), key=names.count, default=None)


def parts(record: Record) -> dict[str, float]:
    """Milliseconds of a run by what the kernels compute."""
    found = dict.fromkeys((*PARTS, OTHER), 0.0)
    for name, ms in record["parts_ms"].items():
        part = next((p for p, pattern in PARTS.items() if re.search(pattern, name)), OTHER)
        found[part] += ms
    return found


STEPS = ("dense, XLA", "dense, kernels", "sparse attention", "sparse attention and MLP")


def decomposition(found: Sequence[Record]) -> list[list[Record]]:
    """From naive dense to sparse, the `STEPS` of every model, batch and density that has them."""
    cases: dict[tuple[str, int], dict[tuple[Any, ...], Record]] = {}
    for r in found:
        if r["peer"] == "sparsesam_jax":
            own = cases.setdefault((r["model"], r["batch"]), {})
            own[r["implementation"], r["sparse"], r["density"]] = r
    result = []
    for own in cases.values():
        densities = {density for _, sparse, density in own if sparse == "attention"}
        for density in sorted(densities, reverse=True):
            sparse = [("mosaic_gpu", s, density) for s in ("attention", "attention and MLP")]
            wanted = [("xla", None, 1.0), ("mosaic_gpu", None, 1.0), *sparse]
            if all(key in own for key in wanted):
                result.append([own[key] for key in wanted])
    return result


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
    config = model_config(record["model"]).image_encoder
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
