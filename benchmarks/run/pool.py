"""Cases in processes of their own: some compile side by side, then one at a time is timed.

A round starts as many processes as may compile at a time and waits until all of them are ready:
compiled, warmed up, and their output there. Then the outputs are compared with the references',
and what agrees is timed, one process after the other, while no other one works (`process`).
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks import records
from benchmarks.records import Record, Write
from benchmarks.run import machine
from benchmarks.run.jobs import Job, labels
from benchmarks.run.options import SuiteOptions
from benchmarks.run.process import Child
from benchmarks.run.timing import Spread

SECONDS_LATE = 40  # that what has compiled within the limit still has to be timed
_TOLD = {
    "median_ms": "{median_ms:.3f} ms ({q1_ms:.3f}-{q3_ms:.3f})",
    "kernel_median_ms": "kernel {kernel_median_ms:.4f} ms",
    "tflops": "{tflops:.1f} TFLOP/s",
    "tbs": "{tbs:.2f} TB/s",
    "share_of_ceiling": "{share_of_ceiling:.0%} of the ceiling",
    "peak_mib": "peak {peak_mib:.0f} MiB",
}


@dataclasses.dataclass
class Outcome:
    """What became of the cases: finished records, and whether all went well."""

    results: list[Record] = dataclasses.field(default_factory=list)
    interrupted: bool = False
    failed: bool = False

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 1 if a case failed, was wrong or came too late, else 0."""
        return 130 if self.interrupted else int(self.failed)


class Pool:
    """Where processes come from: a new one a case, or, kept, one that has ended its case before.

    Args:
        keep: Whether processes are used again: no memory is told apart then, but imports are saved.
        fast: Whether XLA compiles quickly instead of well.
    """

    def __init__(self, *, keep: bool = False, fast: bool = False):
        self._keep, self._fast = keep, fast
        self._idle: list[Child] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._idle:
            child.close()

    def run(self, jobs: Sequence[Job], options: SuiteOptions, write: Write) -> Outcome:
        """Check and time the cases in order; every record is written as soon as it is there.

        Where the options say that cases take turns, they compile one after the other, all processes
        stay, and each is timed once in each of `options.runs` rounds.

        Args:
            jobs: The cases; references before what is compared with them.
            options: How many at a time, how long, and the tree's commit.
            write: Takes the records. A case that is not timed has `not_run`, which says why.
        """
        outcome, outputs = Outcome(), {}
        common = {"versions": records.versions(), "commit": records.commit(options.commit)}
        end, rest = time.monotonic() + options.limit, iter(jobs)
        width, turns = (len(jobs), options.runs) if options.turns else (options.width, 0)
        try:
            while group := list(itertools.islice(rest, width)):
                for job, answer in self._round(group, turns, outputs, end):
                    outcome.failed |= bool(answer.pop("failed", False))
                    timed = answer.pop("timed", True)
                    for row in answer.pop("several", [{}]):
                        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                        record = {**job.known, **common, "time": now, "not_run": None}
                        record |= {**answer, **row}
                        if timed and not record["not_run"]:
                            job.finish(record, outcome.results)
                        if timed or record["not_run"]:
                            write(record)
                            outcome.results.append(record)
                        print(_line(job, record, timed), flush=True)
        except KeyboardInterrupt:
            _ignore_interrupts()
            outcome.interrupted = True
            print("Interrupted: what was measured until now is kept.", flush=True)
        return outcome

    def _round(
        self, jobs: list[Job], turns: int, outputs: dict[str, np.ndarray], end: float
    ) -> Iterator[tuple[Job, Record]]:
        """Cases whose processes live at the same time; they may be timed in turns."""
        cases: list[tuple[Job, Child, Record]] = []
        interrupted = False
        try:
            for job in jobs:
                cases.append((job, self._take(job.environment), {}))
                cases[-1][1].send(job)
                if turns:
                    print(f"starting {job.label}", flush=True)
                    cases[-1][2].update(cases[-1][1].receive(end))
            for job, child, answer in cases:
                answer |= {} if turns else child.receive(end)
                if job.name is not None and answer.get("output") is not None:
                    outputs[job.name] = answer["output"]
            for job, _, answer in cases:
                output = answer.pop("output", None)
                if job.reference is not None and output is not None:
                    answer |= _compare(job, output, outputs)
            if turns:
                print(f"timing {turns} rounds", flush=True)
            for job, child, answer in cases * (turns or 1):
                if answer.get("timed") and "not_run" not in answer:
                    child.send(None)
                    found = child.receive(min(end + SECONDS_LATE, time.monotonic() + job.seconds))
                    if turns and "ms" in found:
                        answer.setdefault("times_ms", []).append(found.pop("ms"))
                    answer |= found if turns else found | machine.gpu_state()
                if not turns:
                    self._give_back(child)
                    yield job, answer
        except KeyboardInterrupt:
            if not turns:
                raise
            _ignore_interrupts()
            interrupted = True
        finally:
            for _, child, _ in cases:
                self._give_back(child)
        for job, _, answer in cases if turns else ():
            yield job, answer | _of_turns(answer)
        if interrupted:
            raise KeyboardInterrupt

    def _take(self, environment: dict[str, str]) -> Child:
        """An idle process with this environment, or a new one."""
        if self._fast:
            flags = f"--xla_backend_optimization_level=0 {environment.get('XLA_FLAGS', '')}"
            environment = environment | {"XLA_FLAGS": flags.strip()}
        for child in self._idle:
            if child.environment == environment:
                self._idle.remove(child)
                return child
        return Child(environment)

    def _give_back(self, child: Child) -> None:
        """End a process, or keep it if it still works; twice is as good as once."""
        if not self._keep or not child.works:
            child.close()
        elif child not in self._idle:
            self._idle.append(child)


def _ignore_interrupts() -> None:
    # An impatient second Ctrl-C must not come between a record and the file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _of_turns(answer: Record) -> Record:
    times = answer.get("times_ms", [])
    spread = Spread.of(times)._asdict() if times and "not_run" not in answer else {}
    not_run = answer.get("not_run", None if times else "interrupted before its first run")
    own = {"times_ms": times, "runs": len(times), "timed": True, "not_run": not_run}
    return own | spread


def _compare(job: Job, output: np.ndarray, outputs: dict[str, np.ndarray]) -> Record:
    bound = {"reference": job.reference, "max_error_bound": job.max_error}
    if job.reference not in outputs:
        return {**bound, "max_error": None, "failed": True}
    found = {**bound, **job.errors(output, outputs[job.reference])}
    error = found["max_error"]
    if not math.isfinite(error) or (job.max_error is not None and error > job.max_error):
        limit = "" if job.max_error is None else f", at most {job.max_error:.0e}"
        found |= {"failed": True, "wrong": True, "not_run": f"wrong: error {error:.2e}{limit}"}
    return found


def _line(job: Job, record: Record, timed: bool) -> str:
    if record["not_run"]:
        return f"{job.label}: not run: {record['not_run']}"
    if not timed:
        return f"{job.label}: reference"
    found = [part.format_map(record) for name, part in _TOLD.items() if record.get(name)]
    if job.reference is not None:
        error = record.get("max_error")
        found.append("unchecked" if error is None else f"error {error:.2e}")
    text = labels([job.label, record["implementation"] if "shape" in record else None])
    return f"{text}: {', '.join(found)}"
