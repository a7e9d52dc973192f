"""What the device reaches in what the encoder is made of: products, plain attention, a copy.

`peers.jax_ceilings` says what runs. Other suites measure the ceilings of their cases first, and
say which share of them they reach.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.records import Record
from benchmarks.run.jobs import Job, Program
from benchmarks.run.options import Batches, Dtype, Loops, Models, SuiteOptions

KEYS = ("model", "batch", "implementation", "shape")
Ceiling = dict[str, float]  # TFLOP/s of `products` and `attention`, TB/s of `copy`; `copies`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure; the rows of the products are the tokens of a batch."""

    models: Models = ("vit_b", "vit_l", "vit_h")
    batches: Batches = (8, 1)
    dtype: Dtype = "bfloat16"
    loops: Loops = 10


class CeilingsJob(Job):
    """All ceilings of a model at a batch, which check themselves."""

    @property
    def label(self) -> str:
        """The model and the batch."""
        return f"ceilings {self.what[0]} B{self.what[1]} {self.options.dtype}"

    def build(self) -> Program:
        """One program a ceiling."""
        from benchmarks.peers import jax_ceilings

        (model, batch), own = self.what, self.options
        return jax_ceilings.build(model, batch, own.dtype, own.runs, own.loops)


def jobs(options: Any) -> list[Job]:
    """One case a model and batch, of the options of any suite that has them."""
    cases = itertools.product(options.models, options.batches)
    found: list[Job] = []
    for model, batch in cases:
        fields = dict(model=model, batch=batch, dtype=options.dtype, density=1.0, peak_mib=None)
        fields |= {"peer": "xla", "input": "standard normal"}
        own: dict[str, Any] = dict(
            suite="ceilings", options=options, implementation="xla", fields=fields
        )
        found.append(CeilingsJob(what=(model, batch), **own))
    return found


def ceiling(found: Sequence[Record], model: str, batch: int) -> Ceiling | None:
    """All products together, attention, copy; None where nothing was measured."""
    own = [r for r in found if r["suite"] == "ceilings" and not r["not_run"]]
    own = [r for r in own if (r["model"], r["batch"]) == (model, batch)]
    if not own:
        return None
    attention = [r["tflops"] for r in own if r["implementation"].startswith("attention")]
    copies = [r["tbs"] for r in own if r["implementation"] == "copy"]
    products = [(r["tflops"], r["median_ms"]) for r in own if len(r["shape"]) == 3]
    ms = sum(ms for _, ms in products)
    return {
        "products": sum(rate * ms for rate, ms in products) / ms,
        "attention": attention[-1],
        "copy": copies[-1],
        "copies": own[-1]["copies"],
    }


def floor_ms(work: Any, batch: int, ceiling: Ceiling) -> dict[str, float]:
    """Milliseconds of an encoder's parts at the ceilings' rates, for its `encoder_work`."""
    attention = sum(block.attention for block in work.blocks)
    scale = 2e-9 * batch
    return {
        "products": (work.total - attention) * scale / ceiling["products"],
        "attention": attention * scale / ceiling["attention"],
    }
