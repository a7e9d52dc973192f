"""The methods by name; a new one is a module and an entry here.

A method's module is imported when the method is asked for: the names alone need no JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.config import ImageEncoderConfig, Sparsity
    from sparsesam_jax.methods.base import Method
    from sparsesam_jax.sparsity.work import EncoderWork

# Name -> its module here, and what in it makes the method of a density.
METHODS: dict[str, tuple[str, str]] = {
    "sparsesam": ("sparsesam", "sparsesam"),
    "released": ("sparsesam", "released"),
    "random": ("sparsesam", "random_routing"),
    "tome": ("tome", "ToMe"),
    "pitome": ("pitome", "PiToMe"),
    "structsam": ("structsam", "StructSam"),
    "sparge": ("sparge", "SpargeAttention"),
    "pisa": ("pisa", "PiecewiseAttention"),
    "kmeans": ("kmeans", "KMeans"),
}
NAMES = tuple(METHODS)


def check_name(name: str) -> None:
    """Raise ValueError unless there is such a method."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(NAMES)}; got {name!r}")


def make(name: str, density: float) -> Method:
    """The method of a name at a density.

    Raises:
        ValueError: There is no such method, or the density lies outside (0, 1].
    """
    check_name(name)
    module, factory = METHODS[name]
    return getattr(importlib.import_module(f"sparsesam_jax.methods.{module}"), factory)(density)


def apply(sam: Sam, name: str, density: float) -> Sam:
    """A dense model with a method at a density; density 1 is the dense model.

    Raises:
        ValueError: As `make`.
    """
    method = make(name, density)
    return sam.with_sparsity(None) if density == 1 else method.apply(sam)


def work(config: ImageEncoderConfig, name: str, density: float) -> EncoderWork:
    """Multiply-accumulates of one image with a method at a density; arguments as `apply`."""
    from sparsesam_jax.sparsity.work import encoder_work

    method = make(name, density)
    return encoder_work(config) if density == 1 else method.work(config)


def as_sparsity(name: str, density: float) -> Sparsity | None:
    """The sparsity that a method is at a density below 1, if it is one."""
    method = make(name, density)
    return None if density == 1 else method.as_sparsity()
