"""The methods by name. A method's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.methods.base import Method, with_method
from sparsesam_jax.sparsity.work import EncoderWork, encoder_work

_SPARSITIES: dict[str, Any] = {
    "sparsesam": Sparsity,
    "released": Sparsity.released,
    "random": lambda r: Sparsity(r, split="equal", importance="random", ranking="none"),
}
_CLASSES = {
    "tome": ("tome", "ToMe"),
    "pitome": ("pitome", "PiToMe"),
    "structsam": ("structsam", "StructSam"),
    "sparge": ("sparge", "SpargeAttention"),
    "pisa": ("pisa", "PiecewiseAttention"),
    "kmeans": ("kmeans", "KMeans"),
}

NAMES = (*_SPARSITIES, *_CLASSES)


def apply(sam: Sam, name: str, density: float) -> Sam:
    """A dense model with a method at a density; density 1 is the dense model.

    Raises:
        ValueError: There is no such method, or the density lies outside (0, 1].
    """
    made = _make(name, density)
    if density == 1:
        return sam.with_sparsity(None)
    return sam.with_sparsity(made) if isinstance(made, Sparsity) else with_method(sam, made)


def work(config: ImageEncoderConfig, name: str, density: float) -> EncoderWork:
    """Multiply-accumulates of one image with a method at a density; arguments as `apply`."""
    made = _make(name, density)
    if density == 1:
        return encoder_work(config)
    return encoder_work(config, made) if isinstance(made, Sparsity) else made.work(config)


def as_sparsity(name: str, density: float) -> Sparsity | None:
    """The sparsity that a method is at a density below 1, if it is one."""
    made = _make(name, density)
    return made if isinstance(made, Sparsity) and density < 1 else None


def check(name: str, density: float) -> None:
    """Raise ValueError unless there is such a method and it takes the density."""
    _make(name, density)


def _make(name: str, density: float) -> Sparsity | Method:
    if name in _SPARSITIES:
        return _SPARSITIES[name](density)
    if name not in _CLASSES:
        raise ValueError(f"method must be one of {', '.join(NAMES)}; got {name!r}")
    module, cls = _CLASSES[name]
    return getattr(importlib.import_module(f"sparsesam_jax.methods.{module}"), cls)(density)
