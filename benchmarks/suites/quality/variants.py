"""What a quality run measures, by name, and lists of it as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.suites.quality import simulated
from sparsesam_jax import Sam, methods
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.methods.group_update import GroupUpdate
from sparsesam_jax.sparsity.work import encoder_work


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
        if method is not None:
            if group_update is not None:
                raise ValueError("group_update must come with a sparsity, got none")
            return cls(str(name), method=(str(method[0]), float(method[1])))
        return cls(str(name), Sparsity(**(sparsity or {})), group_update=group_update)

    @property
    def definition(self) -> dict[str, Any]:
        """All but the name, as JSON has it."""
        return {
            "sparsity": None if self.sparsity is None else dataclasses.asdict(self.sparsity),
            "method": None if self.method is None else list(self.method),
            "group_update": self.group_update,
        }

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
        if self.method is not None:
            return methods.apply(sam, *self.method)
        grouped = self._grouped
        if grouped is not None:
            return grouped.apply(sam)
        return sam.with_sparsity(self.sparsity)

    def gmacs(self, config: ImageEncoderConfig) -> float:
        """Computed work of one image, in 10^9 multiply-accumulates."""
        if self.method is not None:
            return methods.work(config, *self.method).total / 1e9
        grouped = self._grouped
        work = encoder_work(config, self.sparsity) if grouped is None else grouped.work(config)
        return work.total / 1e9

    def masked(self, sam: Sam) -> Sam:
        """The same, by a program that it shares with all that rank alike, if there is one.

        There is none for a method that is no sparsity, nor for an order that depends on density.
        """
        sparsity = self.kept
        if sparsity is None or sparsity.ranking == "spread":
            return self.model(sam)
        return simulated.masked(sam, sparsity, self._grouped)

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
    variants = [variant for path in paths for variant in _read(path)]
    names = [DENSE.name, *(variant.name for variant in variants)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        files = ", ".join(map(str, paths))
        raise ValueError(f"{files} must give every variant a name of its own, got {twice} twice")
    return variants


def _read(path: Path) -> list[Variant]:
    expected = f'{path} must be a JSON list of {{"name": ..., "sparsity": {{...}}}}'
    variants, told = [], ""
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            told = f", {entry['name']}"
            variants.append(Variant.of(**entry))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{expected}{told}: {error}") from error
    return variants


def write(variants: Sequence[Variant], path: Path) -> None:
    """Write variants as `read` reads them."""
    entries = [json.dumps({"name": v.name, **v.definition}) for v in variants]
    path.write_text("[\n" + ",\n".join(entries) + "\n]\n", encoding="utf-8")
