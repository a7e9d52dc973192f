"""Time and memory of our encoder against batch, image size and density, one at a time.

The other two stay at `batch`, the model's own image size and each of `densities`. Exponents are
fitted over all points and printed beside those of the counted work (`growth`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.cases import shapes
from benchmarks.growth import AXES
from benchmarks.records import Record
from benchmarks.run import machine
from benchmarks.run.pool import Job, RunOptions, labels
from benchmarks.suites.encoder import MAX_ERROR, MAX_SPARSE_ERROR
from sparsesam_jax.config import Sparsity
from sparsesam_jax.sparsity.work import encoder_work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """What to measure.

    Attributes:
        models: Names of `shapes.MODELS`.
        implementations: `xla` or `mosaic_gpu`.
        axes: Of `growth.AXES`.
        batches: Along that axis.
        image_sizes: Along that axis; multiples of the patch size.
        density_points: Along that axis.
        batch: Along the other axes.
        densities: Along the other axes.
        dtype: Of all but the references.
        warmups: Untimed runs of each.
    """

    models: Sequence[str] = ("vit_l",)
    implementations: Sequence[str] = ("mosaic_gpu",)
    axes: Sequence[str] = AXES
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    image_sizes: Sequence[int] = (512, 768, 1024, 1536, 2048)
    density_points: Sequence[float] = (1.0, 0.7, 0.5, 0.4, 0.3, 0.25)
    batch: int = 8
    densities: Sequence[float] = (1.0,)
    dtype: str = "bfloat16"
    warmups: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis in self.axes:
            if axis not in AXES:
                raise ValueError(f"axis must be one of {', '.join(AXES)}; got {axis!r}")
        for name in self.implementations:
            if name not in ("xla", "mosaic_gpu"):
                raise ValueError(f"implementation must be xla or mosaic_gpu; got {name!r}")
        for density in (*self.densities, *self.density_points):
            if not 0 < density <= 1:
                raise ValueError(f"density must lie in (0, 1], got {density}")
        for value in (self.batch, *self.batches):
            if value < 1:
                raise ValueError(f"batch must be positive, got {value}")
        for name in self.models:
            patch = shapes.model_config(name).image_encoder.patch_size
            for size in self.image_sizes:
                if size < 1 or size % patch:
                    raise ValueError(f"image_size must be a multiple of {patch}, got {size}")


QUICK = Options(
    models=(shapes.QUICK_MODEL,),
    implementations=("xla",),
    axes=("batch", "image_size"),
    batches=(1, 2),
    image_sizes=(128, 256),
    batch=1,
    dtype="float32",
    runs=3,
    warmups=1,
    width=1,
)


def jobs(options: Options) -> list[Job]:
    """All cases, once each even where axes meet; what each is compared with first."""
    found: list[Job] = []
    for model in options.models:
        own = shapes.model_config(model).image_encoder.image_size
        points: dict[tuple[int, int, float], list[str]] = {}
        for axis in options.axes:
            for density in options.densities if axis != "density" else options.density_points:
                along = {"batch": options.batches, "image_size": options.image_sizes}.get(axis, [0])
                for value in along:
                    batch = value if axis == "batch" else options.batch
                    size = value if axis == "image_size" else own
                    points.setdefault((batch, size, density), []).append(axis)
        for size, density in dict.fromkeys((size, density) for _, size, density in points):
            found.append(_reference(model, size, density))
        for implementation in options.implementations:
            for (batch, size, density), axes in points.items():
                found.append(_job(options, model, implementation, batch, size, density, axes))
    return found


def _arguments(model: str, batch: int, size: int, density: float) -> Record:
    sparsity = None if density == 1 else dataclasses.asdict(Sparsity(density))
    return dict(model=model, batch=batch, image_size=size, sparsity=sparsity)


def _reference_name(model: str, size: int, density: float) -> str:
    return labels([model, size, f"r{density}", "float32 xla"])


def _reference(model: str, size: int, density: float) -> Job:
    own = dict(implementation="xla", dtype="float32", runs=0, warmups=0, timed=False)
    return Job(
        label=_reference_name(model, size, density),
        module="benchmarks.peers.encoder_jax",
        arguments=_arguments(model, 1, size, density) | own,
        environment=machine.reference_environment(),
        known={"suite": "scaling", "peer": "reference", "model": model},
        name=_reference_name(model, size, density),
    )


def _job(
    options: Options,
    model: str,
    implementation: str,
    batch: int,
    size: int,
    density: float,
    axes: list[str],
) -> Job:
    arguments = _arguments(model, batch, size, density)
    config = shapes.model_config(model).image_encoder
    side = size // config.patch_size
    kept = None if density == 1 else Sparsity(density)
    work = encoder_work(config, kept, (side, side)).total

    def finish(record: Record) -> None:
        if not record["not_run"] and record["median_ms"] is not None:
            record["ms_per_image"] = record["median_ms"] / batch
            record["tflops"] = 2e-9 * batch * work / record["median_ms"]

    return Job(
        label=labels([f"{model} B{batch} {size} r{density}", implementation]),
        module="benchmarks.peers.encoder_jax",
        arguments=arguments
        | dict(
            implementation=implementation,
            dtype=options.dtype,
            runs=options.runs,
            warmups=options.warmups,
            profile=False,
        ),
        environment=machine.jax_environment(),
        known={
            "suite": "scaling",
            "peer": "sparsesam_jax",
            **arguments,
            "axes": axes,
            "density": density,
            "implementation": implementation,
            "dtype": options.dtype,
            "weights": shapes.WEIGHTS_DISTRIBUTION,
            "pixels": shapes.PIXELS_DISTRIBUTION,
            "median_ms": None,
        },
        reference=_reference_name(model, size, density),
        max_error=(MAX_ERROR if density == 1 else MAX_SPARSE_ERROR)[options.dtype],
        finish=finish,
    )
