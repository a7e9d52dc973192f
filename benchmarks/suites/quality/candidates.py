"""Sparsities by name (`named.toml`): presets, the default with a change, and candidates for it.

Candidates have the computed work of the released preset. Attention and MLP share that budget: a
candidate says how dense windowed attention and the routed MLP are and what a token receives that
the MLP skips; the density of global attention is whatever the budget leaves.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from benchmarks.suites.quality.variants import Variant
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.methods import NAMES
from sparsesam_jax.sparsity.work import encoder_work

_GLOBAL_STEPS = 64  # densities of global attention that are tried: whole key blocks at 1024 pixels
_BASES: dict[str, Callable[[float], Sparsity]] = {
    "default": Sparsity,
    "equal": partial(Sparsity, split="equal"),
    "released": Sparsity.released,
}


class Named(NamedTuple):
    """A sparsity at any density: what it means, and fields of `base` that are others."""

    meaning: str
    base: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, meaning: str, base: str = "default", **fields: Any) -> Named:
        """That of an entry of the file."""
        return cls(meaning, base, fields)

    def at(self, density: float, **fields: Any) -> Sparsity:
        """The sparsity at a density, with still other fields."""
        return dataclasses.replace(_BASES[self.base](density), **self.fields, **fields)


_FILE = tomllib.loads((Path(__file__).parent / "named.toml").read_text(encoding="utf-8"))
PRESETS = {name: Named.of(**entry) for name, entry in _FILE["presets"].items()}
CHANGES = {name: Named.of(**entry) for name, entry in _FILE["changes"].items()}
REFERENCE = {(name, float(r)): x for name, by in _FILE["reference"].items() for r, x in by.items()}


def presets(names: Sequence[str], densities: Sequence[float]) -> list[Variant]:
    """Every preset at every density.

    Raises:
        ValueError: There is no such preset, or a density lies outside (0, 1].
    """
    for name in names:
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return [Variant(f"{name}@{r:g}", PRESETS[name].at(r)) for name in names for r in densities]


def preset_table() -> Table:
    """The presets and what they mean."""
    table = Table("preset", "at density r")
    for name, preset in PRESETS.items():
        table.add_row(name, preset.meaning)
    return table


def compared(densities: Sequence[float]) -> list[Variant]:
    """Every method by name, SparseSAM and its rivals, at every density."""
    return [Variant(f"method {n} @{r:g}", method=(n, r)) for r in densities for n in NAMES]


def candidates(config: ImageEncoderConfig, densities: Sequence[float]) -> list[Variant]:
    """All candidates at all densities, the most promising first."""
    named = _FILE["candidates"].items()
    return [_candidate(config, r, name, **entry) for name, entry in named for r in densities]


def _candidate(
    config: ImageEncoderConfig,
    r: float,
    name: str,
    *,
    preset: str | None = None,
    change: str = "nothing",
    update: dict[str, Any] | None = None,
    mlp: float | Sequence[float] | None = None,
    windows: float = 0.4,
    **fields: Any,
) -> Variant:
    """The candidate of an entry: with `mlp`, global attention as dense as the budget allows.

    Raises:
        ValueError: The rest alone is over the budget.
    """
    named = CHANGES[change] if preset is None else PRESETS[preset]
    make = partial(Variant, f"{name} @{r:g}", group_update=update)
    if mlp is None:
        return make(sparsity=named.at(r, **fields))
    budget = encoder_work(config, Sparsity.released(r)).total / 1e9
    if isinstance(mlp, Sequence):
        mlp = tuple(np.linspace(mlp[0], mlp[-1], config.depth).round(4).tolist())
    for step in range(_GLOBAL_STEPS, 0, -1):
        grid = step / _GLOBAL_STEPS
        attention = tuple(grid if config.is_global(i) else windows for i in range(config.depth))
        found = make(sparsity=named.at(r, attention_density=attention, mlp_density=mlp, **fields))
        if found.gmacs(config) <= budget:
            return found
    raise ValueError(f"{name} must leave some of {budget:.2f} GMAC to global attention")
