"""What must be set before jax starts."""

import os

# Mosaic GPU's interpreter runs a kernel's warpgroups as host threads that wait for each other: with
# as few threads as a small machine has processors, it hangs.
os.environ.setdefault("NPROC", "16")
