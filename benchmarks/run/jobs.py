"""One case of a suite: what its process builds, what that must agree with, what its record says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers import PEERS
from benchmarks.records import Record
from benchmarks.run import machine


class NotRunError(Exception):
    """A case cannot run here; the message says why."""


class Program(NamedTuple):
    """What a job builds in its process.

    Attributes:
        output: What is compared with the reference, float32; None compares nothing.
        measure: Times, and returns what goes into the record; None for references. What it returns
            as `several` is a record each.
        notes: What the record says even where the case is not timed.
    """

    output: np.ndarray | None
    measure: Callable[[], Record] | None
    notes: Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One case; suites say what is built and what follows from it. A process gets the job itself.

    Attributes:
        suite: Whose case it is.
        what: The case; its text is the label and, of a reference, what others call its output.
        options: The suite's.
        implementation: A name of `peers.PEERS`; None is a reference, in float32 by XLA.
        fields: What the record says of the case, whatever happens.
        reference: Whose output it must agree with.
        max_error: The largest `max_error` that is no mistake; None takes any number.
        seconds: Of its timed runs, at most: a kernel that hangs must not keep the GPU.
    """

    suite: str
    what: Any
    options: Any
    implementation: str | None
    fields: Record = dataclasses.field(default_factory=dict)
    reference: str | None = None
    max_error: float | None = 0.0
    seconds: float = 120

    @property
    def label(self) -> str:
        """What it is called on the screen."""
        return labels([self.what, self.implementation])

    @property
    def name(self) -> str | None:
        """What other cases call its output, as their reference."""
        return str(self.what) if self.implementation is None else None

    @property
    def environment(self) -> dict[str, str]:
        """That of the process."""
        if self.implementation is None:
            return machine.jax_environment(timed=False)
        ours = PEERS[self.implementation].ours
        return machine.jax_environment() if ours else machine.torch_environment()

    @property
    def known(self) -> Record:
        """What the record holds whatever happens."""
        peer = PEERS[self.implementation].package if self.implementation else "reference"
        own = {"suite": self.suite, "peer": peer, "implementation": self.implementation}
        return own | {"median_ms": None} | self.fields

    def build(self) -> Program:
        """The case's program, compiled and run once."""
        raise NotImplementedError

    def errors(self, got: np.ndarray, want: np.ndarray) -> Record:
        """What the record says of an output beside the reference's."""
        return {"max_error": relative_error(got, want)}

    def finish(self, record: Record, found: Sequence[Record]) -> None:
        """Add to the record of a timed case what follows from it and from those `found` before."""


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want|, Frobenius; infinite where the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def labels(values: Iterable[object]) -> str:
    """A case's label: what there is, by spaces."""
    return " ".join(str(value) for value in values if value not in (None, ""))
