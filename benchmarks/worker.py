"""One implementation in a process of its own, which times a run whenever it is asked to.

The parent (`Worker`) starts `python -m benchmarks.worker JOB` and speaks JSON lines with it over
its standard input and output. So frameworks share neither threads nor memory, and their timed
runs can take turns.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.run.timing import time_ms

_ROOT = Path(__file__).resolve().parents[1]
_KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker runs.

    Attributes:
        peer: `sparsesam_jax` or `transformers`.
        implementation: The peer's variant: `xla`; `sdpa` or `eager`.
        weights: Native weights (`sparsesam_jax`) or a Hugging Face folder (`transformers`).
        pixels: Input as .npy, [B, height, width, 3].
        output: Where the features go as .npy, [B, Gh, Gw, C].
        threads: Processors and threads that it may use.
        warmups: Untimed runs.
        density: 1 is dense.
        keep_memory: Whether glibc keeps freed memory instead of returning it to the system. Large
            buffers are then not mapped, faulted in and zeroed again in every run.
    """

    peer: str
    implementation: str
    weights: str
    pixels: str
    output: str
    threads: int
    warmups: int
    density: float = 1.0
    keep_memory: bool = False


class Built(NamedTuple):
    """A peer, ready to run.

    Attributes:
        call: Runs the encoder once and waits for the result, which it returns.
        features: Takes that result to numpy, [B, Gh, Gw, C].
        compile_s: Seconds of compilation; None if the peer has none.
        notes: What exactly runs.
    """

    call: Callable[[], Any]
    features: Callable[[Any], np.ndarray]
    compile_s: float | None
    notes: dict[str, Any]


class NotRunError(Exception):
    """The worker cannot run its job; the message says why."""


class CheckError(Exception):
    """Outputs differ by more than their dtype explains, so nothing was timed."""


class Worker:
    """The parent's end: starts the process and waits until it has compiled and warmed up.

    Raises:
        NotRunError: The process cannot run the job.
    """

    def __init__(self, job: Job):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(job.threads),
            # Spinning OpenMP threads make PyTorch tens of times slower once anything else runs.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
            "HF_HUB_OFFLINE": "1",
        }
        if job.keep_memory:
            environment |= _KEEP_MEMORY
        # Its own process group: Ctrl-C is the parent's to handle.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(dataclasses.asdict(job))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        try:
            self.ready: dict[str, Any] = self._receive()
        except BaseException:
            self.close()
            raise

    def run_ms(self) -> float:
        """Time one run."""
        return self._ask("run")["ms"]

    def peak_mib(self) -> float | None:
        """Peak resident memory of the process since its warm-up; None where it is not known."""
        return self._ask("memory")["peak_mib"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            last = errors.strip().splitlines()[-1:] or ["no message"]
            code = self._process.returncode
            raise NotRunError(f"its process ended with code {code}: {last[0]}")
        answer = json.loads(line)
        if "not_run" in answer:
            raise NotRunError(answer["not_run"])
        return answer


def build(job: Job) -> Built:
    """Load and compile what a job asks for."""
    from benchmarks import peers_jax, peers_torch

    builders = {"sparsesam_jax": peers_jax.build, "transformers": peers_torch.build}
    return builders[job.peer](job)


def _serve(job: Job) -> None:
    # Libraries print to standard output too; the protocol keeps it for itself.
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(**answer: Any) -> None:
        protocol.write(json.dumps(answer) + "\n")
        protocol.flush()

    if hasattr(os, "sched_setaffinity"):  # XLA has as many threads as it sees processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    try:
        built = build(job)
    except ImportError as error:
        send(not_run=str(error))
        return
    result = built.call()
    np.save(job.output, built.features(result))
    del result
    for _ in range(job.warmups):
        built.call()
    measured = _reset_peak()
    send(compile_s=built.compile_s, notes=built.notes)
    for request in sys.stdin:
        if request.strip() == "run":
            send(ms=time_ms(built.call))
        else:
            send(peak_mib=_peak_mib() if measured else None)


def _reset_peak() -> bool:
    """Forget the peak of loading and compiling; whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(Job(**json.loads(sys.argv[1])))
