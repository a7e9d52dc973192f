"""Which tensors of a checkpoint are the model's, whatever training code has wrapped around them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from sparsesam_jax.checkpoints.errors import ConversionError, few
from sparsesam_jax.checkpoints.rules import prefix_of

# The keys that lead from a file's outermost dict to the one that holds a tensor.
Entry = tuple[str, ...]

# What PyTorch's own wrappers of modules put into names, before them or within.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Constants of the preprocessing that some files carry along.
_CONSTANTS = ("pixel_mean", "pixel_std")


@dataclasses.dataclass(frozen=True)
class Unwrapped:
    """The tensors that are the model's.

    Attributes:
        names: Name as the format has it -> name in the file.
        duplicates: Names that several tensors of the file have once unwrapped.
        stripped: What stood around names.
        left_out: Entries and tensors that are none of the model's.
    """

    names: Mapping[str, str]
    duplicates: Sequence[str] = ()
    stripped: Sequence[str] = ()
    left_out: Sequence[str] = ()


def unwrap(entries: Mapping[Entry, Sequence[str]], beside: Sequence[Entry] = ()) -> Unwrapped:
    """Find the one prefix under which a file's names are those of parameters.

    A nested dict is a prefix like any other. In an entry that holds parameters every tensor must
    be one: what is none keeps its name, so that it is reported as unknown. Other entries (an
    optimizer's, another network's) are left out.

    Args:
        entries: Entry of the file -> full names of the tensors in it.
        beside: Keys that lead to what is no tensor.

    Raises:
        ConversionError: There are several such prefixes.
    """
    plain = {name: _without_wrappers(name) for names in entries.values() for name in names}
    prefixes = {name: prefix_of(text) for name, text in plain.items()}
    counts = Counter(prefix for prefix in prefixes.values() if prefix is not None)
    prefix = counts.most_common(1)[0][0] if counts else ""
    ours = [e for e, names in entries.items() if any(prefixes[name] == prefix for name in names)]
    ours = ours or [*entries]
    elsewhere = [(entry, name) for entry in entries if entry not in ours for name in entries[entry]]
    _check_rivals(counts, {prefixes[name] for _, name in elsewhere})

    names: dict[str, str] = {}
    left_out = {_outermost((*entry, name), ours): None for entry, name in elsewhere}
    left_out |= {_outermost(path, ours): None for path in beside}
    duplicates = []
    for name in (name for entry in ours for name in entries[entry]):
        text = plain[name].removeprefix(prefix)
        if text in _CONSTANTS:
            left_out[name] = None
        elif text in names:
            duplicates.append(text)
        else:
            names[text] = name
    fitting = {text: name for text, name in names.items() if prefixes[name] == prefix}
    return Unwrapped(names, duplicates, _stripped(fitting), [*left_out])


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _check_rivals(counts: Counter[str], elsewhere: set[str | None]) -> None:
    most = max(counts.values(), default=0)
    places = [p for p, count in counts.most_common() if count == most or p in elsewhere]
    if len(places) > 1:
        texts = (f"{counts[place]} under {place!r}" for place in places)
        raise ConversionError(
            f"parameters of SAM are in several places ({few(texts)}); save one state dict alone"
        )


def _outermost(path: Entry, ours: Sequence[Entry]) -> str:
    """The entry nearest to the file's outermost dict that leads here and to none of ours."""
    for length in range(1, len(path)):
        if all(entry[:length] != path[:length] for entry in ours):
            return ".".join(path[:length])
    return path[-1]


def _stripped(names: Mapping[str, str]) -> list[str]:
    """What is in the file's names and not in the format's."""
    found: dict[str, None] = {}
    for text, name in names.items():
        if name.endswith(text):
            found[name.removesuffix(text)] = None
        else:
            found |= dict.fromkeys(part for part in name.split(".") if part in _WRAPPERS)
    return [text for text in found if text]
