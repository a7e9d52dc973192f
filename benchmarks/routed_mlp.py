"""Correctness, then speed, of the MLP kernels on this machine's GPU, and of XLA beside them.

    python -m benchmarks.routed_mlp [--out results.jsonl] [--jobs 12] [--only block] [--limit 90]

Random normal inputs, fresh every run. Worker processes compile side by side; a lock gives the GPU
to one at a time. Each task is first compared with a float32 reference on sampled rows of the same
rounded inputs (error inf: a row that is not routed changed; nan: repeats differ), then timed:
medians over loops inside one program, so that no launch waits for the host. TFLOP/s count 4 M d h
of a block, 2 M d h of a product, on the routed tokens M.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import math
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import gather_norm_kernel, matmul_kernel, mlp_reference, reference, routed_mlp
from pallas_kernels.matmul_kernel import Config, Epilogue
from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.tuning import fitting_matmul, padded

EPSILON = 1e-6
PRODUCTS = ("product1", "product2")
SAMPLE = 64  # rows that are compared
REPEATS = 20  # of a whole block, which must agree to the bit
LOCK = os.path.join(tempfile.gettempdir(), "sparsesam_jax_gpu.lock")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of the benchmark; density 1 is the dense MLP."""

    batch: int = 8
    num_tokens: int = 4096
    width: int = 1024
    density: float = 0.3
    dtype: str = "bfloat16"

    @property
    def num_rows(self) -> int:
        """Routed tokens of all images."""
        return self.batch * round(self.density * self.num_tokens)

    def __str__(self) -> str:
        return f"B{self.batch} d{self.width} r{self.density} {self.dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What one line of the table measures.

    `part` is "norm" (gather + LayerNorm), "product1", "product2" or "block" (all of it); `program`
    is "mosaic", "xla" (the same part) or "xla_gemm" (the part's product and nothing else).
    """

    part: str
    case: Case
    program: str = "mosaic"
    config: Config | None = None
    epilogue: Epilogue | None = None
    block_rows: int = gather_norm_kernel.BLOCK_ROWS

    @property
    def flops(self) -> float:
        """Useful floating point operations."""
        products = {"norm": 0, "block": 2}.get(self.part, 1)
        return products * 2.0 * self.case.num_rows * self.case.width**2 * 4

    def __str__(self) -> str:
        text = f"{self.case} {self.part} {self.program}"
        if self.part == "norm" and self.program == "mosaic":
            text += f" rows{self.block_rows}"
        if self.epilogue:
            text += f" {self.epilogue}"
        if c := self.config:
            text += (
                f" {c.tile_m}x{c.tile_n}x{c.tile_k} stages{c.num_stages} slots{c.num_slots}"
                f" {'turns' if c.take_turns else 'shared'} group{c.group_m} cluster{c.cluster}"
            )
        return text


LARGE = (
    Config(),
    Config(cluster=2),
    Config(cluster=2, num_stages=5, num_slots=1),
    Config(cluster=2, tile_k=128, num_stages=2),
    Config(cluster=2, group_m=8),
    Config(cluster=2, group_m=32),
    Config(cluster=2, tile_m=64, tile_n=256),
    Config(tile_m=64, tile_n=256, num_stages=5, num_slots=1),
    Config(take_turns=False, tile_n=256, num_slots=1),
    Config(take_turns=False, tile_n=256, num_slots=1, cluster=2),
    Config(take_turns=False, tile_m=256, num_stages=3),
    Config(take_turns=False, tile_m=256, num_stages=3, cluster=2),
)
SMALL = (
    Config(),
    Config(cluster=2),
    Config(take_turns=False, num_stages=6, num_slots=1),
    Config(take_turns=False, num_stages=6, num_slots=1, cluster=2),
    Config(tile_m=64, num_stages=6),
    Config(tile_m=64, num_stages=6, cluster=2),
    Config(tile_n=64, num_stages=6, num_slots=1),
    Config(tile_n=64, num_stages=6, num_slots=1, cluster=2),
    Config(tile_m=64, tile_n=64, num_stages=8, num_slots=1),
    Config(take_turns=False, tile_n=64, num_stages=8, num_slots=1),
    Config(take_turns=False, tile_n=64, num_stages=8, num_slots=1, cluster=2),
)


def tasks() -> list[Task]:
    """The table, what matters most first."""
    sparse, dense = Case(), Case(density=1.0)
    cases = [sparse, dense, Case(density=0.4)]
    cases += [Case(batch=1, density=density) for density in (0.3, 1.0, 0.4)]
    others = [Case(width=width, density=r) for width in (768, 1280) for r in (0.3, 1.0)]
    others.append(Case(dtype="float16"))
    table = []
    for case in cases + others:
        table.append(Task(part="block", case=case))
    # XLA's compiler tries products on the GPU, for seconds each: only what is compared with.
    for case in (sparse, dense, cases[3]):
        table.append(Task(part="block", case=case, program="xla"))
        table += [Task(part=part, case=case, program="xla_gemm") for part in PRODUCTS]
    table += [Task(part=part, case=sparse, program="xla") for part in ("norm", *PRODUCTS)]
    table += [Task(part="norm", case=sparse, block_rows=rows) for rows in (8, 16, 32)]
    table += [Task(part="norm", case=case) for case in (dense, cases[3])]
    for case in (sparse, dense, cases[3]):
        for config in SMALL if case.batch == 1 else LARGE:
            for part in PRODUCTS:
                task = Task(part=part, case=case, config=config)
                table += [task] if fits(task) else []
    for config in (LARGE[1], LARGE[8]):
        for epilogue in ("none", "bias"):
            table.append(Task(part="product1", case=sparse, config=config, epilogue=epilogue))
    table += [Task(part="block", case=case, program="xla") for case in (*others, *cases)]
    for case in [Case(batch=1, density=1.0), *others]:
        for config in (LARGE[0], LARGE[1], LARGE[6], LARGE[8], LARGE[9]):
            for part in PRODUCTS:
                task = Task(part=part, case=case, config=config)
                table += [task] if fits(task) else []
    return list(dict.fromkeys(table))


def fits(task: Task) -> bool:
    """Whether a product's tiling fits its shape."""
    d, h = task.case.width, 4 * task.case.width
    n, k = (h, d) if task.part == "product1" else (d, h)
    assert task.config is not None
    return task.config.fits(padded(task.case.num_rows), n, k)


def inputs(task: Task, seed: int) -> dict[str, Any]:
    """Host arrays: the block's, or those of the task's part."""
    case = task.case
    rng = np.random.default_rng(seed)
    d, h, per_image = case.width, 4 * case.width, case.num_rows // case.batch
    dtype = jnp.dtype(case.dtype)

    def normal(*shape: int, scale: float = 1.0, offset: float = 0.0, dtype: Any = dtype) -> Any:
        values = rng.standard_normal(shape, np.float32)
        return (values * np.float32(scale) + np.float32(offset)).astype(dtype)

    index = [rng.permutation(case.num_tokens)[:per_image] for _ in range(case.batch)]
    index = np.sort(np.stack(index), axis=1).astype(np.int32)
    rows = (index + np.arange(case.batch, dtype=np.int32)[:, None] * case.num_tokens).reshape(-1)
    num_padded = padded(case.num_rows)
    own = {}
    if task.part == "product1":
        own["normed"] = normal(num_padded, d)
    else:
        own["x"] = normal(case.batch * case.num_tokens, d)
    if task.part == "product2":
        own["hidden"] = normal(num_padded, h, scale=0.5)
    return own | dict(
        index=index,
        rows=np.pad(rows, (0, num_padded - len(rows)), mode="edge"),
        weights=MLPWeights(
            norm_scale=normal(d, scale=0.1, offset=1.0, dtype=np.float32),
            norm_bias=normal(d, scale=0.1, dtype=np.float32),
            kernel1=normal(d, h, scale=d**-0.5),
            bias1=normal(h, scale=0.1),
            kernel2=normal(h, d, scale=h**-0.5),
            bias2=normal(d, scale=0.1),
        ),
    )


def step(task: Task, carry: Any, data: dict[str, Any]) -> Any:
    """One run of the task's part; `carry` is x where the part changes x, else unused."""
    case, weights = task.case, data["weights"]
    d, h, dense = case.width, 4 * case.width, case.density == 1.0
    mosaic = task.program == "mosaic"
    rows = None if dense else data["rows"]
    if task.part == "block":
        x = carry.reshape(case.batch, -1, d)
        if mosaic:
            index = None if dense else data["index"]
            statics, operands = routed_mlp.prepare(x, index, weights, epsilon=EPSILON)
            return routed_mlp.launch(statics, *operands).reshape(-1, d)
        if dense:
            return mlp_reference.mlp(x, weights).reshape(-1, d)
        return mlp_reference.routed_mlp(x, data["index"], weights).reshape(-1, d)
    if task.part == "norm":
        scale, bias = weights.norm_scale, weights.norm_bias
        x = data["x"]
        if mosaic:
            statics, operands = gather_norm_kernel.prepare(
                x, scale, bias, rows, num_rows=case.num_rows, block_rows=task.block_rows
            )
            return gather_norm_kernel.launch(statics, *operands)
        return reference.layer_norm(x if dense else x[data["rows"]], scale, bias, EPSILON)
    if task.part == "product1":
        normed = data["normed"]
        if task.program == "xla_gemm":
            return normed @ weights.kernel1
        if task.program == "xla":
            hidden = (normed @ weights.kernel1).astype(jnp.float32) + weights.bias1
            return jax.nn.gelu(hidden, approximate=False).astype(normed.dtype)
        epilogue = task.epilogue or "gelu"
        config = task.config or fitting_matmul(epilogue, len(normed), h, d)
        assert config is not None
        statics, operands = matmul_kernel.prepare(
            normed,
            weights.kernel1,
            weights.bias1,
            epilogue=epilogue,
            config=config,
            num_rows=case.num_rows,
        )
        return matmul_kernel.launch(statics, *operands)
    hidden = data["hidden"]
    if task.program == "xla_gemm":
        return hidden @ weights.kernel2
    if task.program == "xla":
        hidden = hidden[: case.num_rows]
        update = (hidden @ weights.kernel2).astype(jnp.float32) + weights.bias2
        update = update.astype(carry.dtype)
        if dense:
            return carry + update
        return carry.at[data["rows"][: case.num_rows]].add(update, unique_indices=True)
    config = task.config or fitting_matmul("add", len(hidden), d, h)
    assert config is not None
    statics, operands = matmul_kernel.prepare(
        hidden,
        weights.kernel2,
        weights.bias2,
        rows,
        carry,
        epilogue="add",
        config=config,
        num_rows=case.num_rows,
    )
    return matmul_kernel.launch(statics, *operands)


def changes_x(task: Task) -> bool:
    """Whether the part's output is the residual stream."""
    return task.part == "block" or (task.part == "product2" and task.program != "xla_gemm")


def relative_error(task: Task, out: np.ndarray, data: dict[str, Any]) -> float:
    """Frobenius error of sampled rows against float32; infinite if another row of x changed."""
    case = task.case
    picked = np.unique(np.linspace(0, case.num_rows - 1, SAMPLE).astype(int))
    rows = picked if case.density == 1.0 else data["rows"][picked]
    weights = MLPWeights(*(w.astype(np.float32) for w in data["weights"]))
    x, normed, hidden = (
        data[name][index].astype(np.float32) if name in data else np.empty(0)
        for name, index in (("x", rows), ("normed", picked), ("hidden", picked))
    )
    if task.part in ("norm", "block"):
        centred = x - x.mean(1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(1, keepdims=True) + EPSILON)
        normed = centred / deviation * weights.norm_scale + weights.norm_bias
    if task.part in ("product1", "block"):
        hidden = normed @ weights.kernel1
        if task.program != "xla_gemm" and task.epilogue != "none":
            hidden += weights.bias1
        if task.program != "xla_gemm" and task.epilogue is None:
            hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    want = {"norm": normed, "product1": hidden}.get(task.part)
    if want is None:
        want = hidden @ weights.kernel2
        if changes_x(task):
            want += x + weights.bias2
    got = out[rows if changes_x(task) else picked].astype(np.float32)
    if changes_x(task) and case.density < 1:
        others = np.delete(np.arange(len(out)), data["rows"])
        if not np.array_equal(out[others].view(np.int16), data["x"][others].view(np.int16)):
            return math.inf
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(task: Task, seed: int) -> dict[str, Any]:
    """Compile, check and time one task."""
    data = inputs(task, seed)
    loops = 40 if task.case.batch > 1 else 150
    if changes_x(task):
        carry = data["x"]
    else:
        shape = jax.eval_shape(lambda data: step(task, None, data), data)
        carry = np.zeros(shape.shape, shape.dtype)

    def once(carry, data):
        return step(task, carry, data)

    def many(carry, data):
        def again(_, state):
            # The barrier ties the arrays to the count, so that no run is moved out of the loop.
            count, carry = state
            own_data, count = lax.optimization_barrier((data, count))
            return count + 1, step(task, carry, own_data)

        return lax.fori_loop(0, loops, again, (0, carry))[1]

    def compiled():
        return [jax.jit(f, donate_argnums=0).lower(carry, data).compile() for f in (once, many)]

    start = time.perf_counter()
    programs = compiled() if task.program == "mosaic" else None
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        signal.alarm(30)  # a kernel that hangs must not keep the GPU
        programs = programs or compiled()  # XLA tries its products on the GPU
        compile_seconds = time.perf_counter() - start
        run_once, run_many = programs
        data_on_gpu = jax.device_put(data)
        first = run_once(jax.device_put(carry), data_on_gpu)
        repeats = REPEATS if task.part == "block" and task.program == "mosaic" else 0
        again = (run_once(jax.device_put(carry), data_on_gpu) for _ in range(repeats))
        same = all(bool((first == out).all()) for out in again)
        out = np.asarray(first)
        state = run_many(jax.device_put(carry), data_on_gpu)
        jax.block_until_ready(state)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            state = jax.block_until_ready(run_many(state, data_on_gpu))
            times.append((time.perf_counter() - start) / loops)
        signal.alarm(0)
    seconds = statistics.median(times)
    return dict(
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        task=str(task),
        **{k: v for k, v in dataclasses.asdict(task).items() if v is not None},
        error=relative_error(task, out, data) if same else math.nan,
        ms=seconds * 1e3,
        spread_ms=(max(times) - min(times)) * 1e3,
        tflops=task.flops / seconds / 1e12,
        copies=str(run_many.as_text()).count(" copy("),
        compile_seconds=compile_seconds,
    )


def work(queue: Any, table: list[Task], out: str | None) -> None:
    """Take tasks until there are none, or until one fails: it may leave the GPU unusable."""
    while (index := queue.get()) is not None:
        task = table[index]
        try:
            record = measure(task, seed=time.time_ns() % 2**31)
        except Exception as error:  # a tiling may not work: the table says so
            print(f"{task}: failed: {str(error)[:400]}", flush=True)
            os._exit(1)
        print(
            f"{record['ms']:.4f} ms +- {record['spread_ms']:.4f}, {record['tflops']:.0f} TFLOP/s, "
            f"error {record['error']:.2e}, copies {record['copies']}: {task}",
            flush=True,
        )
        if out:
            with open(out, "a") as file:
                file.write(json.dumps(record) + "\n")


def main() -> None:
    """Measure the table; JSON lines go to `--out`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", help="file for JSON lines")
    parser.add_argument("--jobs", type=int, default=12, help="worker processes")
    parser.add_argument("--only", nargs="*", help="words that a task's line must have")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which to stop")
    parser.add_argument("--list", action="store_true", help="print the tasks and stop")
    options = parser.parse_args()
    table = [t for t in tasks() if all(word in str(t) for word in options.only or [])]
    if options.list:
        print("\n".join(map(str, table)))
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    jobs = min(options.jobs, len(table))
    for item in [*range(len(table)), *[None] * jobs]:
        queue.put(item)
    end = time.monotonic() + options.limit
    workers: list[Any] = []
    while time.monotonic() < end:
        failed = [w for w in workers if w.exitcode not in (None, 0)]
        workers = [w for w in workers if w not in failed]
        while len(workers) < jobs:
            workers.append(context.Process(target=work, args=(queue, table, options.out)))
            workers[-1].start()
        if all(w.exitcode == 0 for w in workers):
            return
        time.sleep(0.2)
    for worker in workers:
        worker.kill()
    print(f"stopped after {options.limit} s")


if __name__ == "__main__":
    main()
