"""Time and memory of our encoder against batch, image size and density, one at a time.

The other two stay at `batch`, the model's own image size and each of `densities`. Exponents are
fitted over all points and printed beside those of the counted work (`report.data.fits`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar

from typer import Option

from benchmarks import peers
from benchmarks.cases import shapes
from benchmarks.cases.encoder_cases import EncoderCase
from benchmarks.records import Record
from benchmarks.run import options as common
from benchmarks.run.jobs import Job
from benchmarks.suites import encoder
from sparsesam_jax.config import Sparsity

AXES = ("batch", "image_size", "density")
KEYS = ("model", "batch", "image_size", "density", "implementation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(common.SuiteOptions):
    """What to measure: `batches`, `image_sizes` and `density_points` along their own axis."""

    quick_fields: ClassVar = {
        "implementations": ("xla",),
        "axes": ("batch", "image_size"),
        "batches": (1, 2),
        "image_sizes": (128, 256),
        "batch": 1,
    }
    choices: ClassVar = {"implementations": peers.OURS, "axes": AXES}

    models: common.Models = ("vit_l",)
    implementations: common.Implementations = ("mosaic_gpu",)
    axes: Annotated[
        Sequence[str], Option("--axis", help="batch, image_size or density. Without it: all.")
    ] = AXES
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    image_sizes: Sequence[int] = (512, 768, 1024, 1536, 2048)
    density_points: Sequence[float] = (1.0, 0.7, 0.5, 0.4, 0.3, 0.25)
    batch: int = 8
    densities: common.Densities = (1.0,)
    dtype: common.Dtype = "bfloat16"
    warmups: common.Warmups = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            patch = shapes.model_config(name).image_encoder.patch_size
            for size in self.image_sizes:
                if size < 1 or size % patch:
                    raise ValueError(f"image_size must be a multiple of {patch}, got {size}")


def jobs(options: Options) -> list[Job]:
    """All cases, once each even where axes meet; what each is compared with first."""
    found: list[Job] = []
    for model in options.models:
        points = _points(options, model)
        for case in dict.fromkeys(case.reference for case in points):
            found.append(encoder.job("scaling", case, None, options))
        for name in options.implementations:
            for case, axes in points.items():
                found.append(encoder.job("scaling", case, name, options, axes=axes))
    return found


def _points(options: Options, model: str) -> dict[EncoderCase, list[str]]:
    """The cases, each with the axes that it lies on."""
    own = shapes.model_config(model).image_encoder.image_size
    points: dict[EncoderCase, list[str]] = {}
    for axis in options.axes:
        along = {"batch": options.batches, "image_size": options.image_sizes}.get(axis, [0])
        for density in options.density_points if axis == "density" else options.densities:
            for value in along:
                case = EncoderCase(
                    model=model,
                    batch=value if axis == "batch" else options.batch,
                    sparsity=None if density == 1 else Sparsity(density),
                    dtype=options.dtype,
                    image_size=value if axis == "image_size" else own,
                )
                points.setdefault(case, []).append(axis)
    return points


def show(results: list[Record], options: Options) -> None:
    """Print the fitted exponents."""
    from benchmarks.report import data, tables

    title = "Growth: exponents of power laws"
    tables.print_table(title, data.COLUMNS, data.fits(results))
