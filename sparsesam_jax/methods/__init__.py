"""Training-free methods that make SAM's encoder cheaper, by name: SparseSAM and its rivals.

Each is a change of how the same blocks and weights are applied, in a module of its own. The rivals
are written in plain JAX: their multiply-accumulates count here, their wall clock is no argument.
"""

from typing import TYPE_CHECKING

import lazy_loader

from sparsesam_jax.methods.registry import NAMES, apply, as_sparsity, check_name, make, work

if TYPE_CHECKING:
    from sparsesam_jax.methods.base import BlockMethod, Method, MethodEncoder

__all__ = [
    "NAMES",
    "BlockMethod",
    "Method",
    "MethodEncoder",
    "apply",
    "as_sparsity",
    "check_name",
    "make",
    "work",
]

# Imported when first asked for: a command line offers the names without JAX.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__, submod_attrs={"base": ["BlockMethod", "Method", "MethodEncoder"]}
)
