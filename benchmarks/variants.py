"""Sparsities by name, and lists of them: what a sweep of `quality` goes through."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from sparsesam_jax.config import Sparsity


class Variant(NamedTuple):
    """A sparsity and what the results call it; None is dense."""

    name: str
    sparsity: Sparsity | None


DENSE = Variant("dense", None)

PRESETS: dict[str, tuple[str, Callable[[float], Sparsity]]] = {
    "default": ("Sparsity(r)", Sparsity),
    "released": ("Sparsity.released(r): dispersion of the keys, per head", Sparsity.released),
    "attention-only": (
        "released, MLP on all tokens",
        lambda r: dataclasses.replace(Sparsity.released(r), mlp_density=1.0),
    ),
    "mlp-only": (
        "released, dense attention",
        lambda r: dataclasses.replace(Sparsity.released(r), attention_density=1.0),
    ),
    "sobel-input": (
        "paper, Eq. 1, on the block's input",
        lambda r: Sparsity(r, importance="sobel", features="input"),
    ),
    "dispersion-input": (
        "dispersion of the block's input",
        lambda r: Sparsity(r, importance="dispersion", features="input"),
    ),
    "dispersion-keys": (
        "dispersion of the keys, shared by the heads",
        lambda r: Sparsity(r, importance="dispersion", features="keys"),
    ),
    "block-ranked": (
        "dispersion of the keys ranks whole key blocks",
        lambda r: Sparsity(r, importance="dispersion", features="keys", ranking="block"),
    ),
    "unranked": (
        "attention unranked, routing by dispersion of the keys, per head",
        lambda r: dataclasses.replace(Sparsity.released(r), ranking="none"),
    ),
    "random": (
        "attention unranked, random routing",
        lambda r: Sparsity(r, importance="random", ranking="none"),
    ),
    "hilbert": (
        "released, along the Hilbert curve",
        lambda r: dataclasses.replace(Sparsity.released(r), curve="hilbert"),
    ),
    "contiguous": (
        "released, groups kept together",
        lambda r: dataclasses.replace(Sparsity.released(r), layout="contiguous"),
    ),
}


def preset_variants(presets: Sequence[str], densities: Sequence[float]) -> list[Variant]:
    """Every preset at every density.

    Raises:
        ValueError: There is no such preset, or a density lies outside (0, 1].
    """
    variants = []
    for preset in presets:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        _, sparsity = PRESETS[preset]
        variants += [Variant(f"{preset}@{density:g}", sparsity(density)) for density in densities]
    return variants


def read_variants(path: Path) -> list[Variant]:
    """Variants from a JSON list of `{"name": ..., "sparsity": {fields of Sparsity}}`.

    Raises:
        ValueError: The file is no such list, or two entries share a name.
        OSError: The file cannot be read.
    """
    expected = f'{path} must be a JSON list of {{"name": ..., "sparsity": {{...}}}}'
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(entry["name"], entry["sparsity"]) for entry in entries]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{expected}: {error!r}") from error
    variants = []
    for name, fields in pairs:
        try:
            variants.append(Variant(str(name), Sparsity(**fields)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, {name}: {error}") from error
    names = [DENSE.name, *(variant.name for variant in variants)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} must give every variant a name of its own, got {twice} twice")
    return variants


def preset_table() -> Table:
    """The presets and what they mean."""
    table = Table("preset", "at density r")
    for name, (meaning, _) in PRESETS.items():
        table.add_row(name, meaning)
    return table
