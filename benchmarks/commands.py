"""The command line of the GPU suites; `--quick` runs each at tiny shapes, on a CPU too."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import records, tables
from benchmarks.records import Record
from benchmarks.run import pool
from benchmarks.run.pool import Children, Outcome

Model = Annotated[
    list[str] | None, typer.Option(help="vit_t, vit_b, vit_l or vit_h; may be repeated.")
]
Batch = Annotated[list[int] | None, typer.Option(help="Images a run; may be repeated.")]
Density = Annotated[list[float] | None, typer.Option(help="1 is dense; may be repeated.")]
Ours = Annotated[list[str] | None, typer.Option(help="xla or mosaic_gpu; may be repeated.")]
Out = Annotated[Path | None, typer.Option(help="JSON lines to write; an older file is replaced.")]
Append = Annotated[bool, typer.Option("--append", help="Keep what OUT holds.")]
Runs = Annotated[int | None, typer.Option(help="Timed runs of each case.")]
Width = Annotated[int | None, typer.Option(help="Processes that compile at a time.")]
Limit = Annotated[float | None, typer.Option(help="Seconds after which the rest is given up.")]
Commit = Annotated[
    str | None, typer.Option(help="Of the tree, where it is no checkout; or SPARSESAM_COMMIT.")
]
Quick = Annotated[bool, typer.Option("--quick", help="A tiny model and a few runs.")]

_CASE = ("model", "batch", "density")
_KEYS = {
    "ceilings": ("model", "batch", "implementation", "shape"),
    "kernels": ("op", *_CASE, "order", "peer", "implementation"),
    "encoder": (*_CASE, "sparse", "peer", "implementation", "dtype"),
    "end-to-end": ("model", "density", "implementation", "prompts"),
    "scaling": ("model", "batch", "image_size", "density", "implementation"),
}


def _suite(name: str) -> Any:
    """The suite's module; imported when it is asked for, because JAX takes seconds."""
    return importlib.import_module(f"benchmarks.suites.{name.replace('-', '_')}")


def finish(run: Callable[[], int]) -> None:
    """Exit code 2 and one line for a wrong argument, else what the suite says."""
    try:
        code = run()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if code:
        raise typer.Exit(code)


@contextlib.contextmanager
def _processes(quick: bool) -> Iterator[Children]:
    """Where a suite's processes come from: quick ones use the same again, and compile quickly."""
    children = Children(keep=quick)
    if quick:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {flags}".strip()
    try:
        yield children
    finally:
        children.close()


def _measure(
    name: str, *, out: Path | None, append: bool, quick: bool, parts: int = 0, **given: Any
) -> None:
    """A suite with the options that are given, else its own; its tables last."""
    suite = _suite(name)
    given = {field: value for field, value in given.items() if value not in (None, [], {})}

    def run() -> int:
        options = dataclasses.replace(suite.QUICK if quick else suite.Options(), **given)
        with records.writer(out, append=append) as write, _processes(quick) as children:
            outcome = pool.measure(suite.jobs(options), options, write, children)
        _show(name, outcome)
        for record in outcome.results:
            _print_parts(record, parts)
        return outcome.exit_code

    finish(run)


def _show(name: str, outcome: Outcome) -> None:
    own = [r for r in outcome.results if r["suite"] == name]
    tables.show(name, own, _KEYS[name])
    if name == "end-to-end":
        tables.show_parts(own, _KEYS[name])
    if name == "scaling":
        from benchmarks.report import growth

        tables.print_table("Growth: exponents of power laws", growth.COLUMNS, growth.fits(own))


def _print_parts(record: Record, count: int) -> None:
    for part, ms in list(record.get("parts_ms", {}).items())[:count]:
        label = f"{record['model']} B{record['batch']} r{record['density']}"
        print(f"{label} {record['implementation']} {ms:8.3f} ms  {part[:90]}", flush=True)


