"""The encoder on a CPU: XLA, dense and sparse, beside transformers' PyTorch on the same weights.

Every peer has the same processors, threads and input, in float32. The dense encoders are compared
with the first of PyTorch's, sparse ones must be finite and are compared with our dense one. Timed
runs take turns, so that what the machine does meanwhile hits all alike.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from typer import Option

from benchmarks import peers, records
from benchmarks.cases import shapes
from benchmarks.cases.encoder_cases import EncoderCase
from benchmarks.records import Record
from benchmarks.run import machine
from benchmarks.run.jobs import Job, Program, labels, relative_error
from benchmarks.run.options import Densities, SuiteOptions, Warmups
from benchmarks.run.timing import time_ms
from sparsesam_jax.config import Sparsity

TORCH = ("transformers-eager", "transformers")
# Share of the largest feature: float32 through a whole encoder, its sums in another order.
MAX_DENSE_ERROR = 2e-4
KEYS = ("peer", "implementation", "density")
# What a record has even where it was not measured.
_EMPTY = ("q1_ms", "q3_ms", "ms_per_image", "peak_mib", "compile_s", "reference", "max_error")
_EMPTY += ("relative_error", "ratio_to_pytorch", "speedup_over_dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure; `densities` are those of our encoder beside the dense one."""

    turns = True
    quick_fields: ClassVar = {"runs": 9, "warmups": 2}

    model: Annotated[str, Option(help="vit_t, vit_b, vit_l or vit_h.")] = "vit_b"
    densities: Densities = (0.3,)
    batch: Annotated[int, Option(help="Images a run.")] = 1
    threads: Annotated[int, Option(help="Of every peer. Without it: all processors.")] = (
        dataclasses.field(default_factory=records.available_cpus)
    )
    runs: Annotated[int, Option(help="Timed runs of each peer.")] = 9
    warmups: Warmups = 2
    keep_memory: Annotated[
        bool, Option("--keep-memory", help="Let glibc keep freed memory, for all alike.")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        most = records.available_cpus()
        if self.threads > most:
            expected = f"at most the processors at hand ({most})"
            raise ValueError(f"threads must be {expected}, got {self.threads}")
        for density in self.densities:
            if not 0 < density < 1:
                raise ValueError(f"density must lie in (0, 1) beside dense, got {density}")


def jobs(options: Options) -> list[Job]:
    """PyTorch first, since ours is checked against it."""
    cases = [*((name, 1.0) for name in (*TORCH, "xla")), *(("xla", r) for r in options.densities)]
    own = {n: getattr(options, n) for n in ("threads", "warmups", "keep_memory")}
    own |= dict.fromkeys(_EMPTY) | {"device": records.cpu_name()}
    found: list[Job] = []
    for name, density in cases:
        sparsity, label = None if density == 1 else Sparsity(density), _label(name, density)
        what = EncoderCase(model=options.model, batch=options.batch, sparsity=sparsity)
        fields = what.fields | own | {"name": label, "implementation": label.split()[1]}
        reference = _label(TORCH[0] if sparsity is None else "xla")
        given: dict[str, Any] = dict(
            suite="cpu", what=what, options=options, implementation=name, fields=fields
        )
        given["max_error"] = MAX_DENSE_ERROR if sparsity is None else None
        given["reference"] = None if reference == label else reference
        found.append(CpuJob(**given))
    return found


def _label(name: str, density: float = 1.0) -> str:
    peer = peers.PEERS[name]
    own = name if peer.ours else peer.attention
    return labels([peer.package, own, None if density == 1 else density])


class CpuJob(Job):
    """A peer's encoder on so many processors."""

    @property
    def label(self) -> str:
        """The peer, its attention and a density below 1."""
        return self.fields["name"]

    @property
    def name(self) -> str | None:
        """Its output's, which may be a reference."""
        return self.label

    @property
    def environment(self) -> dict[str, str]:
        """The same for all peers."""
        threads, keep_memory = self.options.threads, self.options.keep_memory
        return machine.cpu_environment(threads, keep_memory=keep_memory)

    def errors(self, got: np.ndarray, want: np.ndarray) -> Record:
        """The largest difference as a share of the largest feature, and relative Frobenius."""
        largest = float(np.abs(got - want).max() / np.abs(want).max())
        return {"max_error": largest, "relative_error": relative_error(got, want)}

    def build(self) -> Program:
        """The encoder, compiled and warmed up; measures one run at a time."""
        what, threads, name = self.what, self.options.threads, str(self.implementation)
        machine.use_processors(threads)
        shared, notes = (name, what.model, what.batch, what.dtype, what.sparsity), {}
        encode = peers.builder(name, "encoder")
        if peers.PEERS[name].ours:
            notes["attention"] = (
                "dense" if what.sparsity is None else "Stripe-Sort, default Sparsity"
            )
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
        for _ in range(self.options.warmups):
            encoder.call()
        known = machine.reset_peak_memory()

        def measure() -> Record:
            ms = time_ms(encoder.call)
            return {"ms": ms, "peak_mib": machine.peak_memory_mib() if known else None}

        return Program(encoder.output, measure, encoder.notes | notes)

    def finish(self, record: Record, found: Sequence[Record]) -> None:
        """How ours compares."""
        medians = {r["name"]: r["median_ms"] for r in found if not r["not_run"]}
        median = record["median_ms"]
        record["ms_per_image"] = median / self.options.batch
        if record["peer"] == "sparsesam_jax":
            torch = [medians[name] for name in map(_label, TORCH) if name in medians]
            dense = medians.get(_label("xla"), median if self.what.sparsity is None else None)
            record["ratio_to_pytorch"] = median / min(torch) if torch else None
            record["speedup_over_dense"] = dense / median if dense else None


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
