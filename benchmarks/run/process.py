"""The process of a case: it builds the jobs it is sent, and times the last one when it is told to.

It answers what it built or measured, or why not.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.records import Record
from benchmarks.run.jobs import Job, NotRunError


def serve(pipe: Connection, log: str) -> None:
    """Answer every job, and every None, which is to be timed."""
    os.setpgrp()  # Ctrl-C is the parent's to handle
    with open(log, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    program = None
    with contextlib.suppress(EOFError):
        while True:
            job: Job | None = pipe.recv()
            try:
                if job is None:
                    assert program is not None and program.measure is not None
                    answer = program.measure()
                else:
                    program = None  # what the last one held is free
                    program = job.build()
                    answer = {"output": program.output, "timed": program.measure is not None}
                    answer |= program.notes
            except Exception as error:  # a case may not fit or not compile: the table says so
                traceback.print_exc()
                absent = isinstance(error, NotRunError | ImportError)
                why = "" if absent else f"{type(error).__name__}: "
                told = " ".join(str(error).split())[:300]
                answer = {"not_run": why + told, "failed": not absent}
            pipe.send(answer)


class Child:
    """The parent's end of a process.

    Attributes:
        environment: The process's.
        works: Whether it can be given another job.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment, self.works = environment, True
        handle, log = tempfile.mkstemp()
        os.close(handle)
        context, self._log = multiprocessing.get_context("spawn"), Path(log)
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=serve, args=(end, log))
        before = dict(os.environ)
        try:
            os.environ.clear()
            os.environ.update(environment)
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        end.close()

    def send(self, job: Job | None) -> None:
        """Let it build a job, or time the last one."""
        with contextlib.suppress(OSError):  # it has ended, as the answer will say
            self._pipe.send(job)

    def receive(self, end: float) -> Record:
        """Its next answer; why there is none, if it ends before or is too late."""
        try:
            if self._pipe.poll(max(0.0, end - time.monotonic())):
                answer = self._pipe.recv()
                self.works = not answer.get("failed")  # else its GPU may be unusable
                return answer
            why = "its time was up"
        except (EOFError, OSError):
            self._process.join(10)
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
            why = f"its process ended with code {self._process.exitcode}: {last[0]}"
        self.works = False
        return {"not_run": why, "failed": True}

    def close(self) -> None:
        """End the process, and what it started; twice is as good as once."""
        self.works = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.pid is not None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._log.unlink(missing_ok=True)
