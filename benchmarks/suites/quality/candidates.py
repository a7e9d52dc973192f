"""Candidates for the default `Sparsity`, each with the computed work of the released preset.

Attention and MLP share one budget: what `Sparsity.released(r)` computes in all on the same encoder.
A candidate says how dense windowed attention and the routed MLP are and what a token receives that
the MLP skips; the density of global attention is whatever the budget leaves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suites.quality.variants import Variant
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.methods import NAMES
from sparsesam_jax.sparsity.work import encoder_work

_GLOBAL_STEPS = 64  # densities of global attention that are tried: whole key blocks at 1024 pixels


def candidates(config: ImageEncoderConfig, densities: Sequence[float]) -> list[Variant]:
    """All candidates, the most promising first."""
    found = []
    for make in (_split, _main, _details):
        for density in densities:
            found += list(make(config, density))
    return found


def compared(densities: Sequence[float]) -> list[Variant]:
    """Every method by name, SparseSAM and its rivals, at every density."""
    return [
        Variant(f"method {name} @{density:g}", method=(name, density))
        for density in densities
        for name in NAMES
    ]


def write(variants: Sequence[Variant], path: Path) -> None:
    """Write variants as `variants.read_variants` reads them."""
    entries = []
    for variant in variants:
        entry: dict[str, Any] = {"name": variant.name}
        if variant.sparsity is not None:
            entry["sparsity"] = _changed(variant.sparsity)
        if variant.method is not None:
            entry["method"] = list(variant.method)
        if variant.group_update is not None:
            entry["group_update"] = variant.group_update
        entries.append(json.dumps(entry))
    path.write_text("[\n" + ",\n".join(entries) + "\n]\n", encoding="utf-8")


def balanced(
    config: ImageEncoderConfig,
    r: float,
    name: str,
    *,
    windows: float = 0.4,
    mlp: float | Sequence[float] = 1.0,
    group_update: dict[str, Any] | None = None,
    **fields: Any,
) -> Variant:
    """The candidate with the densest global attention that keeps to the budget.

    Args:
        config: Shape of the encoder.
        r: The budget is what `Sparsity.released` computes at this density.
        name: What the candidate is called; the density is added.
        windows: Density of windowed attention.
        mlp: Density of the MLP, one for all blocks or one a block.
        group_update: As for `Variant`.
        **fields: Further fields of `Sparsity`.

    Raises:
        ValueError: The rest alone is over the budget.
    """
    budget = encoder_work(config, Sparsity.released(r)).total / 1e9

    def at(step: int) -> Variant:
        grid = step / _GLOBAL_STEPS
        attention = tuple(grid if config.is_global(i) else windows for i in range(config.depth))
        mlp_density = mlp if isinstance(mlp, int | float) else tuple(mlp)
        sparsity = Sparsity(r, attention_density=attention, mlp_density=mlp_density, **fields)
        return Variant(f"{name} @{r:g}", sparsity, group_update=group_update)

    steps = [step for step in range(1, _GLOBAL_STEPS + 1) if at(step).gmacs(config) <= budget]
    if not steps:
        raise ValueError(f"{name} must leave some of {budget:.2f} GMAC to global attention")
    return at(max(steps))


_UPDATES: dict[str, dict[str, Any] | None] = {
    "skip": None,
    "mean": {"skipped": "mean"},
    "mean all": {"skipped": "mean", "global_blocks": True},
}


def _main(config: ImageEncoderConfig, r: float) -> Iterator[Variant]:
    """How attention and MLP share the budget, and what skipped tokens receive."""
    yield Variant(f"released @{r:g}", Sparsity.released(r))
    yield balanced(config, r, "mlp dense")
    yield balanced(config, r, "mlp dense w192", windows=0.5)
    yield balanced(config, r, "mlp dense w64", windows=0.2)
    for mlp in (0.7, 0.85, 0.55):
        for name, update in _UPDATES.items():
            yield balanced(config, r, f"mlp {mlp:g} {name}", mlp=mlp, group_update=update)
    yield balanced(
        config, r, "mlp 0.7 mean all w192", mlp=0.7, windows=0.5, group_update=_UPDATES["mean all"]
    )


def _details(config: ImageEncoderConfig, r: float) -> Iterator[Variant]:
    """One ingredient changed at a time, around a middling allocation."""
    fields: dict[str, dict[str, Any]] = {
        "dispersion keys": {"importance": "dispersion"},
        "per head": {"importance": "dispersion", "per_head": True},
        "sobel input": {"features": "input"},
        "block ranking": {"ranking": "block"},
        "unranked": {"ranking": "none"},
    }
    for name, changed in fields.items():
        yield balanced(
            config, r, f"mlp 0.7 mean {name}", mlp=0.7, group_update=_UPDATES["mean"], **changed
        )
    for name in ("sobel input", "block ranking", "per head"):
        yield balanced(config, r, f"mlp dense {name}", **fields[name])
    update = {"skipped": "first", "global_blocks": True}
    yield balanced(config, r, "mlp 0.7 first all", mlp=0.7, group_update=update)
    late = [round(0.5 + 0.4 * i / (config.depth - 1), 4) for i in range(config.depth)]
    for name, mlp in (("late", late), ("early", late[::-1])):
        yield balanced(
            config, r, f"mlp 0.7 mean all {name}", mlp=mlp, group_update=_UPDATES["mean all"]
        )


def _split(config: ImageEncoderConfig, r: float) -> Iterator[Variant]:
    """The default's own split of the budget, which keeps windows dense, and its ingredients."""
    fields: dict[str, dict[str, Any]] = {
        "": {},
        " spread": {"ranking": "spread"},
        " unranked": {"ranking": "none"},
        " block ranking": {"ranking": "block"},
        " sobel input": {"features": "input"},
        " dispersion": {"importance": "dispersion"},
        " per head": {"importance": "dispersion", "per_head": True},
        " equal": {"split": "equal"},
        " equal spread": {"split": "equal", "ranking": "spread"},
    }
    for name, changed in fields.items():
        yield Variant(f"balanced{name} @{r:g}", Sparsity(r, **changed))
    yield Variant(f"balanced mean @{r:g}", Sparsity(r), group_update=_UPDATES["mean"])


def _changed(sparsity: Sparsity) -> dict[str, Any]:
    """The fields that differ from the defaults."""
    defaults = dataclasses.asdict(Sparsity(1.0)) | {"density": None}
    return {k: v for k, v in dataclasses.asdict(sparsity).items() if v != defaults[k]}
