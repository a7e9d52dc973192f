"""What a user may choose of the kernels, by name. Imports no JAX, so that a command starts fast."""

from typing import Literal

# Which program runs a function; `pallas_kernels.implementation` has the rule.
Implementation = Literal["auto", "xla", "mosaic_gpu"]
