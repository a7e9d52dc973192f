"""What must be set before jax starts, how hypothesis draws, and what needs PyTorch."""

import importlib.metadata
import importlib.util
import os

from hypothesis import settings

# Mosaic GPU's interpreter runs a kernel's warpgroups as host threads that wait for each other: with
# as few threads as a small machine has processors, it hangs.
os.environ.setdefault("NPROC", "16")
# The tests' time is compilation, and XLA's lowest level of optimisation halves it. So do the older
# emitters of fused loops; XLA has dropped them since, and a flag that it does not know ends it.
flags = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

# The same examples on every run, and no test fails for the time that a compilation takes.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("project")

# What reads PyTorch's files or runs beside it is tested where it is: the extra `test` brings it.
needs_torch = [
    "benchmarks/test_benchmarks*",
    "checkpoints/*",
    "segment_anything/*",
    "test_readme*",
]
collect_ignore_glob = [] if importlib.util.find_spec("torch") else needs_torch
