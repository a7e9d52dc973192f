"""Cases in processes of their own: some compile side by side, then one at a time is timed.

A round starts as many processes as may compile at a time and waits until all of them are ready:
compiled, warmed up, and their output there. Then the outputs are compared with the references',
and what agrees is timed, one process after the other, while no other one works (`process`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records
from benchmarks.records import Record, Write
from benchmarks.run import machine, process
from benchmarks.run.options import SuiteOptions
from benchmarks.run.timing import Spread

SECONDS_LATE = 40  # that what has compiled within the limit still has to be timed
SECONDS_TIMED = 120  # of one case: a kernel that hangs must not keep the GPU


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want|, Frobenius; infinite where the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One case.

    Attributes:
        label: What it is called on the screen.
        module: Module with `build`.
        arguments: Of `build`.
        environment: Of the process.
        known: What the record holds whatever happens.
        name: Other cases call its output so, as their reference.
        reference: Whose output it must agree with.
        max_error: The largest `max_error` that is no mistake; None takes any number.
        errors: Of an output against the reference's.
        finish: Adds to the record what follows from it.
    """

    label: str
    module: str
    arguments: dict[str, Any]
    environment: dict[str, str]
    known: Record
    name: str | None = None
    reference: str | None = None
    max_error: float | None = 0.0
    errors: Callable[[np.ndarray, np.ndarray], Record] = lambda got, want: {
        "max_error": relative_error(got, want)
    }
    finish: Callable[[Record], None] = lambda record: None


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


def run(
    jobs: Sequence[Job], options: SuiteOptions, write: Write, children: Children | None = None
) -> Outcome:
    """Check and time the cases in order; every record is written as soon as it is there.

    Where the options say that cases take turns, they compile one after the other, all processes
    stay, and each is timed once in each of `options.runs` rounds.

    Args:
        jobs: The cases; references before what is compared with them.
        options: How many at a time, how long, and the tree's commit.
        write: Takes the records. A case that is not timed has `not_run`, which says why.
        children: Where processes come from; None starts one a case.
    """
    outcome, outputs = Outcome(), {}
    common = {"versions": records.versions(), "commit": machine.commit(options.commit)}
    end, rest = time.monotonic() + options.limit, iter(jobs)
    try:
        while group := list(itertools.islice(rest, len(jobs) if options.turns else options.width)):
            rounds = options.runs if options.turns else None
            for job, answer in _round(group, rounds, outputs, end, children or Children()):
                outcome.failed |= bool(answer.pop("failed", False))
                timed = answer.pop("timed", True)
                for row in answer.pop("several", [{}]):
                    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                    record = {**job.known, **common, "time": now, "not_run": None}
                    record |= {**answer, **row}
                    job.finish(record)
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
    jobs: list[Job],
    rounds: int | None,
    outputs: dict[str, np.ndarray],
    end: float,
    children: Children,
) -> Iterator[tuple[Job, Record]]:
    """Cases whose processes live at the same time; with `rounds` they are timed in turns."""
    answers: list[Record] = [{} for _ in jobs]
    interrupted = False
    with contextlib.ExitStack() as stack:
        try:
            own = []
            for job, answer in zip(jobs, answers, strict=True):
                own.append(children.take(job.environment))
                stack.callback(children.give_back, own[-1])
                own[-1].start(job)
                if rounds:
                    print(f"starting {job.label}", flush=True)
                    answer |= own[-1].receive(end)
            for job, child, answer in zip(jobs, own, answers, strict=True):
                answer |= {} if rounds else child.receive(end)
                output = answer.pop("output", None)
                if job.name is not None and output is not None:
                    outputs[job.name] = output
                if job.reference is not None and output is not None:
                    answer["output"] = output
            for job, answer in zip(jobs, answers, strict=True):
                if "output" in answer:
                    answer |= _compare(job, answer.pop("output"), outputs)
            if rounds:
                print(f"timing {rounds} rounds", flush=True)
                for _, child, answer in rounds * list(zip(jobs, own, answers, strict=True)):
                    if "not_run" not in answer:
                        found = child.go(end)
                        if "ms" in found:
                            answer.setdefault("times_ms", []).append(found.pop("ms"))
                        answer |= found
            else:
                for job, child, answer in zip(jobs, own, answers, strict=True):
                    if answer.get("timed") and "not_run" not in answer:
                        answer |= child.go(end) | machine.gpu_state()
                    children.give_back(child)
                    yield job, answer
        except KeyboardInterrupt:
            if not rounds:
                raise
            _ignore_interrupts()
            interrupted = True
        for job, answer in zip(jobs, answers, strict=True) if rounds else ():
            times = answer.setdefault("times_ms", [])
            answer |= {"runs": len(times), "timed": True}
            if times and "not_run" not in answer:
                answer |= Spread.of(times)._asdict()
            answer.setdefault("not_run", None if times else "interrupted before its first run")
            yield job, answer
    if interrupted:
        raise KeyboardInterrupt


