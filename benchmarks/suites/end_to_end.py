"""From an image to its masks, `set_image` and `predict` as users call them, and the parts.

A generated image and points on its diagonal. `preprocess` is the resize, `encoder` what remains of
`set_image`, transfer and normalisation included, `decoder` the jitted decoder, `upscale` takes the
masks to the image's size and to the host. Low-resolution logits are first compared with those of
the same model in float32. `end_to_end_torch` does the same with transformers' model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.cases import shapes
from benchmarks.records import Record
from benchmarks.run import machine
from benchmarks.run.pool import Job, RunOptions, labels
from benchmarks.run.process import Program
from benchmarks.run.timing import Spread, time_ms
from sparsesam_jax.config import Sparsity

IMAGE_SIDES = (75 / 64, 225 / 128)  # height and width of the image in sides of the model's input
PROMPTS = (1, 10)
OURS = ("mosaic_gpu", "xla")
PEERS = {
    "transformers": "SamModel of transformers with SDPA, nothing compiled",
    "transformers-compile": "the same with its encoder under torch.compile",
}
IMPLEMENTATIONS = (*OURS, *PEERS)
# Relative Frobenius error of the logits, after encoder and decoder; see `encoder.MAX_ERROR`.
MAX_ERROR = {"float32": 2e-2, "bfloat16": 0.15, "float16": 0.1}
MAX_SPARSE_ERROR = {"float32": 0.1, "bfloat16": 0.4, "float16": 0.3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """What to measure: every combination.

    Attributes:
        models: Names of `shapes.MODELS`.
        densities: 1 is dense. Peers run dense only.
        implementations: Of `IMPLEMENTATIONS`.
        dtype: Of the model.
    """

    models: Sequence[str] = ("vit_l",)
    densities: Sequence[float] = (1.0, 0.3)
    implementations: Sequence[str] = IMPLEMENTATIONS
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            shapes.model_config(name)
        for name in self.implementations:
            if name not in IMPLEMENTATIONS:
                expected = ", ".join(IMPLEMENTATIONS)
                raise ValueError(f"implementation must be one of {expected}; got {name!r}")
        for density in self.densities:
            if not 0 < density <= 1:
                raise ValueError(f"density must lie in (0, 1], got {density}")


QUICK = Options(
    models=(shapes.QUICK_MODEL,),
    densities=(1.0,),
    implementations=(*OURS, "transformers"),
    dtype="float32",
    runs=3,
    width=1,
)


def image_size(model: str) -> tuple[int, int]:
    """Height and width of the image; 1200 x 1800 for SAM's 1024."""
    side = shapes.model_config(model).image_encoder.image_size
    return int(IMAGE_SIDES[0] * side), int(IMAGE_SIDES[1] * side)


def jobs(options: Options) -> list[Job]:
    """All cases, each density's reference first."""
    found = []
    for model, density in itertools.product(options.models, options.densities):
        arguments = dict(model=model, runs=options.runs)
        name = labels([model, f"r{density}", "float32 xla"])
        found.append(
            Job(
                label=name,
                module="benchmarks.suites.end_to_end",
                arguments=arguments
                | dict(density=density, implementation="xla", dtype="float32", timed=False),
                environment=machine.reference_environment(),
                known={"suite": "end-to-end", "peer": "reference", "model": model},
                name=name,
            )
        )
        bounds = MAX_ERROR if density == 1 else MAX_SPARSE_ERROR
        for implementation in options.implementations:
            ours = implementation in OURS
            if density != 1 and not ours:
                continue
            found.append(
                Job(
                    label=labels([f"{model} r{density}", implementation, options.dtype]),
                    module="benchmarks.suites.end_to_end"
                    if ours
                    else "benchmarks.peers.end_to_end_torch",
                    arguments=arguments
                    | dict(implementation=implementation, dtype=options.dtype)
                    | (dict(density=density) if ours else {}),
                    environment=machine.jax_environment() if ours else machine.torch_environment(),
                    known={
                        "suite": "end-to-end",
                        "peer": "sparsesam_jax" if ours else "transformers",
                        "model": model,
                        "batch": 1,
                        "density": density,
                        "implementation": implementation,
                        "dtype": options.dtype,
                        "image": image_size(model),
                        "weights": shapes.WEIGHTS_DISTRIBUTION,
                        "median_ms": None,
                    },
                    reference=name,
                    max_error=bounds[options.dtype],
                )
            )
    return found


