"""Photos decoded ahead of the model: by threads, or by processes of their own (grain).

What a photo costs a processor, decoding and resizing, takes longer than a GPU's encoder. So worker
processes do both and hand over the resized pixels, a fraction of the photo's.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import hashlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sparsesam_jax.datasets.sources import Source
from sparsesam_jax.predict.image_files import PhotoReader

Item = TypeVar("Item")
Read = TypeVar("Read")

_THREADS = 4
_AHEAD = 8  # photos that wait for the model, of a thread pool or of each worker process
_AHEAD_OF_WORKER = 4
_SHARED = Path("/dev/shm")  # whose memory processes share photos in; a container has 64 MB
_SHARED_BYTES_A_WORKER = 2**24


class LoadedPhoto(NamedTuple):
    """A photo of a data set, or what was wrong with it.

    Attributes:
        row: Its row in the store.
        name: Its name in the data set.
        size: Height and width as it came; zeros if it is broken.
        pixels: The photo, resized where that was asked for; no pixels if it is broken.
        sha256: Of its file.
        error: What is wrong with it; empty where nothing is.
    """

    row: int
    name: str
    size: tuple[int, int]
    pixels: UInt8[np.ndarray, "height width 3"]
    sha256: str
    error: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadPhoto:
    """Reads the photo of a row; it travels to worker processes.

    Attributes:
        source: The data set.
        reader: How photos are read.
        long_side: What the longest side is scaled to, as SAM does; None leaves the photo as it is.
    """

    source: Source
    reader: PhotoReader
    long_side: int | None

    def __call__(self, row: int) -> LoadedPhoto | None:
        """The photo; None where the row is empty.

        Raises:
            ValueError: Its tar is broken.
        """
        name, sha256 = self.source.name(row), ""
        try:
            found = self.source.read(row)
            if found is None:
                return None
            name, sha256 = found.name, hashlib.sha256(found.data).hexdigest()
        except OSError as error:
            return _broken(row, name, sha256, f"image must be readable: {error.strerror}")
        try:
            image = self.reader.read_bytes(found.data, name)
        except (ValueError, MemoryError) as error:
            text = " ".join(str(error).split())
            return _broken(row, name, sha256, text or "image must fit in memory")
        size = (image.shape[0], image.shape[1])
        return LoadedPhoto(row, name, size, self._resized(image), sha256, "")

    def _resized(self, image: np.ndarray) -> np.ndarray:
        if self.long_side is None:
            return image
        # SAM's rule, as in model.transforms, which imports JAX.
        scale = self.long_side / max(image.shape[:2])
        height, width = (max(1, int(side * scale + 0.5)) for side in image.shape[:2])
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _broken(row: int, name: str, sha256: str, error: str) -> LoadedPhoto:
    return LoadedPhoto(row, name, (0, 0), np.zeros((0, 0, 3), np.uint8), sha256, error)


def check_loader(workers: int) -> None:
    """Raise ValueError where there cannot be so many worker processes."""
    if workers < 0:
        raise ValueError(f"workers must be 0 (threads) or more processes, got {workers}")
    if workers and importlib.util.find_spec("grain") is None:
        raise ValueError("worker processes need grain: pip install 'sparsesam-jax[datasets]'")
    needed = workers * _SHARED_BYTES_A_WORKER
    if workers and _SHARED.is_dir() and (free := shutil.disk_usage(_SHARED).free) < needed:
        raise ValueError(
            f"{workers} worker processes need {needed >> 20} MB of shared memory, got {free >> 20} "
            f"in {_SHARED}: give it more (docker run --shm-size), or --workers 0"
        )


def load_ahead(
    items: Sequence[Item], read: Callable[[Item], Read | None], workers: int = 0
) -> Iterator[Read]:
    """What `read` makes of the items, in their order, while the caller is busy with earlier ones.

    Args:
        items: What is read.
        read: Of one item; None is left out. It must pickle for worker processes.
        workers: Processes; 0 reads in threads of this process.

    Raises:
        ValueError: `workers` cannot be had, or one of them has died.
    """
    check_loader(workers)
    return _by_processes(items, read, workers) if workers else _by_threads(items, read)


def _by_threads(items: Sequence[Item], read: Callable[[Item], Read | None]) -> Iterator[Read]:
    pending: collections.deque[Any] = collections.deque()
    with ThreadPoolExecutor(_THREADS, "photos") as pool:
        try:
            for item in items:
                pending.append(pool.submit(read, item))
                if len(pending) >= _AHEAD:
                    found = pending.popleft().result()
                    if found is not None:
                        yield found
            while pending:
                found = pending.popleft().result()
                if found is not None:
                    yield found
        finally:
            for future in pending:
                future.cancel()


def _by_processes(
    items: Sequence[Item], read: Callable[[Item], Read | None], workers: int
) -> Iterator[Read]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain asks for absl's flags, which only absl's programs have
        flags.FLAGS.mark_as_parsed()
    data = grain.MapDataset.source(items).map(_Kept(read)).to_iter_dataset()
    options = grain.MultiprocessingOptions(
        num_workers=min(workers, len(items)), per_worker_buffer_size=_AHEAD_OF_WORKER
    )
    found = iter(data.mp_prefetch(options, worker_init_fn=_start_worker))
    element: Any = None
    try:
        for element in found:
            if element[0] is not None:
                yield _copied(element[0])  # shared memory is scarce, so it is given back at once
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        code = str(error).partition("exit code ")[2].partition(".")[0]
        raise ValueError(
            f"a worker process that reads photos has died (exit code {code}): there may be too "
            f"little memory, or too little of it in {_SHARED}"
        ) from error
    finally:
        found.close()  # pyright: ignore[reportAttributeAccessIssue]
        del found, element
        gc.collect()  # grain's circles hold each worker's last photo in shared memory


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Keeps what is left out in its place: grain would shift the order of the workers' items."""

    read: Callable[[Any], Any]

    def __call__(self, item: Any) -> tuple[Any]:
        return (self.read(item),)


def _copied(element: Any) -> Any:
    if isinstance(element, np.ndarray):
        return np.array(element)
    if isinstance(element, tuple):
        values = map(_copied, element)
        return type(element)(*values) if hasattr(element, "_fields") else tuple(values)
    return element


def _start_worker(index: int, count: int) -> None:
    """Make a worker end with its parent, however that ends."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to both
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
