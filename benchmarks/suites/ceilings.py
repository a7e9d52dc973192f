"""What the device reaches in what the encoder is made of: products, plain attention, a copy.

Products are XLA's at the model's shapes; attention has no position bias, and is cuDNN's on a GPU
and XLA's elsewhere; a copy counts bytes read and written. A program holds several of a kind, each
on arrays of its own, and programs are launched one behind the other. Data are random normal, and
results are compared with float32 first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import shapes
from benchmarks.peers.encoder_jax import device_name
from benchmarks.records import Record
from benchmarks.run import machine
from benchmarks.run.pool import Job, RunOptions, labels
from benchmarks.run.process import Program
from benchmarks.run.timing import Spread, queued_ms
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.sparsity.work import encoder_work

MAX_ERROR = 2e-2  # bfloat16 inputs and output, float32 sums
SAMPLE = 64  # rows that are compared
COPIES = 4  # of a task in its program
Ceiling = dict[str, float]  # TFLOP/s of `products` and `attention`, TB/s of `copy`; `copies`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """What to measure.

    Attributes:
        models: Names of `shapes.MODELS`.
        batches: Images whose tokens are the rows of the products.
        dtype: Of inputs and outputs.
        loops: Launches of a program that are timed together.
    """

    models: Sequence[str] = ("vit_b", "vit_l", "vit_h")
    batches: Sequence[int] = (8, 1)
    dtype: str = "bfloat16"
    loops: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            shapes.model_config(name)
        for value in (*self.batches, self.loops):
            if value < 1:
                raise ValueError(f"batch and loops must be positive, got {value}")


QUICK = Options(
    models=(shapes.QUICK_MODEL,), batches=(1,), dtype="float32", runs=3, loops=1, width=1
)


class _Task(NamedTuple):
    name: str
    step: Callable[[Any], jax.Array]
    arrays: Any
    flops: float
    bytes: float
    shape: tuple[int, ...]
    error: Callable[[jax.Array], float]


def job(model: str, batch: int, *, dtype: str, runs: int, loops: int) -> Job:
    """The case of one model and batch."""
    arguments = dict(model=model, batch=batch, dtype=dtype, runs=runs, loops=loops)
    return Job(
        label=labels(["ceilings", model, f"B{batch}", dtype]),
        module="benchmarks.suites.ceilings",
        arguments=arguments,
        environment=machine.jax_environment(),
        known={
            "suite": "ceilings",
            "peer": "xla",
            "model": model,
            "batch": batch,
            "density": 1.0,
            "dtype": dtype,
            "input": "standard normal",
            "peak_mib": None,
        },
    )


def jobs(options: Options) -> list[Job]:
    """One case a model and batch."""
    sizes: Any = dict(dtype=options.dtype, runs=options.runs, loops=options.loops)
    return [job(*key, **sizes) for key in itertools.product(options.models, options.batches)]


def build(model: str, batch: int, dtype: str, runs: int, loops: int) -> Program:
    """Compile all tasks of a model at a batch; compare each with float32."""
    config = shapes.model_config(model).image_encoder
    tasks = list(_tasks(config, batch, jnp.dtype(dtype)))
    programs = [jax.jit(_all(task.step)).lower(task.arrays).compile() for task in tasks]
    errors = [
        task.error(program(task.arrays)[0]) for task, program in zip(tasks, programs, strict=True)
    ]
    for task, error in zip(tasks, errors, strict=True):
        if not error <= MAX_ERROR:
            raise ValueError(f"wrong: {task.name} has error {error:.2e}, at most {MAX_ERROR}")

    def measure() -> Record:
        several = []
        for task, program, error in zip(tasks, programs, errors, strict=True):

            def call(task: _Task = task, program: Any = program) -> float:
                launch = functools.partial(program, task.arrays)
                return queued_ms(launch, jax.block_until_ready, loops) / COPIES

            for _ in range(2):
                call()
            spread = Spread.of([call() for _ in range(runs)])
            rates = {"tflops": task.flops / spread.median_ms / 1e9 or None}
            rates["tbs"] = task.bytes / spread.median_ms / 1e9 or None
            several.append(
                {
                    "implementation": task.name,
                    "shape": task.shape,
                    "copies": COPIES,
                    "loops": loops,
                    "max_error": error,
                    "ms_per_image": spread.median_ms / batch,
                    **spread._asdict(),
                    **rates,
                }
            )
        return {"several": several}

    return Program(None, measure, {"device": device_name()})


def _tasks(config: ImageEncoderConfig, batch: int, dtype: jnp.dtype) -> Iterable[_Task]:
    tokens, d, hidden = config.grid_size**2, config.embed_dim, config.mlp_dim
    rows = batch * tokens
    keys = iter(jax.random.split(jax.random.key(0), 16 * COPIES))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    products = {"qkv": (d, 3 * d), "proj": (d, d), "lin1": (d, hidden), "lin2": (hidden, d)}
    for name, (inner, columns) in products.items():
        arrays = [(normal(rows, inner), normal(inner, columns)) for _ in range(COPIES)]
        shape, flops = (rows, inner, columns), 2.0 * rows * inner * columns
        yield _Task(name, _product, arrays, flops, 0, shape, _product_error(arrays[0]))
    heads, head_dim = config.num_heads, config.head_dim
    shape = (batch, tokens, heads, head_dim)
    arrays = [tuple(normal(*shape) for _ in range(3)) for _ in range(COPIES)]
    flops = 4.0 * batch * heads * tokens * tokens * head_dim
    fused = "cudnn" if jax.devices()[0].platform == "gpu" else "xla"

    def attend(arrays: Any) -> jax.Array:
        return jax.nn.dot_product_attention(*arrays, implementation=fused)

    name = f"attention {fused}"
    yield _Task(name, attend, arrays, flops, 0, shape, _attention_error(arrays[0]))
    copied = [normal(4 * rows, d) for _ in range(COPIES)]
    # A sum keeps a copy from being left out, and reads and writes as much.
    shape, size = copied[0].shape, 2.0 * copied[0].nbytes
    yield _Task("copy", lambda x: x + 1, copied, 0, size, shape, lambda out: 0.0)


def _all(step: Callable[[Any], jax.Array]) -> Callable[[Any], list[jax.Array]]:
    return lambda several: [step(arrays) for arrays in several]


def _product(arrays: Any) -> jax.Array:
    return arrays[0] @ arrays[1]


def _product_error(arrays: Any) -> Callable[[jax.Array], float]:
    def error(out: jax.Array) -> float:
        a, b = arrays[0][:SAMPLE].astype(jnp.float32), arrays[1].astype(jnp.float32)
        return _error(out[:SAMPLE], jnp.matmul(a, b, precision="highest"))

    return error


def _attention_error(arrays: Any) -> Callable[[jax.Array], float]:
    def error(out: jax.Array) -> float:
        q, k, v = (x[-1:, :, :1].astype(jnp.float32) for x in arrays)
        with jax.default_matmul_precision("highest"):
            want = jax.nn.dot_product_attention(q[:, :SAMPLE], k, v, implementation="xla")
        return _error(out[-1:, :SAMPLE, :1], want)

    return error


def _error(got: jax.Array, want: jax.Array) -> float:
    difference = np.asarray(got, np.float32) - np.asarray(want)
    return float(np.linalg.norm(difference) / np.linalg.norm(want))


def summary(results: Iterable[Record]) -> Ceiling:
    """Rates of one model and batch: all products together, attention, copy; and how many copies."""
    attention = copy = flops = ms = copies = 0.0
    for r in results:
        copies = r["copies"]
        if r["implementation"] == "copy":
            copy = r["tbs"]
        elif r["implementation"].startswith("attention"):
            attention = r["tflops"]
        else:
            flops += r["tflops"] * r["median_ms"]
            ms += r["median_ms"]
    products = flops / ms if ms else 0.0
    return {"products": products, "attention": attention, "copy": copy, "copies": copies}


def floor_ms(
    config: ImageEncoderConfig,
    sparsity: Sparsity | None,
    batch: int,
    ceiling: Ceiling,
    grid: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Milliseconds of an encoder's parts at the ceilings' rates."""
    work = encoder_work(config, sparsity, grid)
    attention = sum(block.attention for block in work.blocks)
    scale = 2e-9 * batch
    return {
        "products": (work.total - attention) * scale / ceiling["products"],
        "attention": attention * scale / ceiling["attention"],
    }