def build(
    model: str, density: float, runs: int, implementation: Any, dtype: str, timed: bool = True
) -> Program:
    """A predictor whose programs are compiled; its output is the logits of all prompts."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from benchmarks.peers.encoder_jax import device_name, needs_gpu, random_state
    from sparsesam_jax import Sam, SamPredictor
    from sparsesam_jax.model.sam import ImageEmbedding, scale_points

    needs_gpu(implementation)
    config = shapes.model_config(model)
    sparsity = None if density == 1 else Sparsity(density)
    options: Any = dict(dtype=dtype, param_dtype=dtype, implementation=implementation)
    abstract = Sam.abstract(config, sparsity=sparsity, **options)
    predictor = SamPredictor(nnx.merge(*random_state(abstract, config, dtype)))
    size, side = image_size(model), predictor.image_size
    image = shapes.random_image(*size)

    def set_image() -> None:
        predictor.set_image(image)
        jax.block_until_ready(predictor.get_image_embedding())

    def predict(count: int) -> np.ndarray:
        points = shapes.diagonal_points(count, *size)
        return predictor.predict(points, np.ones(points.shape[:2], np.int32))[2]

    set_image()
    logits = predict(max(PROMPTS))
    if not timed:
        return Program(logits, None, {})
    for count in PROMPTS:
        predict(count)
    transforms = predictor.transforms
    _, resized = transforms.resize_and_pad(image, side)
    graphdef, state = nnx.split(predictor.sam)

    @jax.jit
    def decode(state: nnx.State, features: jax.Array, points: jax.Array) -> jax.Array:
        labels = jnp.ones(points.shape[:-1], jnp.int32)
        return nnx.merge(graphdef, state).decode(ImageEmbedding(features, None), points, labels)[0]

    def resize() -> None:
        jax.block_until_ready(transforms.resize_and_pad(image, side)[0])

    def decoder(count: int) -> jax.Array:
        points = scale_points(jnp.asarray(shapes.diagonal_points(count, *size)), size, resized)
        out = decode(state, predictor.get_image_embedding(), points[None])
        return jax.block_until_ready(out[0])

    def upscale(low_res: jax.Array) -> None:
        transforms.resize_masks(low_res, len(low_res), (side, side), resized, size)

    def measure() -> Record:
        set_ms = [time_ms(set_image) for _ in range(runs)]
        resize_ms = [time_ms(resize) for _ in range(runs)]
        several = []
        for count in PROMPTS:
            predict(count)
            predict_ms = [time_ms(lambda count=count: predict(count)) for _ in range(runs)]
            low_res = decoder(count)
            upscale(low_res)
            decode_ms = [time_ms(lambda count=count: decoder(count)) for _ in range(runs)]
            up_ms = [time_ms(lambda low_res=low_res: upscale(low_res)) for _ in range(runs)]
            total = Spread.of([a + b for a, b in zip(set_ms, predict_ms, strict=True)])
            medians = [Spread.of(x).median_ms for x in (set_ms, resize_ms, decode_ms, up_ms)]
            set_image_ms, preprocess, decoding, upscaling = medians
            parts = {
                "preprocess": preprocess,
                "encoder": set_image_ms - preprocess,
                "decoder": decoding,
                "upscale": upscaling,
            }
            peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
            several.append(
                row(count, total, parts) | {"peak_mib": None if peak is None else peak / 2**20}
            )
        return {"several": several}

    where = transforms.__name__.rpartition(".")[2]
    notes = {"device": device_name(), "what": f"preprocess and upscale are {where}"}
    return Program(logits, measure, notes)


def row(prompts: int, total: Spread, parts: dict[str, float]) -> Record:
    """What a record says of one image with so many prompts; `parts` are medians in ms."""
    times = {**total._asdict(), "ms_per_image": total.median_ms}
    return {"prompts": prompts, **times, "parts_ms": parts}
