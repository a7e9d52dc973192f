"""Photos of all sizes: how many programs they compile, a warm photo's time, and `padding="crop"`.

Sizes are drawn between 100 and 4,000 pixels a side, each photo is embedded and gets masks from a
box. Before that, photos of a few sizes are resized on the device and on the host, and compared to
the bit. With crop, batches of one shape are encoded as the square and as the part of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import records
from benchmarks.cases import shapes
from benchmarks.peers.jax_models import device_name, random_state
from benchmarks.records import Record
from benchmarks.report import tables
from benchmarks.run.timing import median_ms
from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.model import transforms
from sparsesam_jax.predict import device_transforms
from sparsesam_jax.sparsity.work import encoder_work

KEYS = ("what", "shape", "density", "compilations", "tokens_share", "work_share", "p95_ms")
_COMPILED = "/jax/core/compile/backend_compile_duration"
_SIDES = (100, 4000)
_SHAPES = {
    "1:1": (1024, 1024),
    "4:3": (768, 1024),
    "3:2": (683, 1024),
    "16:9": (576, 1024),
}  # resized, at 1024


def run(
    model: str, count: int, dtype: str, densities: Sequence[float], batch: int, out: Path | None
) -> None:
    """Measure, write and print."""
    found = []
    with records.writer(out) as write:
        for record in _measure(model, count, dtype, densities, batch):
            write(record)
            found.append(record)
    tables.show("photos", found, KEYS)


def _measure(
    model: str, count: int, dtype: str, densities: Sequence[float], batch: int
) -> Iterator[Record]:
    common = {
        "suite": "photos",
        "model": model,
        "dtype": dtype,
        "device": device_name(),
        "versions": records.versions(),
        "commit": records.commit(),
        "not_run": None,
    }
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 3 * _SIDES[1] ** 2, np.uint8)

    def photo(height: int, width: int) -> np.ndarray:
        return noise[: 3 * height * width].reshape(height, width, 3)

    for size in ((100, 4000), (777, 1234), (3000, 2000)):
        wanted = transforms.resize_and_pad(photo(*size), 1024)[0]
        got = np.asarray(device_transforms.resize_and_pad(photo(*size), 1024)[0])
        if not np.array_equal(got, wanted):
            raise ValueError(f"the device's pixels must be the host's, but differ at {size}")
    config = shapes.model_config(model)
    abstract = Sam.abstract(config, dtype=dtype, param_dtype=dtype)
    sam = nnx.merge(*random_state(abstract, config, dtype))
    compiled = _counter()
    predictor = SamPredictor(sam, transforms="device")
    times, box = [], np.array([10.0, 10.0, 90.0, 90.0])
    sizes = rng.integers(_SIDES[0], _SIDES[1] + 1, (count, 2))
    start = compiled()
    for height, width in sizes:
        image = photo(int(height), int(width))
        before, began = compiled(), time.perf_counter()
        predictor.set_image(image)
        jax.block_until_ready(predictor.get_image_embedding())
        elapsed = 1e3 * (time.perf_counter() - began)
        predictor.predict(box=box)
        if compiled() == before:
            times.append(elapsed)
    yield common | {
        "what": "set_image of warm photos",
        "shape": f"{count} sizes",
        "density": 1.0,
        "compilations": compiled() - start,
        "median_ms": statistics.median(times),
        "p95_ms": round(float(np.percentile(times, 95)), 3),
        "photos": len(times),
        "tokens_share": 1.0,
        "work_share": 1.0,
    }
    for density in densities if batch else ():
        sparse = sam if density == 1 else sam.with_sparsity(Sparsity(density))
        yield from (common | record for record in _crops(sparse, density, batch))


def _crops(sam: Sam, density: float, batch: int) -> Iterator[Record]:
    run, encoder = sam.compiled(), sam.config.image_encoder
    side, patch = encoder.image_size, encoder.patch_size

    def work(grid: Any) -> int:
        return encoder_work(encoder, sam.image_encoder.sparsity, grid).total

    padded = jax.device_put([np.full((side, side, 3), 7 * i, np.uint8) for i in range(batch)])
    for name, resized in _SHAPES.items():
        size = (resized[0] * side // 1024, resized[1] * side // 1024)
        crop = transforms.crop_shape(size, side, patch)
        sizes = np.array([size] * batch, np.int32)

        def launch(crop: Any = crop, sizes: np.ndarray = sizes) -> Any:
            return run.encode_padded(padded, sizes, None if crop == (side, side) else crop)

        if not np.isfinite(np.asarray(launch().features, np.float32)).all():
            raise ValueError(f"features must be finite, got others for {name}")
        median = median_ms(lambda launch=launch: jax.block_until_ready(launch()), 20)
        grid = (crop[0] // patch, crop[1] // patch)
        yield {
            "what": f"encode, batch {batch}",
            "shape": f"{name}, grid {grid[0]} x {grid[1]}",
            "density": density,
            "compilations": 1,
            "p95_ms": None,
            "median_ms": median / batch,
            "tokens_share": grid[0] * grid[1] / encoder.grid_size**2,
            "work_share": round(work(grid) / work(None), 3),
        }


def _counter() -> Callable[[], int]:
    """How many programs have been compiled by now."""
    seen = [0]

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        seen[0] += event == _COMPILED

    jax.monitoring.register_event_duration_secs_listener(listener)
    return lambda: seen[0]
