"""The image encoder: XLA, the Mosaic GPU kernels and PyTorch, each case in its own process.

    python -m benchmarks encoder --model vit_l --batch 8 --density 1 --density 0.3 --out FILE

Random weights, the same for all, and random images. Outputs are first compared with the same
function of the same weights in float32 (XLA). `decomposition` adds sparse attention with the whole
MLP, so that implementation and algorithm are told apart: dense as naive XLA, dense with the
kernels, sparse attention, both sparse. Ours say how long tracing, lowering and compiling took;
`--width 1` keeps these times free of other cases.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import typer

from benchmarks import peers
from benchmarks.cases import shapes
from benchmarks.cases.encoder_cases import EncoderCase
from benchmarks.records import Record
from benchmarks.run.options import (
    Batches,
    Densities,
    Dtype,
    Implementations,
    Loops,
    Models,
    SuiteOptions,
    Warmups,
)
from benchmarks.run.pool import Job
from benchmarks.run.process import Program
from benchmarks.run.timing import Runnable, Spread, time_ms
from benchmarks.suites import jobs as jobs_of
from benchmarks.suites.ceilings import Rates, floor_ms
from sparsesam_jax.config import ImageEncoderConfig, Sparsity

# Relative Frobenius against float32. Rounding in every layer; and in sparse encoders, groups of
# nearly equal importance that change places. Another function is off by 0.3 or more.
MAX_ERROR = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
MAX_SPARSE_ERROR = {"float32": 5e-2, "bfloat16": 0.2, "float16": 0.1}
MAX_FLOAT8_ERROR = (0.1, 0.25)  # dense and sparse, of weights without structure
REPEATS = 20  # runs of ours that must agree to the bit, on a GPU
KEYS = ("model", "batch", "density", "sparse", "peer", "implementation", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure: every combination of the lists that there is."""

    quick_fields: ClassVar = {
        "implementations": ("xla", "mosaic_gpu", "eager", "compile", "flex", "transformers")
    }
    implementation_names = peers.names("encoder")

    models: Models = ("vit_l",)
    batches: Batches = (8, 1)
    densities: Densities = (1.0, 0.3)
    implementations: Implementations = implementation_names
    ranking: Annotated[str | None, typer.Option(help="Of `Sparsity`, sparse cases.")] = None
    split: Annotated[str | None, typer.Option(help="Of `Sparsity`, sparse cases.")] = None
    dtype: Dtype = "bfloat16"
    check: Annotated[bool, typer.Option(help="Compare with float32 XLA before timing.")] = True
    decomposition: Annotated[
        Sequence[float],
        typer.Option(help="Density of sparse attention with the whole MLP; may be repeated."),
    ] = ()
    parts: Annotated[int, typer.Option(help="Longest kernels of our cases to print.")] = 0
    warmups: Warmups = 5
    loops: Loops = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sparsity(0.5)

    def sparsity(self, density: float) -> Sparsity | None:
        """What a density keeps."""
        given = {"ranking": self.ranking, "split": self.split}
        given = {name: value for name, value in given.items() if value}
        return None if density == 1 else Sparsity(density, **given)  # pyright: ignore[reportArgumentType]


def attention_only(kept: Sparsity, config: ImageEncoderConfig) -> Sparsity:
    """The attention of a sparsity with the MLP of all tokens."""
    from sparsesam_jax.sparsity.split import block_densities

    attention = tuple(pair[0] for pair in block_densities(config, kept))
    return dataclasses.replace(kept, attention_density=attention, mlp_density=1.0)


def jobs(options: Options) -> list[Job]:
    """All cases, by model; references and ceilings first."""
    rates, found = Rates(), []
    for model in options.models:
        config = shapes.model_config(model).image_encoder
        kept = [options.sparsity(density) for density in options.densities]
        for density in options.decomposition:
            if whole := options.sparsity(density):
                kept.append(attention_only(whole, config))
        if options.check:
            found += [reference(EncoderCase(model=model, sparsity=one), "encoder") for one in kept]
        found += rates.jobs(dataclasses.replace(options, models=(model,)))
        for name, batch in itertools.product(options.implementations, options.batches):
            for one in kept:
                what = EncoderCase(model=model, batch=batch, sparsity=one, dtype=options.dtype)
                if what.attention_only and name != "mosaic_gpu":
                    continue
                if name in peers.names("encoder", what.density):
                    found.append(_case(options, what, name, rates))
    return found


