"""The ceilings, by XLA.

Products are XLA's at the model's shapes; attention has no position bias, and is cuDNN's on a GPU
and XLA's elsewhere; a copy counts bytes read and written. A program holds several of a kind, each
on arrays of its own, and programs are launched one behind the other. Data are random normal, and
results are compared with float32 first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import shapes
from benchmarks.peers.jax_models import device_name, on_gpu, runnable
from benchmarks.records import Record
from benchmarks.run.pool import relative_error
from benchmarks.run.process import Program
from sparsesam_jax.config import ImageEncoderConfig

MAX_ERROR = 2e-2  # bfloat16 inputs and output, float32 sums
SAMPLE = 64  # rows that are compared
COPIES = 4  # of a task in its program
Pair = tuple[jax.Array, jax.Array]


class _Task(NamedTuple):
    """What one program runs: `step` of each of `arrays`; `sample` has of one both to compare."""

    name: str
    step: Callable[[Any], jax.Array]
    arrays: Any
    flops: float
    bytes: float
    shape: tuple[int, ...]
    sample: Callable[[jax.Array, Any], Pair]


def build(model: str, batch: int, dtype: str, runs: int, loops: int) -> Program:
    """Compile all tasks of a model at a batch; compare each with float32."""
    programs = [
        _checked(task) for task in _tasks(shapes.model_config(model).image_encoder, batch, dtype)
    ]

    def measure() -> Record:
        several = []
        for task, program, error in programs:
            launch = functools.partial(program, task.arrays)
            own = runnable(launch, notes={}, output=np.zeros(0), peak={"peak_mib": None})
            times = own._replace(runs=COPIES).measure_queued(runs, loops * COPIES)
            several.append(
                {
                    "implementation": task.name,
                    "shape": task.shape,
                    "copies": COPIES,
                    "loops": loops,
                    "max_error": error,
                    "ms_per_image": times["median_ms"] / batch,
                    **times,
                    "tflops": task.flops / times["median_ms"] / 1e9 or None,
                    "tbs": task.bytes / times["median_ms"] / 1e9 or None,
                }
            )
        return {"several": several}

    return Program(None, measure, {"device": device_name()})


def _checked(task: _Task) -> tuple[_Task, Any, float]:
    """A task, its program, and the error of its first result."""

    @jax.jit
    def run(several: Any) -> list[jax.Array]:
        return [task.step(arrays) for arrays in several]

    program = run.lower(task.arrays).compile()
    with jax.default_matmul_precision("highest"):
        got, want = task.sample(program(task.arrays)[0], task.arrays[0])
    error = relative_error(np.asarray(got, np.float32), np.asarray(want))
    if not error <= MAX_ERROR:
        raise ValueError(f"wrong: {task.name} has error {error:.2e}, at most {MAX_ERROR}")
    return task, program, error


def _tasks(config: ImageEncoderConfig, batch: int, dtype: str) -> Iterator[_Task]:
    tokens, d, hidden = config.grid_size**2, config.embed_dim, config.mlp_dim
    rows = batch * tokens
    keys = iter(jax.random.split(jax.random.key(0), 16 * COPIES))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    products = {"qkv": (d, 3 * d), "proj": (d, d), "lin1": (d, hidden), "lin2": (hidden, d)}
    for name, (inner, columns) in products.items():
        arrays = [(normal(rows, inner), normal(inner, columns)) for _ in range(COPIES)]
        shape, flops = (rows, inner, columns), 2.0 * rows * inner * columns
        yield _Task(name, lambda x: x[0] @ x[1], arrays, flops, 0, shape, _sample_product)
    heads, head_dim = config.num_heads, config.head_dim
    shape = (batch, tokens, heads, head_dim)
    arrays = [tuple(normal(*shape) for _ in range(3)) for _ in range(COPIES)]
    flops = 4.0 * batch * heads * tokens * tokens * head_dim
    fused = "cudnn" if on_gpu() else "xla"

    def attend(arrays: Any) -> jax.Array:
        return jax.nn.dot_product_attention(*arrays, implementation=fused)

    yield _Task(f"attention {fused}", attend, arrays, flops, 0, shape, _sample_attention)
    copied = [normal(4 * rows, d) for _ in range(COPIES)]
    # A sum keeps a copy from being left out, and reads and writes as much.
    shape, size = copied[0].shape, 2.0 * copied[0].nbytes
    yield _Task("copy", lambda x: x + 1, copied, 0, size, shape, lambda out, x: (out, x + 1))


def _sample_product(out: jax.Array, arrays: Any) -> Pair:
    return out[:SAMPLE], arrays[0][:SAMPLE].astype(jnp.float32) @ arrays[1].astype(jnp.float32)


def _sample_attention(out: jax.Array, arrays: Any) -> Pair:
    q, k, v = (x[-1:, :, :1].astype(jnp.float32) for x in arrays)
    want = jax.nn.dot_product_attention(q[:, :SAMPLE], k, v, implementation="xla")
    return out[-1:, :SAMPLE, :1], want
