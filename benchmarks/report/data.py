"""What the report reads: the newest record of every case, from all raw files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import Record

SUITES = ("encoder", "kernels", "ceilings", "end-to-end", "scaling", "cpu")
MODELS = ("vit_t", "vit_b", "vit_l", "vit_h")
IMPLEMENTATIONS = (
    "mosaic_gpu",
    "xla",
    "compile-max-autotune",
    "compile",
    "flex",
    "sdpa",
    "eager",
    "transformers-compile",
    "transformers",
    "transformers-eager",
)
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
    "model": _place(MODELS),
    "op": str,
    "batch": _descending,
    "image_size": lambda side: side or 0,
    "density": _descending,
    "order": str,
    "sparse": str,
    "implementation": _place(IMPLEMENTATIONS),
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


def devices(found: Sequence[Record], suite: str) -> list[str]:
    """Where a suite was measured."""
    return sorted({str(r["device"]) for r in measured(found, suite)})


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