def _case(options: Options, what: EncoderCase, name: str, rates: Rates) -> Job:
    part = "attention" if what.attention_only else "attention and MLP"
    found = job(what, name, "encoder", options, sparse=None if what.sparsity is None else part)

    def finish(record: Record) -> None:
        found.finish(record)
        ceiling = rates.get(what.model, what.batch)
        if ceiling and not record["not_run"]:
            floor = floor_ms(what.work, what.batch, ceiling)
            record["ceiling"] = ceiling
            record["floor_ms"] = floor
            record["share_of_ceiling"] = sum(floor.values()) / record["median_ms"]

    own = dataclasses.replace(found, finish=finish)
    return own if options.check else dataclasses.replace(own, reference=None)


def reference(what: EncoderCase, suite: str) -> Job:
    """The encoder in float32 by XLA, which cases are compared with."""
    arguments = dict(case=dataclasses.asdict(what.reference), implementation="xla")
    return jobs_of.reference(suite, str(what.reference), __name__, arguments)


def job(what: EncoderCase, name: str, suite: str, options: Any, **known: Any) -> Job:
    """A peer's encoder, timed; `known` goes into its records."""
    work, given = what.work, dataclasses.asdict(what)

    def finish(record: Record) -> None:
        if not record["not_run"] and record["median_ms"] is not None:
            record["ms_per_image"] = record["median_ms"] / what.batch
            record["tflops"] = 2e-9 * what.batch * work.total / record["median_ms"]

    own = {
        "density": what.density,
        "image_size": what.image_size or what.config.image_size,
        "gmacs": work.total / 1e9,
    }
    profile = dict(profile=suite == "encoder")
    return jobs_of.timed(
        suite,
        name,
        __name__,
        what,
        dict(case=given, runs=options.runs, warmups=options.warmups) | profile,
        given | own | jobs_of.DRAWN | known,
        reference=str(what.reference),
        max_error=max_error(what, name),
        finish=finish,
    )


def max_error(what: EncoderCase, name: str) -> float:
    """How far a peer's features may be from the reference."""
    if name.startswith("float8"):
        return MAX_FLOAT8_ERROR[what.sparsity is not None]
    return (MAX_ERROR if what.sparsity is None else MAX_SPARSE_ERROR)[what.dtype]


def build(
    case: Record, implementation: str, runs: int = 0, warmups: int = 0, profile: bool = False
) -> Program:
    """A peer's encoder; its output is the first image's features. Without runs, a reference."""
    what, ours = EncoderCase.of(case), peers.PEERS[implementation].ours
    own = dict(image_size=what.image_size, own_tables=not runs) if ours else {}
    shared = (implementation, what.model, what.batch, what.dtype, what.sparsity)
    encoder = peers.builder(implementation, "encoder")(*shared, **own)

    def measure() -> Record:
        for _ in range(warmups):
            encoder.call()
        encoder.start_peak()
        spread = Spread.of([time_ms(encoder.call) for _ in range(runs)])
        found = spread._asdict() | encoder.peak() | {"queued_ms": encoder.queued_ms(runs)}
        return found | (_of_ours(encoder, profile) if ours else {})

    return Program(encoder.output[0], measure if runs else None, encoder.notes)


def _of_ours(encoder: Runnable, profile: bool) -> Record:
    """Whether repeats agree to the bit, and the time of every kernel."""
    from benchmarks.peers.jax_models import kernel_times, on_gpu

    repeats = (encoder.call() for _ in range(REPEATS if on_gpu() else 2))
    equal = all(np.array_equal(np.asarray(out, np.float32), encoder.output) for out in repeats)
    return {"repeats_equal": equal} | ({"parts_ms": kernel_times(encoder.call)} if profile else {})


def show(results: list[Record], options: Options) -> None:
    """Print the longest kernels of our cases."""
    for record in results:
        for part, ms in list(record.get("parts_ms", {}).items())[: options.parts]:
            label = f"{record['model']} B{record['batch']} r{record['density']}"
            print(f"{label} {record['implementation']} {ms:8.3f} ms  {part[:90]}", flush=True)
