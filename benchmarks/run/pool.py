"""Cases in processes of their own: some compile side by side, then one at a time is timed.

A round starts as many processes as may compile at a time and waits until all of them are ready:
compiled, warmed up, and their output written. Then the outputs are compared with the references',
and what agrees is timed, one process after the other, while no other one works (`process`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from benchmarks import records
from benchmarks.records import Record, Write
from benchmarks.run import machine

SECONDS_LATE = 40  # that what has compiled within the limit still has to be timed
SECONDS_TIMED = 120  # of one case: a kernel that hangs must not keep the GPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One case.

    Attributes:
        label: What it is called on the screen.
        module: Module with `build`.
        arguments: Of `build`, as JSON has them.
        environment: Of the process.
        known: What the record holds whatever happens.
        name: Other cases call its output so, as their reference.
        reference: Whose output it must agree with.
        max_error: Largest relative Frobenius error that is no mistake.
        finish: Adds to the record what follows from it.
    """

    label: str
    module: str
    arguments: dict[str, Any]
    environment: dict[str, str]
    known: Record
    name: str | None = None
    reference: str | None = None
    max_error: float = 0.0
    finish: Callable[[Record], None] = lambda record: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a suite runs its cases, whatever they are.

    Attributes:
        runs: Timed runs of each case.
        width: Processes that compile at a time.
        limit: Seconds after which the rest is given up.
        commit: Of the tree, where it is no checkout.
    """

    runs: int = 20
    width: int = 6
    limit: float = 3600
    commit: str | None = None

    def __post_init__(self) -> None:
        for name in ("runs", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


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


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want|, Frobenius; infinite where the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(
    jobs: Sequence[Job], options: RunOptions, write: Write, children: Children | None = None
) -> Outcome:
    """Check and time a suite's cases, see `run`."""
    return run(
        jobs,
        write,
        width=options.width,
        limit=options.limit,
        commit=options.commit,
        children=children,
    )


