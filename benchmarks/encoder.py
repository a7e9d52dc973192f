"""The image encoder on a GPU: XLA beside the Mosaic GPU kernels, each case in its own process.

    python -m benchmarks encoder --model vit_l --batch 8 --density 1 --density 0.3 --out FILE

Random weights and images. Cases compile side by side and are timed one at a time. Outputs are first
compared with float32 XLA where `--check` asks for it: the same function of the same weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import records, shapes
from benchmarks.timing import Spread

_READY = "ready"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One encoder; `features` is where its output for the first image goes."""

    model: str
    batch: int
    density: float
    implementation: str
    dtype: str
    ranking: str
    features: str
    timed: bool = True


def run(case: Case) -> dict[str, Any]:
    """Compile, run and time one case in this process."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from sparsesam_jax import Sam, Sparsity

    config = shapes.model_config(case.model)
    sparsity = None
    if case.density < 1:
        ranking: Any = case.ranking
        sparsity = Sparsity(case.density, ranking=ranking)
    dtype = jnp.dtype(case.dtype)
    implementation: Any = case.implementation
    options = {"dtype": dtype, "param_dtype": dtype, "implementation": implementation}
    sam = Sam.abstract(config, sparsity=sparsity, **options)
    graphdef, state = nnx.split(sam.image_encoder)
    random = shapes.random_weights(config)
    leaves = [
        (key, leaf.replace(jnp.asarray(random[".".join(["image_encoder", *map(str, key)])], dtype)))
        for key, leaf in nnx.to_flat_state(state)
    ]
    del random
    state = nnx.from_flat_state(leaves)
    pixels = jnp.asarray(shapes.random_pixels(config, case.batch), dtype)

    @jax.jit
    def encode(state: nnx.State, pixels: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(pixels)

    start = time.perf_counter()
    lowered = encode.lower(state, pixels)
    lower_s = time.perf_counter() - start
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start
    out = jax.block_until_ready(compiled(state, pixels))
    np.save(case.features, np.asarray(out[0], np.float32))
    memory = compiled.memory_analysis()
    assert memory is not None
    device = jax.devices()[0]
    record: dict[str, Any] = {
        "suite": "encoder",
        "peer": "sparsesam_jax",
        **dataclasses.asdict(case),
        "compile_s": compile_s,
        "lower_s": lower_s,
        "temp_mib": memory.temp_size_in_bytes / 2**20,
        "argument_mib": memory.argument_size_in_bytes / 2**20,
        "device": device.device_kind,
        "versions": records.versions(),
        "commit": records.commit(),
        "weights": shapes.WEIGHTS_DISTRIBUTION,
        "pixels": shapes.PIXELS_DISTRIBUTION,
    }
    if not case.timed:
        return record
    # The others still compile, and try kernels on the GPU.
    print(_READY, flush=True)
    sys.stdin.readline()
    times = []
    for i in range(25):
        start = time.perf_counter()
        jax.block_until_ready(compiled(state, pixels))
        if i >= 5:
            times.append((time.perf_counter() - start) * 1e3)
    parts = _parts(lambda: jax.block_until_ready(compiled(state, pixels)))
    same = all(bool((compiled(state, pixels) == out).all()) for _ in range(20))
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    spread = Spread.of(times)
    return (
        record
        | spread._asdict()
        | {
            "ms_per_image": spread.median_ms / case.batch,
            "peak_mib": None if peak is None else peak / 2**20,
            "repeats_equal": same,
            "parts_ms": parts,
        }
    )


def _parts(call: Any, runs: int = 3) -> dict[str, float]:
    """Milliseconds of a run in every GPU kernel, by the profiler, the longest first."""
    import jax

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
                        total[event.name] = (
                            total.get(event.name, 0) + event.duration_ns / 1e6 / runs
                        )
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _label(case: Case) -> str:
    ranking = f" {case.ranking}" if case.density < 1 else ""
    return f"{case.model} B{case.batch} r{case.density}{ranking} {case.implementation} {case.dtype}"


def _error(features: str, reference: str) -> float:
    want = np.load(reference)
    return float(np.linalg.norm(np.load(features) - want) / np.linalg.norm(want))


def main(
    model: Annotated[list[str], typer.Option(help="vit_t, vit_b, vit_l or vit_h.")],
    batch: Annotated[list[int], typer.Option(help="Images a run.")],
    density: Annotated[list[float], typer.Option(help="1 is dense.")],
    implementation: Annotated[list[str], typer.Option(help="xla or mosaic_gpu.")],
    ranking: Annotated[str, typer.Option(help="Of the sparse cases.")] = "group",
    check: Annotated[bool, typer.Option(help="Compare with float32 XLA.")] = False,
    parts: Annotated[int, typer.Option(help="Longest kernels of every case to print.")] = 0,
    limit: Annotated[float, typer.Option(help="Seconds after which the rest is given up.")] = 600,
    out: Annotated[Path | None, typer.Option(help="JSON lines to write.")] = None,
) -> None:
    """Our encoder on this machine's GPU: XLA and the kernels, every combination of the options."""
    for name in model:
        if name not in shapes.MODELS:
            expected = ", ".join(shapes.MODELS)
            raise typer.BadParameter(f"--model must be one of {expected}; got {name!r}")
    for name in implementation:
        if name not in ("xla", "mosaic_gpu"):
            raise typer.BadParameter(f"--implementation must be xla or mosaic_gpu; got {name!r}")
    if not all(0 < r <= 1 for r in density):
        raise typer.BadParameter(f"--density must lie in (0, 1], got {density}")
    with tempfile.TemporaryDirectory() as folder, records.writer(out) as write:

        def case(m: str, b: int, r: float, i: str, dtype: str, *, timed: bool = True) -> Case:
            return Case(
                model=m,
                batch=b,
                density=r,
                implementation=i,
                dtype=dtype,
                ranking=ranking,
                features=f"{folder}/{m}_{b}_{r}_{i}_{dtype}.npy",
                timed=timed,
            )

        cases = [
            case(m, 1, r, "xla", "float32", timed=False)
            for m in (model if check else [])
            for r in density
        ]
        references = {(c.model, c.density): c.features for c in cases}
        cases += [
            case(m, b, r, i, "bfloat16")
            for m in model
            for b in batch
            for r in density
            for i in implementation
        ]
        environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        command = [sys.executable, "-m", "benchmarks.encoder", "--one"]
        jobs = []
        for c in cases:
            errors = open(f"{c.features}.err", "w+")  # noqa: SIM115 - as long as the process
            argument = json.dumps(dataclasses.asdict(c))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            job = subprocess.Popen([*command, argument], env=environment, text=True, **pipes)
            jobs.append((c, job, errors))
        missing = False
        timer = threading.Timer(limit, lambda: [job.kill() for _, job, _ in jobs])
        timer.start()
        first = [job.stdout.readline().strip() for _, job, _ in jobs]  # until all are compiled
        for (c, job, errors), line in zip(jobs, first, strict=True):
            if line == _READY:
                line = job.communicate("go\n")[0].strip()
            if job.wait():
                errors.seek(0)
                why = f"more than {limit:.0f} s" if job.returncode < 0 else errors.read()[-600:]
                print(f"{_label(c)}: not run, {why}", flush=True)
                missing = True
                continue
            record = json.loads(line.splitlines()[-1])
            reference = references.get((c.model, c.density))
            if c.timed and reference and Path(reference).exists():
                record["max_error"] = _error(c.features, reference)
            del record["features"]
            write(record)
            if c.timed:
                _print(c, record, parts)
        timer.cancel()
    if missing:
        raise typer.Exit(1)


def _print(case: Case, record: dict[str, Any], parts: int) -> None:
    images = case.batch
    print(
        f"{_label(case)}: {record['ms_per_image']:.3f} ms an image "
        f"({record['q1_ms'] / images:.3f} to {record['q3_ms'] / images:.3f}), "
        f"GPU busy {sum(record['parts_ms'].values()) / images:.3f}, "
        f"peak {record['peak_mib'] or math.nan:.0f} MiB, temp {record['temp_mib']:.0f}, "
        f"error {record.get('max_error', math.nan):.2e}, same {record['repeats_equal']}, "
        f"compile {record['compile_s']:.0f} s",
        flush=True,
    )
    for name, ms in list(record["parts_ms"].items())[:parts]:
        print(f"    {ms:8.3f} ms  {name[:90]}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(run(Case(**json.loads(sys.argv[2])))))
    else:
        typer.run(main)
