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
from typer import Option

from benchmarks import peers
from benchmarks.cases import shapes
from benchmarks.cases.encoder_cases import EncoderCase
from benchmarks.records import Record
from benchmarks.run import options as common
from benchmarks.run.jobs import Job, Program
from benchmarks.run.timing import Spread, time_ms
from benchmarks.suites import ceilings
from sparsesam_jax.config import ImageEncoderConfig, Sparsity

# Relative Frobenius against float32. Rounding in every layer; and in sparse encoders, groups of
# nearly equal importance that change places. Another function is off by 0.3 or more.
MAX_ERROR = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
MAX_SPARSE_ERROR = {"float32": 5e-2, "bfloat16": 0.2, "float16": 0.1}
MAX_FLOAT8_ERROR = (0.1, 0.25)  # dense and sparse, of weights without structure
REPEATS = 20  # runs of ours that must agree to the bit, on a GPU
IMPLEMENTATIONS = peers.names("encoder")
KEYS = ("model", "batch", "density", "sparse", "peer", "implementation", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(common.SuiteOptions):
    """What to measure: every combination of the lists that there is."""

    quick_fields: ClassVar = {
        "implementations": ("xla", "mosaic_gpu", "eager", "compile", "flex", "transformers")
    }
    choices: ClassVar = {"implementations": IMPLEMENTATIONS}

    models: common.Models = ("vit_l",)
    batches: common.Batches = (8, 1)
    densities: common.Densities = (1.0, 0.3)
    implementations: common.Implementations = IMPLEMENTATIONS
    ranking: Annotated[str | None, Option(help="Of `Sparsity`, sparse cases.")] = None
    split: Annotated[str | None, Option(help="Of `Sparsity`, sparse cases.")] = None
    dtype: common.Dtype = "bfloat16"
    check: Annotated[bool, Option(help="Compare with float32 XLA before timing.")] = True
    decomposition: Annotated[
        Sequence[float],
        Option(help="Density of sparse attention with the whole MLP; may be repeated."),
    ] = ()
    parts: Annotated[int, Option(help="Longest kernels of our cases to print.")] = 0
    warmups: common.Warmups = 5
    loops: common.Loops = 10

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
    found: list[Job] = []
    for model in options.models:
        config = shapes.model_config(model).image_encoder
        kept = [options.sparsity(density) for density in options.densities]
        for density in options.decomposition:
            if whole := options.sparsity(density):
                kept.append(attention_only(whole, config))
        if options.check:
            cases = [EncoderCase(model=model, sparsity=one) for one in kept]
            found += [job("encoder", case, None, options) for case in cases]
        found += ceilings.jobs(dataclasses.replace(options, models=(model,)))
        for name, batch in itertools.product(options.implementations, options.batches):
            for one in kept:
                what = EncoderCase(model=model, batch=batch, sparsity=one, dtype=options.dtype)
                if what.attention_only and name != "mosaic_gpu":
                    continue
                if name in peers.names("encoder", what.density):
                    part = "attention" if what.attention_only else "attention and MLP"
                    known = {"sparse": None if one is None else part}
                    found.append(job("encoder", what, name, options, **known))
    return found


def job(suite: str, what: EncoderCase, name: str | None, options: Any, **known: Any) -> Job:
    """A peer's encoder, or without a name the reference; `known` goes into its records."""
    own: dict[str, Any] = dict(suite=suite, options=options, implementation=name)
    if name is None:
        return EncoderJob(what=what.reference, **own)
    own |= dict(fields=what.fields | known, max_error=max_error(what, name))
    if getattr(options, "check", True):
        own["reference"] = str(what.reference)
    return EncoderJob(what=what, **own)


def max_error(what: EncoderCase, name: str) -> float:
    """How far a peer's features may be from the reference."""
    if name.startswith("float8"):
        return MAX_FLOAT8_ERROR[what.sparsity is not None]
    return (MAX_ERROR if what.sparsity is None else MAX_SPARSE_ERROR)[what.dtype]


class EncoderJob(Job):
    """A peer's encoder; its output is the first image's features."""

    def build(self) -> Program:
        """It is compiled, and has run once."""
        what, name, timed = self.what, self.implementation or "xla", self.implementation is not None
        own = dict(image_size=what.image_size, own_tables=not timed)
        own = own if peers.PEERS[name].ours else {}
        shared = (name, what.model, what.batch, what.dtype, what.sparsity)
        encoder = peers.builder(name, "encoder")(*shared, **own)

        def measure() -> Record:
            for _ in range(self.options.warmups):
                encoder.call()
            encoder.device.start_peak()
            runs = self.options.runs
            found = Spread.of([time_ms(encoder.call) for _ in range(runs)])._asdict()
            found |= encoder.device.peak() | {"queued_ms": encoder.queued_ms(runs)}
            if not peers.PEERS[name].ours:
                return found
            from benchmarks.peers.jax_models import kernel_times, on_gpu

            repeats = (encoder.call() for _ in range(REPEATS if on_gpu() else 2))
            equal = (np.array_equal(np.asarray(x, np.float32), encoder.output) for x in repeats)
            found["repeats_equal"] = all(equal)
            profile = self.suite == "encoder"
            return found | ({"parts_ms": kernel_times(encoder.call)} if profile else {})

        return Program(encoder.output[0], measure if timed else None, encoder.notes)

    def finish(self, record: Record, found: Sequence[Record]) -> None:
        """Rates, and the shares of the ceilings where they were measured."""
        what, work, ms = self.what, self.what.work, record["median_ms"]
        record["ms_per_image"] = ms / what.batch
        record["tflops"] = 2e-9 * what.batch * work.total / ms
        if ceiling := ceilings.ceiling(found, what.model, what.batch):
            floor = ceilings.floor_ms(work, what.batch, ceiling)
            record |= {"ceiling": ceiling, "floor_ms": floor}
            record["share_of_ceiling"] = sum(floor.values()) / ms


def show(results: list[Record], options: Options) -> None:
    """Print the longest kernels of our cases."""
    for record in results:
        for part, ms in list(record.get("parts_ms", {}).items())[: options.parts]:
            label = f"{record['model']} B{record['batch']} r{record['density']}"
            print(f"{label} {record['implementation']} {ms:8.3f} ms  {part[:90]}", flush=True)
