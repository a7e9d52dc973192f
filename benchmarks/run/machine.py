"""What a GPU suite runs on: the device, its driver and clocks, and a child's environment."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.records import ROOT

_CLOCKS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "watts": "power.draw",
}


def gpu_state() -> dict[str, Any]:
    """Driver, and clocks and power at this moment; None without an NVIDIA GPU."""
    query = ",".join(["driver_version", *_CLOCKS.values()])
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]:
        command.append(f"--id={visible}")
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        driver, *values = [x.strip() for x in found.stdout.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {"driver": None, "clocks": None}
    clocks: dict[str, float | None] = dict.fromkeys(_CLOCKS)
    for name, text in zip(_CLOCKS, values, strict=True):
        with contextlib.suppress(ValueError):  # what nvidia-smi does not know
            clocks[name] = float(text)
    return {"driver": driver, "clocks": clocks}


def jax_environment(*, timed: bool = True) -> dict[str, str]:
    """For a process that runs JAX beside others on the same GPU.

    Of what is not timed, such as a float32 reference, XLA tries no kernels.
    """
    found = _environment() | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if timed or shutil.which("nvidia-smi") is None:
        return found
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    return found | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}


def torch_environment() -> dict[str, str]:
    """For a process that runs PyTorch; JAX is there for names and shapes only."""
    # Spinning OpenMP threads make PyTorch tens of times slower once anything else runs.
    defaults = {"TORCHINDUCTOR_COMPILE_THREADS": "8", "OMP_WAIT_POLICY": "PASSIVE"}
    own = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return defaults | _environment() | own


def cpu_environment(threads: int, *, keep_memory: bool) -> dict[str, str]:
    """For a process that runs any framework on so many processors.

    Args:
        threads: Of OpenMP; `use_processors` is for the others.
        keep_memory: Whether glibc keeps freed memory instead of returning it to the system. Large
            buffers are then not mapped, faulted in and zeroed again in every run.
    """
    found = torch_environment() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    if keep_memory:
        found |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0"}
        found["MALLOC_TRIM_THRESHOLD_"] = str(1 << 40)
    return found


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path}


def use_processors(count: int) -> None:
    """Keep this process to so many processors: XLA has as many threads as it sees."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def reset_peak_memory() -> bool:
    """Give back what loading and compiling left, and forget their peak; whether the system can."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_mib() -> float:
    """Peak of this process's resident memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
