"""What the report reads: the newest record of every case, from all raw files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.records import Record

SUITES = ("encoder", "kernels", "ceilings", "end-to-end", "scaling", "cpu")
MODELS = ("vit_t", "vit_b", "vit_l", "vit_h")
_KEY = (
    "suite",
    "device",
    "op",
    "model",
    "batch",
    "image_size",
    "density",
    "sparse",
    "order",
    "peer",
    "implementation",
    "prompts",
    "dtype",
    "threads",
)
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


def newest(folder: Path) -> list[Record]:
    """The newest measurement of every case in a folder's `*.jsonl`, in a fixed order.

    Raises:
        ValueError: There is no record of any suite.
    """
    found: dict[tuple[str, ...], Record] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for r in records.read(path):
            if r.get("suite") not in SUITES or r.get("peer") == "reference":
                continue
            if r.get("timed") is False:
                continue
            record = _completed(r, path.name)
            key = tuple(str(record.get(name)) for name in _KEY)
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
    return sorted(kept, key=_order)


def _anywhere(record: Record) -> tuple[str, ...]:
    # A ceilings case that did not run names none of the programs that it has when it runs.
    left_out = ("device", "implementation") if record["suite"] == "ceilings" else ("device",)
    return tuple(str(record.get(name)) for name in _KEY if name not in left_out)


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


def _order(record: Record) -> tuple[object, ...]:
    model = str(record.get("model"))
    name = str(record.get("implementation"))
    return (
        SUITES.index(record["suite"]),
        str(record["device"]),
        MODELS.index(model) if model in MODELS else len(MODELS),
        str(record.get("op")),
        -(record.get("batch") or 0),
        record.get("image_size") or 0,
        -record["density"],
        str(record.get("order")),
        str(record.get("sparse")),
        IMPLEMENTATIONS.index(name) if name in IMPLEMENTATIONS else len(IMPLEMENTATIONS),
        str(record.get("peer")),
        name,
        record.get("prompts") or 0,
        str(record.get("dtype")),
    )


def measured(found: Iterable[Record], suite: str, device: str | None = None) -> list[Record]:
    """What a suite timed, on one device or on all."""
    return [
        r
        for r in found
        if r["suite"] == suite
        and r.get("median_ms") is not None
        and (device is None or r["device"] == device)
    ]


def devices(found: Sequence[Record], suite: str) -> list[str]:
    """Where a suite was measured."""
    return sorted({str(r["device"]) for r in measured(found, suite)})


def main_device(found: Sequence[Record]) -> str | None:
    """Where most encoders were measured: the pictures show that device alone."""
    return _most([str(r["device"]) for r in measured(found, "encoder")])


def main_dtype(found: Sequence[Record]) -> str | None:
    """What most encoders were measured in: others are in the first table alone."""
    return _most([str(r["dtype"]) for r in measured(found, "encoder")])


def _most(names: Sequence[str]) -> str | None:
    return max(sorted(set(names)), key=names.count, default=None)


def parts(record: Record) -> dict[str, float]:
    """Milliseconds of a run by what the kernels compute."""
    found = dict.fromkeys((*PARTS, OTHER), 0.0)
    for name, ms in record["parts_ms"].items():
        part = next((p for p, pattern in PARTS.items() if re.search(pattern, name)), OTHER)
        found[part] += ms
    return found


def decomposition(found: Sequence[Record]) -> list[tuple[Record, list[tuple[str, Record]]]]:
    """From naive dense to sparse, a list of steps for every model and batch that has them.

    The first of a pair is the last step.
    """
    cases: dict[tuple[str, int], list[Record]] = {}
    for r in found:
        if r["peer"] == "sparsesam_jax":
            cases.setdefault((r["model"], r["batch"]), []).append(r)
    result = []
    for own in cases.values():
        attention = [r for r in own if r["sparse"] == "attention"]
        for density in sorted({r["density"] for r in attention}, reverse=True):
            wanted = (
                ("dense, XLA", "xla", 1.0, None),
                ("dense, kernels", "mosaic_gpu", 1.0, None),
                ("sparse attention", "mosaic_gpu", density, "attention"),
                ("sparse attention and MLP", "mosaic_gpu", density, "attention and MLP"),
            )
            steps = [
                (label, r)
                for label, *key in wanted
                for r in own
                if [r["implementation"], r["density"], r["sparse"]] == key
            ]
            if len(steps) == len(wanted):
                result.append((steps[-1][1], steps))
    return result
