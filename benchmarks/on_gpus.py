"""What benchmarks/results holds of a machine's GPUs, a stage at a time (`on_gpus.toml`).

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
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Annotated

from typer import Argument, Option

from benchmarks.records import ROOT
from benchmarks.run.options import check_name

_STAGES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_LEAST_SECONDS = 20  # that a command is worth starting for
NAMES = (*_STAGES, "sanitize")


def commands(stage: str) -> Iterator[tuple[int, int, list[str]]]:
    """GPU, seconds and arguments of a stage's commands."""
    for entry in _STAGES.get(stage, ()):
        options = dict(entry)
        gpu, seconds, arguments = (options.pop(name) for name in ("gpu", "seconds", "suite"))
        arguments = [arguments]
        for name, value in options.items():
            for one in value if isinstance(value, list) else [value]:
                arguments += [f"--{name}", str(one)]
        yield gpu, seconds, arguments


def on_gpus(
    stage: Annotated[str, Argument(help=f"{', '.join(NAMES)}.")],
    folder: Annotated[Path, Argument(help="Of the records and of what is printed.")],
    limit: Annotated[float, Option(help="Seconds after which nothing starts.")] = 520,
) -> int:
    """What benchmarks/results holds of a machine's GPUs, a stage at a time."""
    check_name("stage", stage, NAMES)
    gpus = len(subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout.splitlines())
    if not gpus:
        raise ValueError("a GPU must be here, nvidia-smi lists none")
    folder.mkdir(parents=True, exist_ok=True)
    if stage == "sanitize":
        return _sanitize(folder / "sanitizer.log", limit)
    end, codes = time.monotonic() + limit, []

    def work(gpu: int) -> None:  # two suites never time on one GPU
        for wanted, seconds, arguments in commands(stage):
            if wanted % gpus == gpu:
                left = min(seconds, end - time.monotonic())
                codes.append(_bench(gpu, gpus, left, arguments, folder))

    with ThreadPoolExecutor(gpus) as pool:
        list(pool.map(work, range(gpus)))
    return int(any(codes))


def _bench(gpu: int, gpus: int, limit: float, arguments: list[str], folder: Path) -> int:
    """One command on one of so many GPUs and its share of the processors."""
    enough = limit >= _LEAST_SECONDS
    what = f"GPU {gpu}, {limit:.0f} s" if enough else "no time left for"
    line = f"== {time.strftime('%X')} {what}: {' '.join(arguments)}"
    print(line, flush=True)
    with open(folder / f"gpu{gpu}.log", "a", encoding="utf-8") as log:
        print(line, file=log, flush=True)
        if not enough:
            return 1
        share = (os.cpu_count() or 1) // gpus
        processors = f"{gpu * share}-{gpu * share + share - 1}"
        bounds = f"timeout -s INT -k 15 {limit + 50:.0f} taskset -c {processors}".split()
        out = ["--limit", f"{limit:.0f}", "--append", "--out", str(folder / f"gpu{gpu}.jsonl")]
        own = {"CUDA_VISIBLE_DEVICES": str(gpu), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        return _python(bounds, [*arguments, *out], log, own)


def _sanitize(path: Path, limit: float) -> int:
    codes = []
    with open(path, "w", encoding="utf-8") as log:
        for tool in ("memcheck", "racecheck"):
            print(f"## {tool}", file=log, flush=True)
            bounds = f"timeout {limit:.0f} compute-sanitizer --tool {tool}".split()
            # What XLA tries on the GPU would be checked too.
            own = {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}
            codes.append(_python(bounds, ["sanitize"], log, own))
    print(path.read_text(encoding="utf-8"))
    return int(any(codes))


def _python(before: list[str], arguments: list[str], log: IO[str], own: dict[str, str]) -> int:
    """The exit code of `python -m benchmarks`."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/inductor", **os.environ}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | own
    command = [*before, sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
