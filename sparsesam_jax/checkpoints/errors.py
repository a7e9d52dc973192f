"""What conversion raises on bad input, and how its one-line messages are put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

CONFIG_HINT = "give the model's configuration (config, or --config of `sparsesam convert`)"

_SHOWN = 5


class ConversionError(ValueError):
    """A checkpoint cannot be read or converted; the message is one line, nothing was written."""


def one_line(error: BaseException) -> str:
    """Another library's message without its line breaks."""
    return " ".join(str(error).split())


def few(texts: Iterable[str]) -> str:
    """The first few and how many more there are: "a, b, c, d, e and 309 more"."""
    texts = [*texts]
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def list_problems(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """One text for each kind of problem that occurs: "2 missing (a, b)"."""
    return [f"{len(what)} {kind} ({few(what)})" for kind, what in problems.items() if what]