def run(
    jobs: Sequence[Job],
    write: Write,
    *,
    width: int,
    limit: float,
    commit: str | None = None,
    children: Children | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Check and time the cases in order; every record is written as soon as it is there.

    Args:
        jobs: The cases; references before what is compared with them.
        write: Takes the records. A case that is not timed has `not_run`, which says why.
        width: Processes that compile at a time.
        limit: Seconds after which the rest is given up; what has compiled by then is still timed.
        commit: Of the tree; None finds it.
        children: Where processes come from; None starts one a case.
        say: Prints a line a case.
    """
    outcome = Outcome()
    common = {"versions": records.versions(), "commit": machine.commit(commit)}
    end = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        outputs: dict[str, Path] = {}
        rest = iter(jobs)
        try:
            while group := list(itertools.islice(rest, width)):
                for job, found in _round(group, Path(folder), outputs, end, children or Children()):
                    outcome.failed |= bool(found.pop("failed", False))
                    for row in found.pop("several", [{}]):
                        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                        record = {**job.known, **common, "time": now, "not_run": None}
                        record |= {**found, **row}
                        job.finish(record)
                        if job.name is None or record["not_run"]:
                            write(record)
                            outcome.results.append(record)
                        say(_line(job, record))
        except KeyboardInterrupt:
            # An impatient second Ctrl-C must not come between a record and the file.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            outcome.interrupted = True
            say("Interrupted: what was measured until now is kept.")
    return outcome


def _round(
    jobs: list[Job], folder: Path, outputs: dict[str, Path], end: float, children: Children
) -> Iterator[tuple[Job, Record]]:
    with contextlib.ExitStack() as stack:
        started = []
        for job in jobs:
            handle, path = tempfile.mkstemp(dir=folder, suffix=".npy")
            os.close(handle)
            child = children.take(job.environment)
            stack.callback(children.give_back, child)
            child.start(job, path)
            started.append((job, child, Path(path)))
        ready = [child.receive(end) for _, child, _ in started]
        for (job, _, output), answer in zip(started, ready, strict=True):
            if job.name is not None and "not_run" not in answer:
                outputs[job.name] = output
        for (job, child, output), answer in zip(started, ready, strict=True):
            if "not_run" not in answer:
                answer |= _compare(job, output, outputs)
            timed = answer.pop("timed", False)
            if timed and "not_run" not in answer:
                child.say("go")
                answer |= child.receive(min(end + SECONDS_LATE, time.monotonic() + SECONDS_TIMED))
                answer |= machine.gpu_state()
            elif timed:
                child.skip()
            children.give_back(child)
            yield job, answer


def _compare(job: Job, output: Path, outputs: dict[str, Path]) -> Record:
    if job.reference is None:
        return {}
    bound = {"reference": job.reference, "max_error_bound": job.max_error}
    if job.reference not in outputs:
        return {**bound, "max_error": None, "failed": True}
    error = relative_error(np.load(output), np.load(outputs[job.reference]))
    found = {**bound, "max_error": error}
    if not error <= job.max_error:
        found |= {"failed": True, "wrong": True}
        found["not_run"] = f"wrong: error {error:.2e}, at most {job.max_error:.0e}"
    return found


def _line(job: Job, record: Record) -> str:
    if record["not_run"]:
        return f"{job.label}: not run: {record['not_run']}"
    if job.name is not None:
        return f"{job.label}: reference"
    text = labels([job.label, record["implementation"] if "shape" in record else None])
    if "median_ms" in record:
        text += f": {record['median_ms']:.3f} ms ({record['q1_ms']:.3f}-{record['q3_ms']:.3f})"
    if record.get("tflops"):
        text += f", {record['tflops']:.1f} TFLOP/s"
    if record.get("tbs"):
        text += f", {record['tbs']:.2f} TB/s"
    if record.get("share_of_ceiling"):
        text += f" ({record['share_of_ceiling']:.0%} of the ceiling)"
    if record.get("peak_mib"):
        text += f", peak {record['peak_mib']:.0f} MiB"
    if job.reference is not None:
        error = record.get("max_error")
        text += ", unchecked" if error is None else f", error {error:.2e}"
    return text


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
        """End a process, or keep it if it still works; once only."""
        if self._keep and child.works and child not in self._idle:
            self._idle.append(child)
        elif not self._keep or not child.works:
            child.close()

    def close(self) -> None:
        """End all that are kept."""
        for child in self._idle:
            child.close()
        self._idle.clear()


class _Child:
    """The parent's end of a process."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as the process
        # Its own process group: Ctrl-C is the parent's to handle.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.run.process"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            process_group=0,
        )
        self._busy = self._closed = False

    @property
    def works(self) -> bool:
        """Whether it can take another case."""
        return not self._busy and self._process.poll() is None

    def start(self, job: Job, output: str) -> None:
        """Let it build a case."""
        self._busy = True
        arguments = {**job.arguments, "output": output}
        self.say(json.dumps({"module": job.module, "arguments": arguments}))

    def say(self, line: str) -> None:
        """Hand it a line."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def skip(self) -> None:
        """Its case is not timed."""
        self.say("stop")
        self._busy = False

    def receive(self, end: float) -> Record:
        """Its next answer; why there is none, if it ends before or is too late."""
        assert self._process.stdout is not None
        timer = threading.Timer(max(0.0, end - time.monotonic()), self._process.kill)
        timer.daemon = True  # an interrupt may come before it can be cancelled
        try:
            timer.start()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            answer = json.loads(line)
            # After "ready" it still waits to be told whether it is timed.
            self._busy = bool(answer.get("timed"))
            return answer
        code = self._process.wait()
        if code < 0 and time.monotonic() >= end:
            return {"not_run": "its time was up", "failed": True}
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:] or ["no message"]
        return {"not_run": f"its process ended with code {code}: {last[0]}", "failed": True}

    def close(self) -> None:
        """End the process, and what it started."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def labels(values: Iterable[object]) -> str:
    """A case's label: what there is, by spaces."""
    return " ".join(str(value) for value in values if value not in (None, ""))
