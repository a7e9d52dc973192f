"""From an image to its masks, `set_image` and `predict` as users call them, and the parts.

A generated image and points on its diagonal. `preprocess` is the resize, `encoder` what remains of
`set_image`, transfer and normalisation included, `decoder` the jitted decoder, `upscale` takes the
masks to the image's size and to the host. Low-resolution logits are first compared with those of
the same model in float32. `peers.torch_models` says what transformers' parts are. What takes all
of it is timed by itself.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

from benchmarks import peers
from benchmarks.cases import shapes
from benchmarks.records import Record
from benchmarks.run.options import Densities, Dtype, Implementations, Models, SuiteOptions
from benchmarks.run.pool import Job
from benchmarks.run.process import Program
from benchmarks.run.timing import Spread, median_ms, time_ms
from benchmarks.suites import jobs as jobs_of

PROMPTS = (1, 10)
# Relative Frobenius error of the logits, after encoder and decoder; see `encoder.MAX_ERROR`.
MAX_ERROR = {"float32": 2e-2, "bfloat16": 0.15, "float16": 0.1}
MAX_SPARSE_ERROR = {"float32": 0.1, "bfloat16": 0.4, "float16": 0.3}
KEYS = ("model", "density", "implementation", "prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure: every combination; peers run dense only."""

    quick_fields: ClassVar = {
        "densities": (1.0,),
        "implementations": ("mosaic_gpu", "xla", "transformers"),
    }
    implementation_names = peers.names("predictor")

    models: Models = ("vit_l",)
    densities: Densities = (1.0, 0.3)
    implementations: Implementations = implementation_names
    dtype: Dtype = "bfloat16"


def jobs(options: Options) -> list[Job]:
    """All cases, each density's reference first."""
    found = []
    for model, density in itertools.product(options.models, options.densities):
        case = dict(model=model, density=density)
        name, dtype = f"{model} r{density}", options.dtype
        float32 = case | dict(implementation="xla", dtype="float32")
        found.append(jobs_of.reference("end-to-end", f"{name} float32 xla", __name__, float32))
        size = shapes.photo_size(shapes.model_config(model))
        known = {
            **case,
            "batch": 1,
            "dtype": dtype,
            "image": size,
            "weights": shapes.WEIGHTS_DISTRIBUTION,
        }
        for implementation in options.implementations:
            if implementation in peers.names("predictor", density):
                job = jobs_of.timed(
                    "end-to-end",
                    implementation,
                    __name__,
                    f"{name} {dtype}",
                    case | dict(dtype=dtype, runs=options.runs),
                    known,
                    reference=f"{name} float32 xla",
                    max_error=(MAX_ERROR if density == 1 else MAX_SPARSE_ERROR)[dtype],
                )
                found.append(job)
    return found


def build(model: str, density: float, implementation: str, dtype: str, runs: int = 0) -> Program:
    """A predictor that has predicted; its output is the logits of all prompts.

    Without runs, a reference.
    """
    peer, size = peers.PEERS[implementation], shapes.photo_size(shapes.model_config(model))
    own = dict(density=density) if peer.ours else {}
    predictor = peers.builder(implementation, "predictor")(implementation, model, dtype, **own)
    prompts = [shapes.diagonal_points(count, *size) for count in PROMPTS]
    logits = predictor.whole(prompts[-1])[2]

    def measure() -> Record:
        several = []
        for points in prompts:
            predictor.whole(points)
            predictor.start_peak()
            total = Spread.of([time_ms(lambda p=points: predictor.whole(p)) for _ in range(runs)])
            peak, calls = predictor.peak(), predictor.parts(points)
            parts = {name: median_ms(call, runs) for name, call in calls.items()}
            if peer.ours:  # its encoder is `set_image`
                parts["encoder"] -= parts["preprocess"]
            times = {**total._asdict(), "ms_per_image": total.median_ms}
            several.append({"prompts": len(points), **times, "parts_ms": parts, **peak})
        return {"several": several}

    return Program(logits, measure if runs else None, predictor.notes)


def show(results: list[Record], options: Options) -> None:
    """Print the parts."""
    from benchmarks.report import tables

    tables.show_parts(results, KEYS)
