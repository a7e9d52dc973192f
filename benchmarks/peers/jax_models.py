"""This project's encoder and predictor, by XLA or with the Mosaic GPU kernels."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import records
from benchmarks.cases import shapes
from benchmarks.peers import Predictor
from benchmarks.records import Record
from benchmarks.run.process import NotRunError
from benchmarks.run.timing import Runnable
from pallas_kernels.implementation import device_problem
from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.config import SamConfig
from sparsesam_jax.model.float8_scales import filled, set_bounds
from sparsesam_jax.model.sam import ImageEmbedding, scale_points


def encoder(
    implementation: str,
    model: str,
    batch: int,
    dtype: str,
    sparsity: Sparsity | None,
    *,
    image_size: int | None = None,
    own_tables: bool = False,
) -> Runnable:
    """One encoder, compiled and run once; its output is the features of all images.

    Its parameters are a flat list and the tables are made beforehand, as `SamPredictor` has them,
    unless `own_tables`. The notes have `trace_s`, `lower_s` (tracing included), `xla_s` (XLA's
    compiler alone) and `compile_s` (all of it).
    """
    options, config = model_options(implementation, dtype), shapes.model_config(model)
    abstract = Sam.abstract(config, sparsity=sparsity, **options).image_encoder
    graphdef, state = nnx.split(abstract)
    leaves, tree = jax.tree.flatten(state)

    def merge(leaves: list[jax.Array]) -> Any:
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))

    @jax.jit
    def make_tables(leaves: list[jax.Array]) -> Any:
        side = (image_size or config.image_encoder.image_size) // config.image_encoder.patch_size
        return merge(leaves).tables((side, side))

    @jax.jit
    def encode(leaves: list[jax.Array], tables: Any, pixels: jax.Array) -> jax.Array:
        return merge(leaves)(pixels, tables)

    # Compiled before there is anything on the device: what XLA tries out meanwhile takes memory
    # too, and is no part of a run's peak.
    tables = () if own_tables else jax.eval_shape(make_tables, leaves)
    images = shapes.random_pixels(config, batch, image_size=image_size)
    times = [time.perf_counter()]
    traced = encode.trace(leaves, tables, jax.ShapeDtypeStruct(images.shape, dtype))
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    leaves = jax.tree.leaves(random_state(abstract, config, dtype, "image_encoder")[1])
    tables = () if own_tables else make_tables(leaves)
    pixels = jnp.asarray(images, dtype)
    sizes = compiled.memory_analysis()
    assert sizes is not None
    notes = {
        "compile_s": times[3] - times[0],
        "trace_s": times[1] - times[0],
        "lower_s": times[2] - times[0],
        "xla_s": times[3] - times[2],
        "temp_mib": sizes.temp_size_in_bytes / 2**20,
        "argument_mib": sizes.argument_size_in_bytes / 2**20,
        "what": f"this project, its residual stream {jnp.dtype(abstract.dtypes.residual).name}",
    }
    if not on_gpu():  # where XLA sees all that is computed
        flops = (compiled.cost_analysis() or {}).get("flops")
        notes["gflop"] = None if flops is None else flops / 1e9
    return runnable(functools.partial(compiled, leaves, tables, pixels), notes=notes)


def runnable(
    launch: Callable[[], Any],
    *,
    notes: Record,
    output: np.ndarray | None = None,
    peak: Record | None = None,
    runs: int = 1,
) -> Runnable:
    """What a launch of JAX is to the suites; without them, output and peak are the launch's."""
    return Runnable(
        launch=launch,
        wait=jax.block_until_ready,
        output=np.asarray(launch(), np.float32) if output is None else output,
        notes={"device": device_name(), **notes},
        start_peak=lambda: None,  # JAX knows the peak of the whole process alone
        peak=lambda: peak or peak_memory(),
        runs=runs,
    )


def predictor(implementation: str, model: str, dtype: str, density: float = 1.0) -> Predictor:
    """`SamPredictor` as users call it, and its parts."""
    options, config = model_options(implementation, dtype), shapes.model_config(model)
    sparsity = None if density == 1 else Sparsity(density)
    abstract = Sam.abstract(config, sparsity=sparsity, **options)
    own = SamPredictor(nnx.merge(*random_state(abstract, config, dtype)))
    size, side = shapes.photo_size(config), own.image_size
    image = shapes.random_image(*size)
    transforms = own.transforms
    _, resized = transforms.resize_and_pad(image, side)
    graphdef, state = nnx.split(own.sam)

    @jax.jit
    def decode(state: nnx.State, features: jax.Array, points: jax.Array) -> jax.Array:
        labels = jnp.ones(points.shape[:-1], jnp.int32)
        return nnx.merge(graphdef, state).decode(ImageEmbedding(features, None), points, labels)[0]

    def set_image() -> None:
        own.set_image(image)
        jax.block_until_ready(own.get_image_embedding())

    def whole(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        set_image()
        return own.predict(points, np.ones(points.shape[:2], np.int32))

    def parts(points: np.ndarray) -> dict[str, Callable[[], Any]]:
        placed = scale_points(jnp.asarray(points), size, resized)[None]

        def decoder() -> jax.Array:
            return jax.block_until_ready(decode(state, own.get_image_embedding(), placed)[0])

        low_res, frame = decoder(), ((side, side), resized, size)
        return {
            "preprocess": lambda: jax.block_until_ready(transforms.resize_and_pad(image, side)[0]),
            "encoder": set_image,
            "decoder": decoder,
            "upscale": lambda: transforms.resize_masks(low_res, range(len(low_res)), *frame),
        }

    where = transforms.__name__.rpartition(".")[2]
    notes = {"device": device_name(), "what": f"preprocess and upscale are {where}"}
    return Predictor(whole, parts, notes, lambda: None, peak_memory)


def model_options(peer: str, dtype: str) -> dict[str, Any]:
    """What a peer of this project is as options of `Sam`.

    Raises:
        NotRunError: The kernels cannot run.
    """
    own = {"float8": ("mosaic_gpu", "float8"), "float8-xla": ("xla", "float8")}
    implementation, products = own.get(peer, (peer, "dtype"))
    needs_gpu(implementation)
    shared = {"dtype": dtype, "param_dtype": dtype}
    return shared | {"implementation": implementation, "products": products}


def needs_gpu(implementation: str) -> None:
    """Raise NotRunError where the kernels cannot run."""
    problem = device_problem() if implementation == "mosaic_gpu" else None
    if problem is not None:
        raise NotRunError(problem)


def random_state(
    module: nnx.Module, config: SamConfig, dtype: str, prefix: str = ""
) -> tuple[Any, nnx.State]:
    """An abstract module's graph, and a state of `shapes.random_weights`."""
    random = shapes.random_weights(config)
    lead = f"{prefix}." if prefix else ""
    model: Any = filled(module, lambda name, dtype: jnp.asarray(random[lead + name], dtype))
    set_bounds(getattr(model, "image_encoder", model).blocks)
    return nnx.split(model)


def on_gpu() -> bool:
    """Whether JAX's default device is a GPU."""
    return jax.devices()[0].platform == "gpu"


def device_name() -> str:
    """The GPU's name, or the processor's."""
    device = jax.devices()[0]
    return records.cpu_name() if device.platform == "cpu" else device.device_kind


def peak_memory() -> Record:
    """Peak of what this process has allocated; None where JAX does not know."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"peak_mib": None if peak is None else peak / 2**20}


def kernel_times(call: Callable[[], Any], runs: int = 3) -> dict[str, float]:
    """Milliseconds of a run in every GPU kernel, by the profiler, the longest first."""
    if not on_gpu():
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