def encoder(
    model: Model = None,
    batch: Batch = None,
    density: Density = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(help="xla, mosaic_gpu or a PyTorch peer; may be repeated. Without it: all."),
    ] = None,
    ranking: Annotated[str | None, typer.Option(help="Of `Sparsity`, sparse cases.")] = None,
    split: Annotated[str | None, typer.Option(help="Of `Sparsity`, sparse cases.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of all: bfloat16 without it.")] = None,
    check: Annotated[bool, typer.Option(help="Compare with float32 XLA before timing.")] = True,
    decomposition: Annotated[
        list[float] | None,
        typer.Option(help="Density of sparse attention with the whole MLP; may be repeated."),
    ] = None,
    parts: Annotated[int, typer.Option(help="Longest kernels of our cases to print.")] = 0,
    runs: Runs = None,
    width: Width = None,
    limit: Limit = None,
    commit: Commit = None,
    out: Out = None,
    append: Append = False,
    quick: Quick = False,
) -> None:
    """Our encoder, XLA and the kernels, beside PyTorch peers on the same weights."""
    sparse = {"ranking": ranking, "split": split}
    _measure(
        "encoder",
        out=out,
        append=append,
        quick=quick,
        parts=parts,
        models=model,
        batches=batch,
        densities=density,
        implementations=implementation,
        sparse={name: value for name, value in sparse.items() if value},
        dtype=dtype,
        check=check,
        decomposition=decomposition,
        runs=runs,
        width=width,
        limit=limit,
        commit=commit,
    )


def kernels(
    model: Model = None,
    batch: Batch = None,
    density: Density = None,
    op: Annotated[
        list[str] | None, typer.Option(help="stripe, window or mlp. Without it: all.")
    ] = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(help="mosaic_gpu, xla, eager, sdpa, compile or flex. Without it: all."),
    ] = None,
    runs: Runs = None,
    width: Width = None,
    limit: Limit = None,
    commit: Commit = None,
    out: Out = None,
    append: Append = False,
    quick: Quick = False,
) -> None:
    """Stripe attention, window attention and the MLP: Mosaic, XLA and PyTorch."""
    _measure(
        "kernels",
        out=out,
        append=append,
        quick=quick,
        models=model,
        batches=batch,
        densities=density,
        ops=op,
        implementations=implementation,
        runs=runs,
        width=width,
        limit=limit,
        commit=commit,
    )


def ceilings(
    model: Model = None,
    batch: Batch = None,
    runs: Runs = None,
    width: Width = None,
    limit: Limit = None,
    commit: Commit = None,
    out: Out = None,
    append: Append = False,
    quick: Quick = False,
) -> None:
    """Products at the model's shapes, attention without bias, and a copy: what the device gives."""
    _measure(
        "ceilings",
        out=out,
        append=append,
        quick=quick,
        models=model,
        batches=batch,
        runs=runs,
        width=width,
        limit=limit,
        commit=commit,
    )


def end_to_end(
    model: Model = None,
    density: Density = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(
            help="xla, mosaic_gpu, transformers or transformers-compile; may be repeated. "
            "Without it: all."
        ),
    ] = None,
    runs: Runs = None,
    width: Width = None,
    limit: Limit = None,
    commit: Commit = None,
    out: Out = None,
    append: Append = False,
    quick: Quick = False,
) -> None:
    """An image in, masks out, with 1 and 10 prompts, and the parts; beside transformers."""
    _measure(
        "end-to-end",
        out=out,
        append=append,
        quick=quick,
        models=model,
        densities=density,
        implementations=implementation,
        runs=runs,
        width=width,
        limit=limit,
        commit=commit,
    )


def scaling(
    model: Model = None,
    axis: Annotated[
        list[str] | None, typer.Option(help="batch, image_size or density. Without it: all.")
    ] = None,
    density: Density = None,
    implementation: Ours = None,
    runs: Runs = None,
    width: Width = None,
    limit: Limit = None,
    commit: Commit = None,
    out: Out = None,
    append: Append = False,
    quick: Quick = False,
) -> None:
    """Our encoder against batch (1 to 64), image size (512 to 2048) and density, with exponents."""
    _measure(
        "scaling",
        out=out,
        append=append,
        quick=quick,
        models=model,
        axes=axis,
        densities=density,
        implementations=implementation,
        runs=runs,
        width=width,
        limit=limit,
        commit=commit,
    )


def quick(out: Out = None) -> None:
    """All GPU suites at tiny shapes, in at most 60 seconds on a CPU."""

    def run() -> int:
        codes = []
        with records.writer(out) as write, _processes(True) as children:
            for name in _KEYS:
                print(f"== {name}", flush=True)
                suite = _suite(name)
                outcome = pool.measure(suite.jobs(suite.QUICK), suite.QUICK, write, children)
                codes.append(outcome.exit_code)
                if outcome.interrupted:
                    break
        return max(codes)

    finish(run)
