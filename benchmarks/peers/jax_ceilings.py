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
from benchmarks.peers.jax_models import JAX, on_gpu
from benchmarks.records import Record
from benchmarks.run.jobs import Program, relative_error
from benchmarks.run.timing import Runnable
from sparsesam_jax.config import ImageEncoderConfig

MAX_ERROR = 2e-2  # bfloat16 inputs and output, float32 sums
SAMPLE = 64  # rows that are compared
COPIES = 4  # of a task in its program


class _Task(NamedTuple):
    """What one program runs: `step` of each of several tuples of arrays of these `operands`.

    `sample` takes of one result and its arrays those from which `step` makes the same in float32.
    """

    name: str
    step: Callable[..., jax.Array]
    operands: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    flops: float
    bytes: float
    sample: Callable[..., tuple[Any, ...]]


def build(model: str, batch: int, dtype: str, runs: int, loops: int) -> Program:
    """Compile all tasks of a model at a batch; compare each with float32."""
    tasks = _tasks(shapes.model_config(model).image_encoder, batch, jnp.dtype(dtype))
    programs = [(task, *_checked(task, dtype)) for task in tasks]

    def measure() -> Record:
        several = []
        for task, program, error in programs:
            own = Runnable(JAX, program, np.zeros(0), {}, COPIES, {"peak_mib": None})
            times = own.measure_queued(runs, loops * COPIES)
            ms = times["median_ms"]
            names = {"implementation": task.name, "shape": task.shape, "copies": COPIES}
            rates = {"tflops": task.flops / ms / 1e9 or None, "tbs": task.bytes / ms / 1e9 or None}
            errors = {"loops": loops, "max_error": error, "ms_per_image": ms / batch}
            several.append(names | errors | times | rates)
        return {"several": several}

    return Program(None, measure, {"device": JAX.name})


def _checked(task: _Task, dtype: str) -> tuple[Callable[[], Any], float]:
    """A task's program on arrays of its own, and the error of its first result."""
    keys = iter(jax.random.split(jax.random.key(0), 3 * COPIES))
    arrays = [
        tuple(jax.random.normal(next(keys), shape, dtype) for shape in task.operands)
        for _ in range(COPIES)
    ]
    run = jax.jit(lambda several: [task.step(*own) for own in several])
    program = functools.partial(run.lower(arrays).compile(), arrays)
    got, *given = (x.astype(jnp.float32) for x in task.sample(program()[0], *arrays[0]))
    with jax.default_matmul_precision("highest"):
        error = relative_error(np.asarray(got), np.asarray(task.step(*given)))
    if not error <= MAX_ERROR:
        raise ValueError(f"wrong: {task.name} has error {error:.2e}, at most {MAX_ERROR}")
    return program, error


def _tasks(config: ImageEncoderConfig, batch: int, dtype: jnp.dtype) -> Iterator[_Task]:
    tokens, d, hidden = config.grid_size**2, config.embed_dim, config.mlp_dim
    rows = batch * tokens
    products = {"qkv": (d, 3 * d), "proj": (d, d), "lin1": (d, hidden), "lin2": (hidden, d)}
    for name, (inner, columns) in products.items():
        shape, flops = (rows, inner, columns), 2.0 * rows * inner * columns
        operands = (rows, inner), (inner, columns)
        yield _Task(name, jnp.matmul, operands, shape, flops, 0, _first_rows)
    heads, head_dim = config.num_heads, config.head_dim
    shape = (batch, tokens, heads, head_dim)
    flops = 4.0 * batch * heads * tokens * tokens * head_dim
    fused = "cudnn" if on_gpu() else "xla"

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        own = "xla" if q.dtype == jnp.float32 else fused  # cuDNN has 16-bit floats alone
        return jax.nn.dot_product_attention(q, k, v, implementation=own)

    yield _Task(f"attention {fused}", attend, (shape,) * 3, shape, flops, 0, _first_queries)
    # A sum keeps a copy from being left out, and reads and writes as much.
    shape, size = (4 * rows, d), 8.0 * rows * d * dtype.itemsize
    yield _Task("copy", lambda x: x + 1, (shape,), shape, 0, size, _first_rows)


def _first_rows(out: jax.Array, x: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    return out[:SAMPLE], x[:SAMPLE], *others


def _first_queries(out: jax.Array, *qkv: jax.Array) -> tuple[jax.Array, ...]:
    out, q, k, v = (x[-1:, :, :1] for x in (out, *qkv))
    return out[:, :SAMPLE], q[:, :SAMPLE], k, v
