"""What must be set before jax starts."""

import os

# Mosaic GPU's interpreter runs a kernel's warpgroups as host threads that wait for each other: with
# as few threads as a small machine has processors, it hangs.
os.environ.setdefault("NPROC", "16")
# The tests' time is compilation, and XLA's lowest level of optimisation halves it.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
