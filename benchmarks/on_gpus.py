"""What benchmarks/results holds of a machine's GPUs, a stage at a time.

    python -m benchmarks on-gpus smoke|encoder|rest|autotune|sanitize FOLDER

    smoke     every suite once with vit_t, one GPU, about 5 minutes: read it before a longer stage
    encoder   encoders of vit_b, vit_l and vit_h and the PyTorch peers, about 9 minutes on 2 GPUs
    rest      kernels, ceilings, end-to-end, scaling, ViT-H's peers, about 9 minutes on 2 GPUs
    autotune  torch.compile with max-autotune, which compiles for 5 minutes on 16 cores
    sanitize  memcheck and racecheck of every kernel, to FOLDER/sanitizer.log

Records are appended to FOLDER/gpuN.jsonl as they come, what is printed to FOLDER/gpuN.log. Nothing
starts after the limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.run.machine import ROOT
from benchmarks.run.options import check_name

# GPU (one that is not there is one that is), seconds, command. `by:` are implementations, `at:`
# densities, `of:` batches.
_STAGES = """
smoke    0 110 encoder --model vit_t of:1 at:1,0.3 --decomposition 0.3 --runs 5 --width 8 \
               by:mosaic_gpu,xla,eager,compile,flex,transformers
smoke    0  70 kernels --model vit_t of:1 at:0.3 --runs 5 --width 12
smoke    0  40 ceilings --model vit_t of:1 --runs 5
smoke    0  80 end-to-end --model vit_t at:1,0.3 --runs 5 --width 8
smoke    0  60 scaling --model vit_t --axis density --runs 5 --width 14
encoder  0 300 encoder --model vit_l of:8,1 ALL --decomposition 0.3 --width 12 by:mosaic_gpu
encoder  1 300 encoder --model vit_h of:8,1 ALL --decomposition 0.3 --width 12 by:mosaic_gpu
encoder  2 200 encoder --model vit_b of:8,1 ALL --decomposition 0.3 --width 12 by:mosaic_gpu
encoder  3 300 encoder --model vit_l of:8,1 at:1,0.3 --width 12 \
               by:compile,flex,sdpa,eager,transformers
encoder  0 200 encoder --model vit_l of:8,1 at:1,0.3 --width 8 by:xla
encoder  2 160 encoder --model vit_b of:8,1 at:1,0.3 --width 12 by:compile,flex,eager,xla
rest     0 240 kernels --model vit_l of:8,1 at:1,0.3 --width 12
rest     1 240 encoder --model vit_h of:8,1 at:1,0.3 --width 8 by:compile,flex,eager
rest     2 300 scaling --model vit_l --axis batch --axis density --width 12
rest     3 150 end-to-end --model vit_l --width 8
rest     0  60 ceilings --width 6
rest     1 120 encoder --model vit_h of:8,1 at:1 --width 8 by:xla
rest     3 200 scaling --model vit_l --axis image_size --width 8
rest     3 120 kernels --model vit_h of:8 at:1,0.3 --width 12 by:mosaic_gpu,xla
autotune 0 500 encoder --model vit_l of:8 at:1 --width 4 by:compile-max-autotune
"""
_SHORT = {"by": "--implementation", "at": "--density", "of": "--batch"}
_LEAST_SECONDS = 20  # that a command is worth starting for
NAMES = ("smoke", "encoder", "rest", "autotune", "sanitize")


def commands(stage: str) -> Iterator[tuple[int, int, list[str]]]:
    """GPU, seconds and arguments of a stage's commands."""
    for line in _STAGES.replace("ALL", "at:1,0.5,0.4,0.3,0.25").replace("\\\n", "").splitlines():
        name, gpu, seconds, *words = line.split() or ("", 0, 0)
        arguments = []
        for word in words:
            option, _, values = word.partition(":")
            arguments += [
                x for value in values.split(",") for x in (_SHORT.get(option, word), value)
            ]
        if name == stage:
            yield int(gpu), int(seconds), [x for x in arguments if x]


def run(stage: str, folder: Path, limit: float) -> int:
    """Run a stage; 1 if a command failed or found no time, else 0."""
    check_name("stage", stage, NAMES)
    gpus = len(subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout.splitlines())
    if not gpus:
        raise ValueError("a GPU must be here, nvidia-smi lists none")
    folder.mkdir(parents=True, exist_ok=True)
    end, codes = time.monotonic() + limit, []

    def work(gpu: int) -> None:  # two suites never time on one GPU
        for wanted, seconds, arguments in commands(stage):
            if wanted % gpus == gpu:
                codes.append(
                    _bench((gpu, gpus), min(seconds, end - time.monotonic()), arguments, folder)
                )

    if stage == "sanitize":
        return _sanitize(folder / "sanitizer.log", limit)
    with ThreadPoolExecutor(gpus) as pool:
        list(pool.map(work, range(gpus)))
    return int(any(codes))


def _bench(place: tuple[int, int], limit: float, arguments: list[str], folder: Path) -> int:
    """One command on one of so many GPUs and its share of the processors."""
    gpu, gpus = place
    enough = limit >= _LEAST_SECONDS
    what = f"GPU {gpu}, {limit:.0f} s" if enough else "no time left for"
    line = f"== {time.strftime('%X')} {what}: {' '.join(arguments)}"
    print(line, flush=True)
    with open(folder / f"gpu{gpu}.log", "a", encoding="utf-8") as log:
        print(line, file=log, flush=True)
        if not enough:
            return 1
        share = (os.cpu_count() or 1) // gpus
        out = ["--limit", f"{limit:.0f}", "--append", "--out", str(folder / f"gpu{gpu}.jsonl")]
        bounds = ["timeout", "-s", "INT", "-k", "15", f"{limit + 50:.0f}", "taskset", "-c"]
        command = [*bounds, f"{gpu * share}-{gpu * share + share - 1}", sys.executable, "-m"]
        own = {"CUDA_VISIBLE_DEVICES": str(gpu), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        command += ["benchmarks", *arguments, *out]
        return subprocess.run(command, env=_environment(own), stdout=log, stderr=log).returncode


def _environment(own: dict[str, str]) -> dict[str, str]:
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/inductor"}
    return caches | os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | own


def _sanitize(log: Path, limit: float) -> int:
    codes = []
    # What XLA tries on the GPU would be checked too.
    environment = _environment({"XLA_FLAGS": "--xla_gpu_autotune_level=0"})
    with open(log, "w", encoding="utf-8") as file:
        for tool in ("memcheck", "racecheck"):
            print(f"## {tool}", file=file, flush=True)
            command = [
                "timeout",
                f"{limit:.0f}",
                "compute-sanitizer",
                "--tool",
                tool,
                sys.executable,
            ]
            command += ["-m", "benchmarks", "sanitize"]
            done = subprocess.run(command, env=environment, stdout=file, stderr=file)
            codes.append(done.returncode)
    print(log.read_text(encoding="utf-8"))
    return int(any(codes))
