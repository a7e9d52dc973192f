"""Results on disk, one a line or more: a file that a killed run leaves usable, and resumes."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from sparsesam_jax.checkpoints.atomic import atomic_path

Result = TypeVar("Result")


class ResultsFile(abc.ABC, Generic[Result]):
    """The results that are found so far, in memory and on disk, in the order of their finding.

    Args:
        path: The file.
        resume: Whether to keep what it holds. A last line that was cut is dropped.

    Attributes:
        path: The file.
        found: The results by their keys.

    Raises:
        ValueError: The file holds something else.
    """

    header = ""  # the file's first line

    def __init__(self, path: Path, *, resume: bool):
        self.path = path
        self.found: dict[Hashable, Result] = {}
        if resume and path.exists():
            text = path.read_text("utf-8")
            self.found = {self.key(x): x for x in self.read(text[: text.rfind("\n") + 1])}
        with atomic_path(path) as temporary:
            text = self.header + "".join(map(self.line, self.found.values()))
            temporary.write_text(text, "utf-8")

    def append(self, results: Iterable[Result]) -> None:
        """Add results in one write; those that are there already stay as they are."""
        new = {self.key(x): x for x in results if self.key(x) not in self.found}
        self.found |= new
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write("".join(map(self.line, new.values())))

    @abc.abstractmethod
    def key(self, result: Result) -> Hashable:
        """What tells results of one run apart."""

    @abc.abstractmethod
    def line(self, result: Result) -> str:
        """A result as the file has it, its line break included."""

    @abc.abstractmethod
    def read(self, text: str) -> Iterable[Result]:
        """The results in a file's whole lines.

        Raises:
            ValueError: The text holds something else; the message names the line.
        """
