"""Sparsities by name, and lists of them: what a sweep of `quality` goes through."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from sparsesam_jax.config import ImageEncoderConfig, Sparsity

if TYPE_CHECKING:
    from benchmarks.suites.quality import simulated
    from sparsesam_jax import Sam


class Variant(NamedTuple):
    """What is measured and what the results call it.

    Attributes:
        name: Its name.
        sparsity: What is kept; None is dense, or whatever `method` says.
        method: Another method than SparseSAM, and its density.
        group_update: Fields of `methods.group_update.GroupUpdate` beside its sparsity; None leaves
            skipped tokens unchanged.
    """

    name: str
    sparsity: Sparsity | None = None
    method: tuple[str, float] | None = None
    group_update: dict[str, Any] | None = None

    @property
    def density(self) -> float | tuple[float, ...]:
        """The density that was asked for; 1 for dense."""
        if self.sparsity is not None:
            return self.sparsity.density
        return 1.0 if self.method is None else self.method[1]

    @property
    def definition(self) -> dict[str, Any]:
        """All but the name, as JSON has it."""
        return {
            "sparsity": None if self.sparsity is None else dataclasses.asdict(self.sparsity),
            "method": None if self.method is None else list(self.method),
            "group_update": self.group_update,
        }

    def model(self, sam: Sam) -> Sam:
        """The dense model with the variant."""
        from sparsesam_jax import methods

        if self.method is not None:
            return methods.apply(sam, *self.method)
        if self.group_update is not None:
            return methods.with_method(sam, self._grouped())
        return sam.with_sparsity(self.sparsity)

    def gmacs(self, config: ImageEncoderConfig) -> float:
        """Computed work of one image, in 10^9 multiply-accumulates."""
        from sparsesam_jax import methods
        from sparsesam_jax.sparsity.work import encoder_work

        if self.method is not None:
            work = methods.work(config, *self.method)
        elif self.group_update is not None:
            work = self._grouped().work(config)
        else:
            work = encoder_work(config, self.sparsity)
        return work.total / 1e9

    @property
    def program(self) -> simulated.Program | None:
        """What its sparsity shares with others in a sweep; None where nothing is shared."""
        from benchmarks.suites.quality import simulated

        sparsity = self._kept()
        update = None if self.group_update is None else self._grouped()
        if sparsity is None or sparsity.ranking == "spread":  # whose order depends on the density
            return None
        return simulated.program(sparsity, update)

    def knobs(self, config: ImageEncoderConfig) -> simulated.Knobs:
        """What its sparsity keeps, for its `program`."""
        from benchmarks.suites.quality import simulated

        sparsity = self._kept()
        assert sparsity is not None
        update = None if self.group_update is None else self._grouped()
        return simulated.knobs(config, sparsity, update)

    def _kept(self) -> Sparsity | None:
        """The sparsity, also of a method that is one."""
        from sparsesam_jax import methods

        return self.sparsity if self.method is None else methods.as_sparsity(*self.method)

    def _grouped(self) -> Any:
        from sparsesam_jax.methods.group_update import GroupUpdate

        assert self.sparsity is not None
        return GroupUpdate(1.0, sparsity=self.sparsity, **(self.group_update or {}))


DENSE = Variant("dense")


def recorded_sparsity(fields: dict[str, Any]) -> Sparsity:
    """The sparsity that a result names; before there was a choice, all had an equal split."""
    equal: dict[str, Any] = {"split": "equal"}
    return Sparsity(**(equal | fields))


PRESETS: dict[str, tuple[str, Callable[[float], Sparsity]]] = {
    "default": ("Sparsity(r)", Sparsity),
    "sobel-keys": (
        "paper, Eq. 1, on the keys, shared by the heads",
        lambda r: Sparsity(r, split="equal"),
    ),
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
        lambda r: Sparsity(r, split="equal", importance="sobel", features="input"),
    ),
    "dispersion-input": (
        "dispersion of the block's input",
        lambda r: Sparsity(r, split="equal", importance="dispersion", features="input"),
    ),
    "dispersion-keys": (
        "dispersion of the keys, shared by the heads",
        lambda r: Sparsity(r, split="equal", importance="dispersion", features="keys"),
    ),
    "block-ranked": (
        "dispersion of the keys ranks whole key blocks",
        lambda r: Sparsity(
            r, split="equal", importance="dispersion", features="keys", ranking="block"
        ),
    ),
    "unranked": (
        "attention unranked, routing by dispersion of the keys, per head",
        lambda r: dataclasses.replace(Sparsity.released(r), ranking="none"),
    ),
    "random": (
        "attention unranked, random routing",
        lambda r: Sparsity(r, split="equal", importance="random", ranking="none"),
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


def read_variants(*paths: Path) -> list[Variant]:
    """Variants from JSON lists, one after the other.

    An entry is `{"name": ..., "sparsity": {fields of Sparsity}}`, to which `"group_update": {fields
    of GroupUpdate}` may be added, or `{"name": ..., "method": [name, density]}`.

    Raises:
        ValueError: A file is no such list, or two entries share a name.
        OSError: A file cannot be read.
    """
    variants = [variant for path in paths for variant in _read(path)]
    names = [DENSE.name, *(variant.name for variant in variants)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        files = ", ".join(map(str, paths))
        raise ValueError(f"{files} must give every variant a name of its own, got {twice} twice")
    return variants


def _read(path: Path) -> list[Variant]:
    expected = f'{path} must be a JSON list of {{"name": ..., "sparsity": {{...}}}}'
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        named = [(str(entry["name"]), {**entry}) for entry in entries]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{expected}: {error!r}") from error
    variants = []
    for name, fields in named:
        if {"sparsity", "method"} <= fields.keys() or not {"sparsity", "method"} & fields.keys():
            raise ValueError(f"{expected} or of method instead of sparsity, {name} is neither")
        try:
            variants.append(_variant(**fields))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, {name}: {error}") from error
    return variants


def _variant(
    *,
    name: str,
    sparsity: dict[str, Any] | None = None,
    method: Sequence[Any] | None = None,
    group_update: dict[str, Any] | None = None,
) -> Variant:
    if group_update is not None and sparsity is None:
        raise ValueError("group_update must come with a sparsity, got none")
    return Variant(
        name,
        None if sparsity is None else Sparsity(**sparsity),
        None if method is None else (str(method[0]), float(method[1])),
        group_update,
    )


def preset_table() -> Table:
    """The presets and what they mean."""
    table = Table("preset", "at density r")
    for name, (meaning, _) in PRESETS.items():
        table.add_row(name, meaning)
    return table
