"""The image encoder: XLA, the Mosaic GPU kernels and PyTorch, each case in its own process.

    python -m benchmarks encoder --model vit_l --batch 8 --density 1 --density 0.3 --out FILE

Random weights, the same for all, and random images. Outputs are first compared with the same
function of the same weights in float32 (XLA). `decomposition` adds sparse attention with the whole
MLP, so that implementation and algorithm are told apart: dense as naive XLA, dense with the
kernels, sparse attention, both sparse.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import encoder_names
from benchmarks.cases import shapes
from benchmarks.records import Record
from benchmarks.run import machine
from benchmarks.run.pool import Job, RunOptions, labels
from benchmarks.suites import ceilings
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.sparsity.split import block_densities
from sparsesam_jax.sparsity.work import encoder_work

OURS = ("xla", "mosaic_gpu")
IMPLEMENTATIONS = (*OURS, *encoder_names.TORCH)
# Relative Frobenius against float32. Rounding in every layer; and in sparse encoders, groups of
# nearly equal importance that change places. Another function is off by 0.3 or more.
MAX_ERROR = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
MAX_SPARSE_ERROR = {"float32": 5e-2, "bfloat16": 0.2, "float16": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """What to measure: every combination of the lists that there is.

    Attributes:
        models: Names of `shapes.MODELS`.
        batches: Images a run.
        densities: 1 is dense. Peers that know no sparsity run dense only.
        implementations: Of `IMPLEMENTATIONS`.
        sparse: Fields of `Sparsity` beside its density; without them its defaults.
        dtype: Of all but the references.
        check: Whether to compare with float32.
        decomposition: Densities at which the kernels run sparse attention with the whole MLP too.
        warmups: Untimed runs of each.
        loops: Runs of a ceiling in one of its programs.
    """

    models: Sequence[str] = ("vit_l",)
    batches: Sequence[int] = (8, 1)
    densities: Sequence[float] = (1.0, 0.3)
    implementations: Sequence[str] = IMPLEMENTATIONS
    sparse: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    check: bool = True
    decomposition: Sequence[float] = ()
    warmups: int = 5
    loops: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            shapes.model_config(name)
        for name in self.implementations:
            if name not in IMPLEMENTATIONS:
                expected = ", ".join(IMPLEMENTATIONS)
                raise ValueError(f"implementation must be one of {expected}; got {name!r}")
        for density in (*self.densities, *self.decomposition):
            if not 0 < density <= 1:
                raise ValueError(f"density must lie in (0, 1], got {density}")
        for batch in self.batches:
            if batch < 1:
                raise ValueError(f"batch must be positive, got {batch}")
        self.sparsity(0.5)
        if self.dtype not in MAX_ERROR:
            raise ValueError(f"dtype must be one of {', '.join(MAX_ERROR)}; got {self.dtype!r}")

    def sparsity(self, density: float) -> Sparsity | None:
        """What a density keeps."""
        if density == 1:
            return None
        return Sparsity(density, **self.sparse)


QUICK = Options(
    models=(shapes.QUICK_MODEL,),
    batches=(1,),
    implementations=("xla", "mosaic_gpu", "eager", "compile", "flex", "transformers"),
    dtype="float32",
    runs=3,
    warmups=1,
    loops=1,
    width=1,
)


def attention_only(kept: Sparsity, config: ImageEncoderConfig) -> Sparsity:
    """The attention of a sparsity with the MLP of all tokens."""
    attention = tuple(pair[0] for pair in block_densities(config, kept))
    return dataclasses.replace(kept, attention_density=attention, mlp_density=1.0)


def jobs(options: Options) -> list[Job]:
    """All cases, by model; references and ceilings first."""
    ceiling: dict[tuple[str, int], list[Record]] = {}
    found = []
    for model in options.models:
        if options.check:
            found += [_reference(options, model, kept) for kept in _kept(options, model)]
        for batch in options.batches:
            found.append(_ceiling(options, model, batch, ceiling))
        for name, batch in itertools.product(options.implementations, options.batches):
            for kept in _kept(options, model):
                partial = kept is not None and kept.mlp_density is not None
                if kept is not None and name not in (*OURS, "flex"):
                    continue
                if partial and name != "mosaic_gpu":
                    continue
                found.append(_case(options, model, batch, name, kept, ceiling))
    return found


def _kept(options: Options, model: str) -> list[Sparsity | None]:
    whole = [options.sparsity(density) for density in options.densities]
    sparse = [kept for density in options.decomposition if (kept := options.sparsity(density))]
    config = shapes.model_config(model).image_encoder
    return whole + [attention_only(kept, config) for kept in sparse]


def _ceiling(
    options: Options, model: str, batch: int, ceiling: dict[tuple[str, int], list[Record]]
) -> Job:
    job = ceilings.job(model, batch, dtype=options.dtype, runs=options.runs, loops=options.loops)

    def keep(record: Record) -> None:
        if not record["not_run"]:
            ceiling.setdefault((model, batch), []).append(record)

    return dataclasses.replace(job, finish=keep)


def _reference_name(model: str, kept: Sparsity | None) -> str:
    density = 1.0 if kept is None else kept.density
    part = "attention only" if kept is not None and kept.mlp_density is not None else None
    return labels([model, "float32 xla", f"r{density}", part])


def _reference(options: Options, model: str, kept: Sparsity | None) -> Job:
    return Job(
        label=_reference_name(model, kept),
        module="benchmarks.peers.encoder_jax",
        arguments=dict(
            model=model,
            batch=1,
            implementation="xla",
            dtype="float32",
            sparsity=None if kept is None else dataclasses.asdict(kept),
            runs=0,
            warmups=0,
            timed=False,
        ),
        environment=machine.reference_environment(),
        known={"suite": "encoder", "peer": "reference", "model": model},
        name=_reference_name(model, kept),
    )


def _case(
    options: Options,
    model: str,
    batch: int,
    name: str,
    kept: Sparsity | None,
    ceiling: dict[tuple[str, int], list[Record]],
) -> Job:
    ours = name in OURS
    partial = kept is not None and kept.mlp_density is not None
    density = 1.0 if kept is None else kept.density
    part = ("attention" if partial else "attention and MLP") if kept is not None else None
    bounds = MAX_ERROR if kept is None else MAX_SPARSE_ERROR
    work = encoder_work(shapes.model_config(model).image_encoder, kept)

    def finish(record: Record) -> None:
        if record["not_run"] or "median_ms" not in record:
            return
        record["ms_per_image"] = record["median_ms"] / batch
        record["tflops"] = 2e-9 * batch * work.total / record["median_ms"]
        if rates := ceiling.get((model, batch)):
            config = shapes.model_config(model).image_encoder
            summary = ceilings.summary(rates)
            floor = ceilings.floor_ms(config, kept, batch, summary)
            record["ceiling"] = summary
            record["floor_ms"] = floor
            record["share_of_ceiling"] = sum(floor.values()) / record["median_ms"]

    return Job(
        label=labels(
            [
                f"{model} B{batch} r{density}",
                name,
                "attention only" if partial else None,
                options.dtype,
            ]
        ),
        module="benchmarks.peers.encoder_jax" if ours else "benchmarks.peers.encoder_torch",
        arguments=dict(
            model=model,
            batch=batch,
            implementation=name,
            dtype=options.dtype,
            sparsity=None if kept is None else dataclasses.asdict(kept),
            runs=options.runs,
            warmups=options.warmups,
        ),
        environment=machine.jax_environment() if ours else machine.torch_environment(),
        known={
            "suite": "encoder",
            "peer": "sparsesam_jax" if ours else _torch_peer(name),
            "model": model,
            "batch": batch,
            "density": density,
            "sparse": part,
            "sparsity": None if kept is None else dataclasses.asdict(kept),
            "implementation": name,
            "dtype": options.dtype,
            "image_size": shapes.model_config(model).image_encoder.image_size,
            "gmacs": work.total / 1e9,
            "weights": shapes.WEIGHTS_DISTRIBUTION,
            "pixels": shapes.PIXELS_DISTRIBUTION,
            "median_ms": None,
        },
        reference=_reference_name(model, kept) if options.check else None,
        max_error=bounds[options.dtype],
        finish=finish,
    )


def _torch_peer(name: str) -> str:
    return "transformers" if name.startswith("transformers") else "torch"
