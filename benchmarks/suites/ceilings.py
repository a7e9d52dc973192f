"""What the device reaches in what the encoder is made of: products, plain attention, a copy.

`peers.jax_ceilings` says what runs. Other suites measure the ceilings of their cases first, and
say which share of them they reach.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from benchmarks.records import Record
from benchmarks.run import machine
from benchmarks.run.options import Batches, Dtype, Loops, Models, SuiteOptions
from benchmarks.run.pool import Job, labels

KEYS = ("model", "batch", "implementation", "shape")
Ceiling = dict[str, float]  # TFLOP/s of `products` and `attention`, TB/s of `copy`; `copies`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure; the rows of the products are the tokens of a batch."""

    models: Models = ("vit_b", "vit_l", "vit_h")
    batches: Batches = (8, 1)
    dtype: Dtype = "bfloat16"
    loops: Loops = 10


def jobs(options: Any) -> list[Job]:
    """One case a model and batch, of the options of any suite that has them."""
    names = ("dtype", "runs", "loops")
    return [
        Job(
            label=labels(["ceilings", model, f"B{batch}", options.dtype]),
            module="benchmarks.peers.jax_ceilings",
            arguments=dict(model=model, batch=batch) | {n: getattr(options, n) for n in names},
            environment=machine.jax_environment(),
            known={
                "suite": "ceilings",
                "peer": "xla",
                "model": model,
                "batch": batch,
                "density": 1.0,
                "dtype": options.dtype,
                "input": "standard normal",
                "peak_mib": None,
            },
        )
        for model, batch in itertools.product(options.models, options.batches)
    ]


class Rates:
    """The ceilings that a suite has measured for its own cases."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], list[Record]] = {}

    def jobs(self, options: Any) -> list[Job]:
        """The ceilings of a suite's models and batches; they come before its cases."""
        return [dataclasses.replace(job, finish=self._keep) for job in jobs(options)]

    def _keep(self, record: Record) -> None:
        if not record["not_run"]:
            self._found.setdefault((record["model"], record["batch"]), []).append(record)

    def get(self, model: str, batch: int) -> Ceiling | None:
        """All products together, attention, copy; None where nothing was measured."""
        if (model, batch) not in self._found:
            return None
        attention = copy = flops = ms = copies = 0.0
        for r in self._found[model, batch]:
            copies = r["copies"]
            if r["implementation"] == "copy":
                copy = r["tbs"]
            elif r["implementation"].startswith("attention"):
                attention = r["tflops"]
            else:
                flops += r["tflops"] * r["median_ms"]
                ms += r["median_ms"]
        products = flops / ms if ms else 0.0
        return {"products": products, "attention": attention, "copy": copy, "copies": copies}


def floor_ms(work: Any, batch: int, ceiling: Ceiling) -> dict[str, float]:
    """Milliseconds of an encoder's parts at the ceilings' rates, for its `encoder_work`."""
    attention = sum(block.attention for block in work.blocks)
    scale = 2e-9 * batch
    return {
        "products": (work.total - attention) * scale / ceiling["products"],
        "attention": attention * scale / ceiling["attention"],
    }
