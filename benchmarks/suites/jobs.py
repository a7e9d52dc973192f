"""What the jobs of all suites share."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import shapes
from benchmarks.peers import PEERS
from benchmarks.records import Record
from benchmarks.run import machine
from benchmarks.run.pool import Job, labels


def timed(
    suite: str,
    name: str,
    module: str,
    label: object,
    arguments: Record,
    known: Record,
    /,
    **fields: Any,
) -> Job:
    """A peer's case; `fields` are those of `Job`."""
    peer = PEERS[name]
    own = {"suite": suite, "peer": peer.package, "implementation": name, "median_ms": None}
    return Job(
        label=labels([label, name]),
        module=module,
        arguments=arguments | {"implementation": name},
        environment=machine.jax_environment() if peer.ours else machine.torch_environment(),
        known=own | known,
        **fields,
    )


def reference(suite: str, name: str, module: str, arguments: Record) -> Job:
    """A case in float32 by XLA, which others are compared with."""
    return Job(
        label=name,
        module=module,
        arguments=arguments,
        environment=machine.reference_environment(),
        known={"suite": suite, "peer": "reference"},
        name=name,
    )


DRAWN = {"weights": shapes.WEIGHTS_DISTRIBUTION, "pixels": shapes.PIXELS_DISTRIBUTION}
