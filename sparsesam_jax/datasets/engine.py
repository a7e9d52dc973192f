"""Runs the shards of a job in this process: photos ahead, results behind, the devices busy.

Three things go on at once: worker processes decode the photos of the next batches, the devices have
up to two batches, and a thread writes what came of the last ones. The next shard begins before the
last one is written.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sparsesam_jax.datasets.jobs import Job, Output, Worker
from sparsesam_jax.datasets.loading import LoadedPhoto, load_ahead
from sparsesam_jax.datasets.sources import Rows
from sparsesam_jax.datasets.store import PhotoRecord, ShardSummary, Store

_IN_FLIGHT = 2  # batches with the devices
_BEHIND = 3  # batches that wait to be written


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardReport(ShardSummary):
    """A shard that was just done.

    Attributes:
        problems: What was wrong with photos that were left out, by their names.
        busy_s: Seconds in which the devices had a batch since the run began; None: not known.
    """

    problems: dict[str, str]
    busy_s: float | None


Report = Callable[[ShardReport], None]


def run_shards(
    job: Job,
    store: Store,
    shards: Sequence[int],
    report: Report,
    *,
    workers: int = 0,
    strict: bool = False,
) -> None:
    """Run shards, those that are done already left alone.

    Args:
        job: What is made of the photos.
        store: Where to.
        shards: Their numbers, in rising order.
        report: Hears of every shard that is done, in a thread of its own.
        workers: Processes that decode photos; 0 are threads.
        strict: Whether a photo that cannot be read is an error.

    Raises:
        ValueError: A photo cannot be read (`strict`), or the job cannot be done.
        OSError: The store cannot be written.
    """
    todo = [shard for shard in shards if not store.is_done(shard)]
    if not todo:
        return
    worker = job.worker(store)
    with _Writer(store, worker, report) as writer:
        batches, ahead = _Batches(worker, writer), collections.deque(todo)
        for photo in load_ahead(Rows(job.source, todo), job.loader(), workers):
            while ahead[0] != photo.row // job.source.shard_size:
                batches.end(ahead.popleft())
            if photo.error and strict:
                raise ValueError(f"{photo.name}: {photo.error}")
            batches.add(ahead[0], photo)
        for shard in ahead:
            batches.end(shard)
        batches.drain()


class _Batches:
    """Photos on their way to the devices, and batches on their way from there."""

    def __init__(self, worker: Worker, writer: _Writer):
        self._worker, self._writer = worker, writer
        self._waiting: dict[Hashable, list[LoadedPhoto]] = {}
        # An empty batch is the end of its shard.
        self._launched: collections.deque[tuple[int, list[LoadedPhoto], Any]] = collections.deque()

    def add(self, shard: int, photo: LoadedPhoto) -> None:
        if photo.error:
            self._writer.failed(shard, photo)
            return
        group = self._worker.group(photo)
        batch = self._waiting.setdefault(group, [])
        batch.append(photo)
        if len(batch) == self._worker.batch:
            self._launch(shard, self._waiting.pop(group))

    def end(self, shard: int) -> None:
        """The shard has no more photos: what waits goes, and nothing of it with the next shard."""
        for batch in self._waiting.values():
            self._launch(shard, batch)
        self._waiting.clear()
        self._launched.append((shard, [], None))

    def drain(self) -> None:
        """Wait for all batches."""
        while self._launched:
            self._pass_on()

    def _launch(self, shard: int, batch: list[LoadedPhoto]) -> None:
        self._launched.append((shard, batch, self._worker.launch(batch)))
        while sum(bool(batch) for _, batch, _ in self._launched) > _IN_FLIGHT:
            self._pass_on()

    def _pass_on(self) -> None:
        shard, batch, launched = self._launched.popleft()
        if batch:
            self._writer.results(shard, batch, self._worker.wait(launched))
        else:
            self._writer.end(shard)


class _Writer:
    """Writes shards in a thread, and gives their files names in another: disks take their time."""

    def __init__(self, store: Store, worker: Worker, report: Report):
        self._store, self._worker, self._report = store, worker, report
        self._writing = ThreadPoolExecutor(1, "writer")
        self._committing = ThreadPoolExecutor(1, "committer")
        self._pending: collections.deque[Future[None]] = collections.deque()
        self._commits: collections.deque[Future[None]] = collections.deque()
        self._open: dict[int, tuple[Output, list[PhotoRecord]]] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                while self._pending:
                    self._pending.popleft().result()
                while self._commits:
                    self._commits.popleft().result()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._writing.shutdown(cancel_futures=True)
            self._committing.shutdown(cancel_futures=True)
            for output, _records in self._open.values():
                output.abort(error or RuntimeError("not ended"))

    def failed(self, shard: int, photo: LoadedPhoto) -> None:
        record = PhotoRecord(
            row=photo.row,
            name=photo.name,
            photo_sha256=photo.sha256 or None,
            error=photo.error,
        )
        self._submit(self._note, shard, record)

    def results(self, shard: int, batch: list[LoadedPhoto], launched: Any) -> None:
        self._submit(self._write, shard, batch, launched)

    def end(self, shard: int) -> None:
        self._submit(self._end, shard)

    def _submit(self, task: Callable[..., None], *arguments: Any) -> None:
        self._pending.append(self._writing.submit(task, *arguments))
        while len(self._pending) > _BEHIND or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()

    def _of(self, shard: int) -> tuple[Output, list[PhotoRecord]]:
        if shard not in self._open:
            self._open[shard] = (self._worker.open(self._store, shard), [])
        return self._open[shard]

    def _note(self, shard: int, record: PhotoRecord) -> None:
        self._of(shard)[1].append(record)

    def _write(self, shard: int, batch: list[LoadedPhoto], launched: Any) -> None:
        output, records = self._of(shard)
        for record, result in self._worker.finish(batch, launched):
            output.add(record.row, result)
            records.append(record)

    def _end(self, shard: int) -> None:
        self._of(shard)
        self._commits.append(self._committing.submit(self._commit, shard))
        while len(self._commits) > 1 or (self._commits and self._commits[0].done()):
            self._commits.popleft().result()

    def _commit(self, shard: int) -> None:
        output, records = self._open[shard]
        with self._store.writing(shard):
            output.commit()
            summary = self._store.write_index(shard, records, self._worker.metadata)
        del self._open[shard]
        problems = {record.name: record.error for record in records if record.error is not None}
        self._report(
            ShardReport(
                **dataclasses.asdict(summary), problems=problems, busy_s=self._worker.busy_s
            )
        )
