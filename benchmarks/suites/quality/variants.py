"""What a quality run measures, by name: from lists as JSON, and from those of `named.toml`.

Candidates have the computed work of the released preset. Attention and MLP share that budget: a
candidate says how dense windowed attention and the routed MLP are and what a token receives that
the MLP skips; the density of global attention is whatever the budget leaves.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.suites.quality import simulated
from sparsesam_jax import Sam, methods
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.evaluation.candidates import Candidate
from sparsesam_jax.methods.group_update import GroupUpdate
from sparsesam_jax.sparsity.work import encoder_work

_GLOBAL_STEPS = 64  # densities of global attention that are tried: whole key blocks at 1024 pixels
_BASES: dict[str, Callable[[float], Sparsity]] = {
    "default": Sparsity,
    "equal": partial(Sparsity, split="equal"),
    "released": Sparsity.released,
}


@dataclasses.dataclass(frozen=True)
class Variant:
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

    @classmethod
    def of(
        cls,
        name: str,
        sparsity: dict[str, Any] | None = None,
        method: Sequence[Any] | None = None,
        group_update: dict[str, Any] | None = None,
    ) -> Variant:
        """The variant of a JSON entry.

        Raises:
            ValueError: It is of no sparsity and no method, or of both, or one of them is refused.
        """
        if (sparsity is None) == (method is None):
            raise ValueError("a variant must be of a sparsity or of a method")
        if method is not None and group_update is not None:
            raise ValueError("group_update must come with a sparsity, got none")
        kept = None if sparsity is None else Sparsity(**sparsity)
        named = None if method is None else (str(method[0]), float(method[1]))
        return cls(str(name), kept, named, group_update)

    @property
    def definition(self) -> dict[str, Any]:
        """All but the name, as JSON has it."""
        return {name: x for name, x in dataclasses.asdict(self).items() if name != "name"}

    @property
    def density(self) -> float | tuple[float, ...]:
        """The density that was asked for; 1 for dense."""
        if self.sparsity is not None:
            return self.sparsity.density
        return 1.0 if self.method is None else self.method[1]

    @property
    def kept(self) -> Sparsity | None:
        """The sparsity, also of a method that is one."""
        return self.sparsity if self.method is None else methods.as_sparsity(*self.method)

    def model(self, sam: Sam) -> Sam:
        """The dense model with the variant."""
        return self._candidate.model(sam) if self._grouped is None else self._grouped.apply(sam)

    def gmacs(self, config: ImageEncoderConfig) -> float:
        """Computed work of one image, in 10^9 multiply-accumulates."""
        if self._grouped is not None:
            return self._grouped.work(config).total / 1e9
        return self._candidate.gmacs(config)

    def masked(self, sam: Sam) -> Sam:
        """The same, by a program that it shares with all that rank alike, if there is one.

        There is none for a method that is no sparsity, nor for an order that depends on density.
        """
        sparsity = self.kept
        if sparsity is None or sparsity.ranking == "spread":
            return self.model(sam)
        return simulated.masked(sam, sparsity, self._grouped)

    @property
    def _candidate(self) -> Candidate:
        return Candidate(*(self.method or ("dense", 1.0)), self.sparsity)

    @property
    def _grouped(self) -> GroupUpdate | None:
        if self.group_update is None or self.sparsity is None:
            return None
        return GroupUpdate(1.0, sparsity=self.sparsity, **self.group_update)


DENSE = Variant("dense")


def recorded(record: Mapping[str, Any]) -> Variant:
    """The variant that a summary is about.

    Older records name no split, because all had an equal one, and perhaps no method.
    """
    name, sparsity, method = record["variant"], record["sparsity"], record.get("method")
    if sparsity is None and method is None:
        return Variant(name)
    if sparsity is not None:
        sparsity = {"split": "equal", **sparsity}
    return Variant.of(name, sparsity, method, record.get("group_update"))


def read(*paths: Path) -> list[Variant]:
    """Variants from JSON lists, one after the other.

    An entry is `{"name": ..., "sparsity": {fields of Sparsity}}`, to which `"group_update": {fields
    of GroupUpdate}` may be added, or `{"name": ..., "method": [name, density]}`.

    Raises:
        ValueError: A file is no such list, or two entries share a name.
        OSError: A file cannot be read.
    """
    variants, told = [DENSE], ""
    for path in paths:
        try:
            for entry in json.loads(path.read_text(encoding="utf-8")):
                told = f", {entry['name']}"
                variants.append(Variant.of(**entry))
        except (KeyError, TypeError, ValueError) as error:
            expected = '{"name": ..., "sparsity": {...}}'
            raise ValueError(f"{path} must be a JSON list of {expected}{told}: {error}") from error
    names = [variant.name for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        files = ", ".join(map(str, paths))
        raise ValueError(f"{files} must give every variant a name of its own, got {twice} twice")
    return variants[1:]


def write(variants: Sequence[Variant], path: Path) -> None:
    """Write variants as `read` reads them."""
    entries = [json.dumps({"name": v.name, **v.definition}) for v in variants]
    path.write_text("[\n" + ",\n".join(entries) + "\n]\n", encoding="utf-8")


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


def compared(densities: Sequence[float]) -> list[Variant]:
    """Every method by name, SparseSAM and its rivals, at every density."""
    names = methods.NAMES
    return [Variant(f"method {n} @{r:g}", method=(n, r)) for r in densities for n in names]


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
