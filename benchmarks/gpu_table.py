"""What the attention kernels' benchmarks share: one line of a table for every task, on a GPU.

Worker processes compile side by side; when all have, a lock gives the GPU to one at a time. A task
is timed as a loop inside one program, so that no launch waits for the host.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOCK = os.path.join(tempfile.gettempdir(), "sparsesam_jax_gpu.lock")
LOOPS = 40  # runs of a function in one of its program
GROUPS = 7  # timed runs of a program
SECONDS_ON_GPU = 60  # of one task: a kernel that hangs must not keep the GPU

Record = dict[str, Any]


class Task(NamedTuple):
    """One line of the table: dataclasses of what is measured, and how it runs."""

    case: Any
    config: Any = None

    def __str__(self) -> str:
        """The case, and what the configuration sets otherwise than by default."""
        return " ".join(filter(None, [str(self.case), changes(self.config)]))


class Programs(NamedTuple):
    """What a task compiles and measures.

    Attributes:
        whole: The public function of `arrays`.
        prepare: What it computes of `arrays` for its kernel.
        kernel: The kernel of what `prepare` returns; traced after it.
        arrays: A tree of arrays.
        error: Relative error of an output.
        flops: What counts as work.
    """

    whole: Callable[[Any], jax.Array]
    prepare: Callable[[Any], Any]
    kernel: Callable[[Any], jax.Array]
    arrays: Any
    error: Callable[[jax.Array], float]
    flops: float


PlanTask = Callable[[Any, Any], Programs]  # for a case and a configuration


def changes(dataclass: Any) -> str:
    """The fields of a dataclass that differ from their defaults."""
    if dataclass is None:
        return ""
    values = {field.name: getattr(dataclass, field.name) for field in dataclasses.fields(dataclass)}
    default = {field.name: field.default for field in dataclasses.fields(dataclass)}
    return " ".join(f"{name}={x}" for name, x in values.items() if x != default[name])


def compile_loop(step: Callable[[Any], jax.Array], arrays: Any, loops: int = LOOPS) -> Any:
    """`step(arrays)`, `loops` times in one program that returns the last result."""
    shape = jax.eval_shape(step, arrays)

    def run(arrays: Any) -> jax.Array:
        def again(_: Any, state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            # The barrier ties the arrays to the count, so that no run is moved out of the loop.
            own_arrays, count = lax.optimization_barrier((arrays, state[0]))
            return count + 1, step(own_arrays)

        zeros = jnp.zeros(shape.shape, shape.dtype)
        return lax.fori_loop(0, loops, again, (0, zeros))[1]

    return jax.jit(run).lower(arrays).compile()


def _time(program: Any, arrays: Any) -> tuple[float, float]:
    """Median and spread (max - min) in ms of one run of a program's loop."""
    jax.block_until_ready(program(arrays))
    times = []
    for _ in range(GROUPS):
        start = time.perf_counter()
        jax.block_until_ready(program(arrays))
        times.append((time.perf_counter() - start) * 1e3 / LOOPS)
    return statistics.median(times), max(times) - min(times)


def _build(programs: Programs) -> Callable[[], Record]:
    """Compile; what comes back checks and times."""
    arrays = programs.arrays
    operands = jax.jit(programs.prepare)(arrays)
    kernel = compile_loop(programs.kernel, operands)
    whole = compile_loop(programs.whole, arrays)

    def measure() -> Record:
        error = programs.error(whole(arrays))
        ms, spread_ms = _time(whole, arrays)
        kernel_ms, kernel_spread_ms = _time(kernel, operands)
        return dict(
            error=error,
            ms=ms,
            spread_ms=spread_ms,
            kernel_ms=kernel_ms,
            kernel_spread_ms=kernel_spread_ms,
            tflops=programs.flops / kernel_ms / 1e9,
        )

    return measure


def frobenius_error(got: jax.Array, want: jax.Array) -> float:
    """Relative error |got - want| / |want| in float32."""
    got = got.astype(jnp.float32)
    return float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel()))


@contextlib.contextmanager
def _lock(kind: int) -> Iterator[None]:
    with open(LOCK, "w") as file:
        fcntl.flock(file, kind)
        yield


def _work(plan: PlanTask, tasks: list[Task], out: str | None) -> None:
    """Compile all tasks beside other workers, then measure one after the other, alone."""

    def attempt(task: Task, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:  # a configuration may not fit: the table says so
            print(f"{task}: failed: {str(error)[:400]}", flush=True)

    with _lock(fcntl.LOCK_SH):  # XLA tries its products on the GPU
        built = [(task, attempt(task, lambda task=task: _build(plan(*task)))) for task in tasks]
    for task, measure in built:
        if measure is None:
            continue
        with _lock(fcntl.LOCK_EX):
            signal.alarm(SECONDS_ON_GPU)
            measured = attempt(task, measure)
            signal.alarm(0)
        if measured is None:
            continue
        print(
            f"{measured['kernel_ms']:.4f} ms +- {measured['kernel_spread_ms']:.4f}, "
            f"{measured['tflops']:.0f} TFLOP/s, whole function {measured['ms']:.4f} ms +- "
            f"{measured['spread_ms']:.4f}, error {measured['error']:.2e}: {task}",
            flush=True,
        )
        if out:
            record = dict(device=jax.devices()[0].device_kind, jax=jax.__version__)
            for dataclass in filter(None, task):
                record |= dataclasses.asdict(dataclass)
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record | measured) + "\n")


def main(description: str, plan: PlanTask, cases: Sequence[Any], configs: Sequence[Any]) -> None:
    """The benchmark's command line: compile, check, time and print every task.

    Args:
        description: Of the benchmark.
        plan: What to measure for a case and a configuration; None is the default one.
        cases: The shapes.
        configs: What `--configs` runs every shape with.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", help="file that JSON lines are appended to")
    parser.add_argument("--configs", action="store_true", help="every configuration that fits")
    parser.add_argument("--only", nargs="*", default=[], help="words that a task's line must have")
    parser.add_argument("--jobs", type=int, default=15, help="worker processes")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which to stop")
    parser.add_argument("--list", action="store_true", help="print the tasks and stop")
    options = parser.parse_args()
    chosen = configs if options.configs else [None]
    table = [Task(case, config) for case in cases for config in chosen]
    table = [task for task in table if all(word in str(task).split() for word in options.only)]
    if options.list:
        print("\n".join(map(str, table)))
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # many processes share the GPU
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[Any, list[Task]]] = []
    for first in range(min(options.jobs, len(table))):
        own = table[first :: options.jobs]
        process = context.Process(target=_work, args=(plan, own, options.out))
        process.start()
        workers.append((process, own))
    end = time.monotonic() + options.limit
    try:
        for process, own in workers:
            process.join(max(0.0, end - time.monotonic()))
            if process.exitcode != 0:
                state = "stopped" if process.exitcode is None else f"exit {process.exitcode}"
                print(f"not all measured ({state}): {'; '.join(map(str, own))}", flush=True)
    finally:
        for process, _ in workers:
            process.kill()
