"""Runs the shards of a job on a Ray cluster, or on several processes of one machine.

Ray places tasks, notices that a worker is lost, and gives its task to another. A task is a few
shards next to each other; those that the lost worker had done are seen to be done.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

from sparsesam_jax.datasets.engine import run_shards
from sparsesam_jax.datasets.jobs import Job
from sparsesam_jax.datasets.store import ShardSummary, Store

_SHARDS_A_TASK = 16
_TASKS_A_WORKER = 4  # at least, so that all end at about the same time


def check_ray() -> None:
    """Raise ValueError where ray, an optional dependency, is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--engine ray needs ray: pip install 'sparsesam-jax[ray]'")


def run_on_ray(
    job: Job,
    store: Store,
    shards: Sequence[int],
    report: Callable[[ShardSummary], None],
    *,
    workers: int = 0,
    strict: bool = False,
) -> None:
    """Run shards on the cluster that RAY_ADDRESS names, or on one that is started here.

    A worker takes one GPU where the cluster has GPUs, and `1 + workers` processors.

    Args:
        job: As for `engine.run_shards`; likewise all others.
        store: On a file system that all workers see.
        shards: See `run_shards`.
        report: See `run_shards`.
        workers: See `run_shards`.
        strict: See `run_shards`.

    Raises:
        ValueError: As `run_shards`, or ray is missing.
        OSError: As `run_shards`.
    """
    check_ray()
    import ray
    from ray.exceptions import RayTaskError

    todo = [shard for shard in shards if not store.is_done(shard)]
    ray.init(
        ignore_reinit_error=True,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    at_once = gpus or max(1, int(resources.get("CPU", 1)) // (1 + workers))
    size = max(1, min(_SHARDS_A_TASK, len(todo) // (at_once * _TASKS_A_WORKER)))
    task: Any = ray.remote(num_cpus=1 + workers, num_gpus=int(gpus > 0), max_retries=-1)(_task)
    sent = ray.put(job)
    chunks = [todo[start : start + size] for start in range(0, len(todo), size)]
    running = {task.remote(sent, str(store.path), c, workers, strict): c for c in chunks}
    try:
        while running:
            (done, *_), _rest = ray.wait(list(running), num_returns=1)
            ray.get(done)
            for shard in running.pop(done):
                report(store.summary(shard))
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, ValueError | OSError) else error from None
    finally:
        ray.shutdown()


def _task(job: Job, path: str, shards: Sequence[int], workers: int, strict: bool) -> None:
    run_shards(job, Store(path), shards, lambda _: None, workers=workers, strict=strict)
