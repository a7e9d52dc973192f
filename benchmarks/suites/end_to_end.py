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
from typing import Any, ClassVar

from benchmarks import peers
from benchmarks.cases import shapes
from benchmarks.cases.encoder_cases import EncoderCase
from benchmarks.records import Record
from benchmarks.run.jobs import Job, Program
from benchmarks.run.options import Densities, Dtype, Implementations, Models, SuiteOptions
from benchmarks.run.timing import Spread, median_ms, time_ms
from sparsesam_jax.config import Sparsity

PROMPTS = (1, 10)
# Relative Frobenius error of the logits, after encoder and decoder; see `encoder.MAX_ERROR`.
MAX_ERROR = {"float32": 2e-2, "bfloat16": 0.15, "float16": 0.1}
MAX_SPARSE_ERROR = {"float32": 0.1, "bfloat16": 0.4, "float16": 0.3}
IMPLEMENTATIONS = peers.names("predictor")
KEYS = ("model", "density", "implementation", "prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure: every combination; peers run dense only."""

    quick_fields: ClassVar = {
        "densities": (1.0,),
        "implementations": ("mosaic_gpu", "xla", "transformers"),
    }
    choices: ClassVar = {"implementations": IMPLEMENTATIONS}

    models: Models = ("vit_l",)
    densities: Densities = (1.0, 0.3)
    implementations: Implementations = IMPLEMENTATIONS
    dtype: Dtype = "bfloat16"


def jobs(options: Options) -> list[Job]:
    """All cases, each density's reference first."""
    found: list[Job] = []
    for model, density in itertools.product(options.models, options.densities):
        sparsity = None if density == 1 else Sparsity(density)
        what = EncoderCase(model=model, sparsity=sparsity, dtype=options.dtype)
        names = ("model", "density", "batch", "dtype", "weights")
        fields = {name: what.fields[name] for name in names}
        fields["image"] = shapes.photo_size(shapes.model_config(model))
        bounds = MAX_ERROR if sparsity is None else MAX_SPARSE_ERROR
        timed: dict[str, Any] = dict(
            fields=fields, reference=str(what.reference), max_error=bounds[what.dtype]
        )
        own: dict[str, Any] = dict(suite="end-to-end", options=options)
        found.append(PredictorJob(what=what.reference, implementation=None, **own))
        for name in peers.names("predictor", density):
            if name in options.implementations:
                found.append(PredictorJob(what=what, implementation=name, **own, **timed))
    return found


class PredictorJob(Job):
    """A predictor; its output is the logits of all prompts."""

    def build(self) -> Program:
        """It has predicted."""
        name, config = self.implementation or "xla", shapes.model_config(self.what.model)
        ours, size = peers.PEERS[name].ours, shapes.photo_size(config)
        own = dict(density=self.what.density) if ours else {}
        predictor = peers.builder(name, "predictor")(name, self.what.model, self.what.dtype, **own)
        prompts = [shapes.diagonal_points(count, *size) for count in PROMPTS]
        logits, runs = predictor.whole(prompts[-1])[2], self.options.runs

        def measure() -> Record:
            several = []
            for points in prompts:
                predictor.whole(points)
                predictor.device.start_peak()
                times = [time_ms(lambda p=points: predictor.whole(p)) for _ in range(runs)]
                total, peak, calls = (
                    Spread.of(times),
                    predictor.device.peak(),
                    predictor.parts(points),
                )
                parts = {name: median_ms(call, runs) for name, call in calls.items()}
                if ours:  # its encoder is `set_image`
                    parts["encoder"] -= parts["preprocess"]
                own = {"prompts": len(points), "parts_ms": parts}
                own["ms_per_image"] = total.median_ms
                several.append(own | total._asdict() | peak)
            return {"several": several}

        return Program(logits, measure if self.implementation else None, predictor.notes)


def show(results: list[Record], options: Options) -> None:
    """Print the parts."""
    from benchmarks.report import tables

    tables.show_parts(results, KEYS)
