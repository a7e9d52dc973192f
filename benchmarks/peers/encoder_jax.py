"""This project's encoder as the encoder suite runs it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import records
from benchmarks.cases import shapes
from benchmarks.records import Record
from benchmarks.run.process import NotRunError, Program
from benchmarks.run.timing import Spread, queued_ms, time_ms
from pallas_kernels.implementation import Implementation, device_problem
from sparsesam_jax import Sam, Sparsity
from sparsesam_jax.config import SamConfig

REPEATS = 20  # runs that must agree to the bit


def build(
    model: str,
    batch: int,
    implementation: Implementation,
    dtype: str,
    sparsity: dict[str, Any] | None,
    runs: int,
    warmups: int,
    timed: bool = True,
    image_size: int | None = None,
    profile: bool = True,
) -> Program:
    """One encoder, compiled and run once; its output is the first image's features."""
    needs_gpu(implementation)
    config = shapes.model_config(model)
    kept = None if sparsity is None else Sparsity(**sparsity)
    options = {"dtype": dtype, "param_dtype": dtype, "implementation": implementation}
    encoder = Sam.abstract(config, sparsity=kept, **options).image_encoder
    graphdef, state = nnx.split(encoder)
    # What is timed gets its parameters as a flat list and the tables made beforehand, as
    # `SamPredictor` has them; references make their own.
    leaves, tree = jax.tree.flatten(state)

    @jax.jit
    def make_tables(leaves: list[jax.Array]) -> Any:
        side = (image_size or config.image_encoder.image_size) // config.image_encoder.patch_size
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves)).tables((side, side))

    @jax.jit
    def encode(leaves: list[jax.Array], tables: Any, pixels: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(pixels, tables)

    # Compiled before there is anything on the device: what XLA tries out meanwhile takes memory
    # too, and is no part of a run's peak.
    tables = jax.eval_shape(make_tables, leaves) if timed else ()
    images = shapes.random_pixels(config, batch, image_size=image_size)
    pixels = jax.ShapeDtypeStruct(images.shape, dtype)
    start = time.perf_counter()
    lowered = encode.lower(leaves, tables, pixels)
    lower_s = time.perf_counter() - start
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start
    leaves = jax.tree.leaves(random_state(encoder, config, dtype, "image_encoder")[1])
    tables = make_tables(leaves) if timed else ()
    pixels = jnp.asarray(images, dtype)
    out = np.asarray(compiled(leaves, tables, pixels))
    sizes = compiled.memory_analysis()
    assert sizes is not None
    notes = {
        "compile_s": compile_s,
        "lower_s": lower_s,
        "temp_mib": sizes.temp_size_in_bytes / 2**20,
        "argument_mib": sizes.argument_size_in_bytes / 2**20,
        "device": device_name(),
        "what": f"this project, its residual stream {jnp.dtype(encoder.dtypes.residual).name}",
    }

    def launch() -> jax.Array:
        return compiled(leaves, tables, pixels)

    def call() -> jax.Array:
        return jax.block_until_ready(launch())

    def measure() -> Record:
        for _ in range(warmups):
            call()
        spread = Spread.of([time_ms(call) for _ in range(runs)])
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        repeats = REPEATS if jax.devices()[0].platform == "gpu" else 2
        return dict(spread._asdict()) | {
            "queued_ms": queued_ms(launch, jax.block_until_ready, runs),
            "peak_mib": None if peak is None else peak / 2**20,
            "repeats_equal": all(np.array_equal(call(), out) for _ in range(repeats)),
            **({"parts_ms": kernel_times(call)} if profile else {}),
        }

    return Program(out[0].astype(np.float32), measure if timed else None, notes)


def needs_gpu(implementation: str) -> None:
    """Raise NotRunError where the kernels cannot run."""
    problem = device_problem() if implementation == "mosaic_gpu" else None
    if problem is not None:
        raise NotRunError(problem)


def random_state(
    module: nnx.Module, config: SamConfig, dtype: str, prefix: str = ""
) -> tuple[Any, nnx.State]:
    """An abstract module's graph, and a state of `shapes.random_weights`."""
    graphdef, state = nnx.split(module)
    random = shapes.random_weights(config)
    lead = [prefix] if prefix else []
    leaves = [
        (key, leaf.replace(jnp.asarray(random[".".join([*lead, *map(str, key)])], dtype)))
        for key, leaf in nnx.to_flat_state(state)
    ]
    return graphdef, nnx.from_flat_state(leaves)


def device_name() -> str:
    """The GPU's name, or the processor's."""
    device = jax.devices()[0]
    return records.cpu_name() if device.platform == "cpu" else device.device_kind


def kernel_times(call: Any, runs: int = 3) -> dict[str, float]:
    """Milliseconds of a run in every GPU kernel, by the profiler, the longest first."""
    if jax.devices()[0].platform != "gpu":
        return {}
    total: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                call()
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    for event in line.events if line.name.startswith("Stream") else ():
                        ms = event.duration_ns / 1e6 / runs
                        total[event.name] = total.get(event.name, 0) + ms
    return dict(sorted(total.items(), key=lambda item: -item[1]))
