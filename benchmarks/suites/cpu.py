"""The encoder on a CPU: XLA, dense and sparse, beside transformers' PyTorch on the same weights.

Every peer has the same processors, threads and input, in float32. The dense encoders are compared
with the first of PyTorch's, sparse ones must be finite and are compared with our dense one. Timed
runs take turns, so that what the machine does meanwhile hits all alike.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import typer

from benchmarks import peers, records
from benchmarks.cases import shapes
from benchmarks.cases.encoder_cases import EncoderCase
from benchmarks.records import Record
from benchmarks.run import machine
from benchmarks.run.options import Densities, SuiteOptions, Warmups
from benchmarks.run.pool import Job, labels, relative_error
from benchmarks.run.process import Program
from benchmarks.run.timing import time_ms
from benchmarks.suites import jobs as jobs_of
from sparsesam_jax.config import Sparsity

TORCH = ("transformers-eager", "transformers")
# Share of the largest feature: float32 through a whole encoder, its sums in another order.
MAX_DENSE_ERROR = 2e-4
KEYS = ("peer", "implementation", "density")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure; `densities` are those of our encoder beside the dense one."""

    turns = True
    quick_fields: ClassVar = {"runs": 9, "warmups": 2}

    model: Annotated[str, typer.Option(help="vit_t, vit_b, vit_l or vit_h.")] = "vit_b"
    densities: Densities = (0.3,)
    batch: Annotated[int, typer.Option(help="Images a run.")] = 1
    threads: Annotated[int, typer.Option(help="Of every peer. Without it: all processors.")] = (
        dataclasses.field(default_factory=records.available_cpus)
    )
    runs: Annotated[int, typer.Option(help="Timed runs of each peer.")] = 9
    warmups: Warmups = 2
    keep_memory: Annotated[
        bool, typer.Option("--keep-memory", help="Let glibc keep freed memory, for all alike.")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads > records.available_cpus():
            raise ValueError(
                f"threads must be at most the processors at hand ({records.available_cpus()}), "
                f"got {self.threads}"
            )
        for density in self.densities:
            if not 0 < density < 1:
                raise ValueError(f"density must lie in (0, 1) beside dense, got {density}")


def jobs(options: Options) -> list[Job]:
    """PyTorch first, since ours is checked against it."""
    medians: dict[str, float] = {}
    first, ours = _name(TORCH[0], 1.0), _name("xla", 1.0)
    cases = [(name, 1.0, first) for name in (*TORCH, "xla")]
    cases += [("xla", density, ours) for density in options.densities]
    return [_job(options, *case, medians) for case in cases]


def _name(name: str, density: float) -> str:
    peer = peers.PEERS[name]
    own = "xla" if peer.ours else peer.attention
    return labels([peer.package, own, None if density == 1 else density])


def _job(
    options: Options, name: str, density: float, reference: str, medians: dict[str, float]
) -> Job:
    peer, label = peers.PEERS[name], _name(name, density)
    sparsity = None if density == 1 else Sparsity(density)
    what = EncoderCase(model=options.model, batch=options.batch, sparsity=sparsity)

    def finish(record: Record) -> None:
        if median := record["median_ms"]:
            medians[label] = median
            record["ms_per_image"] = median / options.batch
        if peer.ours and median:
            torch = [medians[n] for n in (_name(t, 1.0) for t in TORCH) if n in medians]
            dense = medians.get(_name("xla", 1.0))
            record["ratio_to_pytorch"] = median / min(torch) if torch else None
            record["speedup_over_dense"] = dense / median if dense else None

    empty = ("q1_ms", "q3_ms", "ms_per_image", "peak_mib", "compile_s", "reference", "max_error")
    empty += ("relative_error", "ratio_to_pytorch", "speedup_over_dense")
    own: Record = {name: getattr(options, name) for name in ("threads", "warmups", "keep_memory")}
    own |= {"image_size": what.config.image_size, "density": density, "name": label}
    own |= {"device": records.cpu_name(), "implementation": "xla" if peer.ours else peer.attention}
    case = dataclasses.asdict(what)
    job = jobs_of.timed(
        "cpu",
        name,
        __name__,
        label,
        dict(case=case, threads=options.threads, warmups=options.warmups),
        case | jobs_of.DRAWN | dict.fromkeys(empty) | own,
        name=label,
        reference=None if reference == label else reference,
        max_error=MAX_DENSE_ERROR if density == 1 else None,
        errors=errors,
        finish=finish,
    )
    environment = machine.cpu_environment(options.threads, keep_memory=options.keep_memory)
    return dataclasses.replace(job, label=label, environment=environment)


def errors(got: np.ndarray, want: np.ndarray) -> Record:
    """The largest difference as a share of the largest feature, and relative Frobenius."""
    largest = float(np.abs(got - want).max() / np.abs(want).max())
    return {"max_error": largest, "relative_error": relative_error(got, want)}


def build(case: Record, implementation: str, threads: int, warmups: int) -> Program:
    """A peer's encoder, compiled and warmed up; measures one run at a time."""
    machine.use_processors(threads)
    what, notes = EncoderCase.of(case), {}
    shared = (implementation, what.model, what.batch, what.dtype, what.sparsity)
    encode = peers.builder(implementation, "encoder")
    if peers.PEERS[implementation].ours:
        notes["attention"] = "dense" if what.sparsity is None else "Stripe-Sort, default Sparsity"
        encoder = encode(*shared, own_tables=True)
    else:
        import torch

        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            # By another process, so that JAX is no part of this one's memory.
            context = multiprocessing.get_context("spawn")
            writer = context.Process(target=_write_weights, args=(what.model, folder))
            writer.start()
            writer.join()
            encoder = encode(*shared, folder=folder)
    for _ in range(warmups):
        encoder.call()
    known = machine.reset_peak_memory()

    def measure() -> Record:
        ms = time_ms(encoder.call)
        return {"ms": ms, "peak_mib": machine.peak_memory_mib() if known else None}

    return Program(encoder.output, measure, encoder.notes | notes)


def _write_weights(model: str, folder: str) -> None:
    """`shapes.random_weights` as a folder that transformers loads."""
    from sparsesam_jax.checkpoints import convert_checkpoint, native

    config, path = shapes.model_config(model), Path(folder) / "native.safetensors"
    native.write(path, config, shapes.random_weights(config))
    convert_checkpoint(path, folder, to="huggingface")


def show(results: list[Record], options: Options) -> None:
    """Print how ours compares."""
    from benchmarks.report import tables

    columns = {key: f"{{{key}}}" for key in KEYS}
    columns |= {"x PyTorch ↓": "{ratio_to_pytorch:.2f}", "x dense ↑": "{speedup_over_dense:.2f}"}
    caption = "The median over that of the faster PyTorch peer, and our dense one's over it."
    tables.print_table(f"Ratios, {options.threads} threads", columns, results, caption)
