"""Training-free methods that make SAM's encoder cheaper, by name: SparseSAM and its rivals.

Each is a change of how the same blocks and weights are applied, in a module of its own, written in
plain JAX: their multiply-accumulates count here, their wall clock is no argument.
"""

from sparsesam_jax.methods.base import Method, MethodEncoder, with_method
from sparsesam_jax.methods.registry import NAMES, apply, as_sparsity, check, work

__all__ = [
    "NAMES",
    "Method",
    "MethodEncoder",
    "apply",
    "as_sparsity",
    "check",
    "with_method",
    "work",
]
