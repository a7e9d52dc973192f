"""How many programs photos of all sizes compile, and what cropping their padding saves.

Sizes are drawn between 100 and 4,000 pixels a side, each photo is embedded and gets masks from a
box. Before that, photos of a few sizes are resized on the device and on the host, and compared to
the bit. With crop, batches of one shape are encoded as the square and as the part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from typer import Option

from benchmarks.cases import shapes
from benchmarks.records import Record
from benchmarks.run.jobs import Job, Program
from benchmarks.run.options import Dtype, SuiteOptions
from benchmarks.run.timing import Spread, time_ms
from sparsesam_jax.config import Sparsity

KEYS = ("what", "shape", "density", "compilations", "tokens_share", "work_share", "p95_ms")
_COMPILED = "/jax/core/compile/backend_compile_duration"
_SIDES = (100, 4000)
# Resized, at 1024.
_SHAPES = {"1:1": (1024, 1024), "4:3": (768, 1024), "3:2": (683, 1024), "16:9": (576, 1024)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure."""

    quick_fields: ClassVar = {"count": 3, "crops": 1, "densities": (0.4,)}

    model: Annotated[str, Option(help="vit_t, vit_b, vit_l or vit_h.")] = "vit_l"
    count: Annotated[int, Option(help="Photos, each of its own size.")] = 1000
    dtype: Dtype = "bfloat16"
    densities: Annotated[Sequence[float], Option("--density", help="Of the crops.")] = (1.0, 0.4)
    crops: Annotated[
        int, Option("--batch", help="Images of a crop's batch; 0 leaves crops out.")
    ] = 8


def jobs(options: Options) -> list[Job]:
    """All sizes, and the crops of every density."""
    fields = {"model": options.model, "dtype": options.dtype, "implementation": "auto"}
    own: dict[str, Any] = dict(suite="photos", options=options, implementation="mosaic_gpu")
    densities = options.densities if options.crops else ()
    what = [f"{options.count} sizes", *(f"crops r{density}" for density in densities)]
    found = []
    for label, density in zip(what, [None, *densities], strict=True):
        own["fields"] = fields | {"density": density or 1.0}
        found.append(PhotosJob(what=label, crops=density is not None, seconds=600, **own))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotosJob(Job):
    """Photos of all sizes, or batches of one shape."""

    crops: bool

    @property
    def label(self) -> str:
        """The photos; what runs is chosen by what there is."""
        return f"{self.options.model} {self.what}"

    def build(self) -> Program:
        """The model, whose kernels are chosen by what there is."""
        from flax import nnx

        from benchmarks.peers.jax_models import JAX, random_state
        from sparsesam_jax import Sam

        config, density = shapes.model_config(self.options.model), self.fields["density"]
        dtype, sparsity = self.options.dtype, None if density == 1 else Sparsity(density)
        abstract = Sam.abstract(config, sparsity=sparsity, dtype=dtype, param_dtype=dtype)
        sam = nnx.merge(*random_state(abstract, config, dtype))
        measure = _crops if self.crops else _photos
        number = self.options.crops if self.crops else self.options.count

        def several() -> Record:
            return {"several": list(measure(sam, number, self.options.runs))}

        return Program(None, several, {"device": JAX.name})


def _photos(sam: Any, count: int, _: int) -> Iterator[Record]:
    import jax

    from sparsesam_jax import SamPredictor
    from sparsesam_jax.model import transforms
    from sparsesam_jax.predict import device_transforms

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 3 * _SIDES[1] ** 2, np.uint8)

    def photo(height: int, width: int) -> np.ndarray:
        return noise[: 3 * height * width].reshape(height, width, 3)

    for size in ((100, 4000), (777, 1234), (3000, 2000)):
        wanted = transforms.resize_and_pad(photo(*size), 1024)[0]
        got = np.asarray(device_transforms.resize_and_pad(photo(*size), 1024)[0])
        if not np.array_equal(got, wanted):
            raise ValueError(f"the device's pixels must be the host's, but differ at {size}")
    predictor, compiled = SamPredictor(sam, transforms="device"), _counter()
    times, box, start = [], np.array([10.0, 10.0, 90.0, 90.0]), compiled()
    for height, width in rng.integers(_SIDES[0], _SIDES[1] + 1, (count, 2)):
        image, before = photo(int(height), int(width)), compiled()

        def embed(image: np.ndarray = image) -> None:
            predictor.set_image(image)
            jax.block_until_ready(predictor.get_image_embedding())

        elapsed = time_ms(embed)
        predictor.predict(box=box)
        if compiled() == before:
            times.append(elapsed)
    yield Spread.of(times)._asdict() | {
        "what": "set_image of warm photos",
        "shape": f"{count} sizes",
        "compilations": compiled() - start,
        "p95_ms": round(float(np.percentile(times, 95)), 3),
        "photos": len(times),
        "tokens_share": 1.0,
        "work_share": 1.0,
    }


def _crops(sam: Any, batch: int, runs: int) -> Iterator[Record]:
    import jax

    from sparsesam_jax.model import transforms
    from sparsesam_jax.sparsity.work import encoder_work

    run, encoder, sparsity = sam.compiled(), sam.config.image_encoder, sam.image_encoder.sparsity
    side, patch = encoder.image_size, encoder.patch_size
    whole = encoder_work(encoder, sparsity).total
    padded = jax.device_put([np.full((side, side, 3), 7 * i, np.uint8) for i in range(batch)])
    for name, resized in _SHAPES.items():
        size = (resized[0] * side // 1024, resized[1] * side // 1024)
        crop = transforms.crop_shape(size, side, patch)
        sizes = np.array([size] * batch, np.int32)

        def launch(crop: Any = crop, sizes: np.ndarray = sizes) -> Any:
            part = None if crop == (side, side) else crop
            return jax.block_until_ready(run.encode_padded(padded, sizes, part))

        if not np.isfinite(np.asarray(launch().features, np.float32)).all():
            raise ValueError(f"features must be finite, got others for {name}")
        grid = (crop[0] // patch, crop[1] // patch)
        yield Spread.of([time_ms(launch) / batch for _ in range(runs)])._asdict() | {
            "what": f"encode, batch {batch}",
            "shape": f"{name}, grid {grid[0]} x {grid[1]}",
            "compilations": 1,
            "p95_ms": None,
            "tokens_share": grid[0] * grid[1] / encoder.grid_size**2,
            "work_share": round(encoder_work(encoder, sparsity, grid).total / whole, 3),
        }


def _counter() -> Callable[[], int]:
    """How many programs have been compiled by now."""
    import jax

    seen = [0]

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        seen[0] += event == _COMPILED

    jax.monitoring.register_event_duration_secs_listener(listener)
    return lambda: seen[0]