def _ignore_interrupts() -> None:
    # An impatient second Ctrl-C must not come between a record and the file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
    text = labels([job.label, record["implementation"] if "shape" in record else None])
    parts = {
        "median_ms": "{median_ms:.3f} ms ({q1_ms:.3f}-{q3_ms:.3f})",
        "kernel_median_ms": "kernel {kernel_median_ms:.4f} ms",
        "tflops": "{tflops:.1f} TFLOP/s",
        "tbs": "{tbs:.2f} TB/s",
        "share_of_ceiling": "{share_of_ceiling:.0%} of the ceiling",
        "peak_mib": "peak {peak_mib:.0f} MiB",
    }
    found = [part.format_map(record) for name, part in parts.items() if record.get(name)]
    if job.reference is not None:
        error = record.get("max_error")
        found.append("unchecked" if error is None else f"error {error:.2e}")
    return f"{text}: {', '.join(found)}"


def labels(values: Iterable[object]) -> str:
    """A case's label: what there is, by spaces."""
    return " ".join(str(value) for value in values if value not in (None, ""))


class Children:
    """Where processes come from: a new one a case, or, kept, one that has ended its case before.

    Args:
        keep: Whether processes are used again: no memory is told apart then, but imports are saved.
    """

    def __init__(self, *, keep: bool = False):
        self._keep = keep
        self._idle: list[_Child] = []

    def take(self, environment: dict[str, str]) -> _Child:
        """An idle process with this environment, or a new one."""
        for child in self._idle:
            if child.environment == environment:
                self._idle.remove(child)
                return child
        return _Child(environment)

    def give_back(self, child: _Child) -> None:
        """End a process, or keep it if it still works; twice is as good as once."""
        if not self._keep or not child.works:
            child.close()
        elif child not in self._idle:
            child.skip()
            self._idle.append(child)

    def close(self) -> None:
        """End all that are kept."""
        for child in self._idle:
            child.close()
        self._idle.clear()


class _Child:
    """The parent's end of a process."""

    def __init__(self, environment: dict[str, str]):
        self.environment, self.works, self._waits = environment, True, False
        handle, log = tempfile.mkstemp()
        os.close(handle)
        context, self._log = multiprocessing.get_context("spawn"), Path(log)
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=process.serve, args=(end, log))
        before = dict(os.environ)
        try:
            os.environ.clear()
            os.environ.update(environment)
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        end.close()

    def start(self, job: Job) -> None:
        """Let it build a case."""
        self._pipe.send((job.module, job.arguments))

    def skip(self) -> None:
        """Its case is not timed, or not any more."""
        if self._waits:
            self._pipe.send("stop")
        self._waits = False

    def go(self, end: float) -> Record:
        """What it measures in a run."""
        self._pipe.send("go")
        return self.receive(min(end + SECONDS_LATE, time.monotonic() + SECONDS_TIMED))

    def receive(self, end: float) -> Record:
        """Its next answer; why there is none, if it ends before or is too late."""
        try:
            if self._pipe.poll(max(0.0, end - time.monotonic())):
                answer = self._pipe.recv()
                self.works = not answer.get("failed")  # else its GPU may be unusable
                self._waits = "not_run" not in answer and answer.get("timed", self._waits)
                return answer
            why = "its time was up"
        except (EOFError, OSError):
            self._process.join(10)
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
            why = f"its process ended with code {self._process.exitcode}: {last[0]}"
        self.works = False
        return {"not_run": why, "failed": True}

    def close(self) -> None:
        """End the process, and what it started."""
        if self._process.pid is None:
            return
        self.works = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._log.unlink(missing_ok=True)
