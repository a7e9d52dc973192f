"""The commands that measure; `--quick` runs each suite at tiny shapes, on a CPU too."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import records
from benchmarks.report import tables
from benchmarks.run import pool
from benchmarks.run.options import parameters
from benchmarks.run.pool import Children

GPU_SUITES = ("ceilings", "kernels", "encoder", "end-to-end", "scaling")
SUITES = ("cpu", *GPU_SUITES, "tune")
Out = Annotated[Path | None, typer.Option(help="JSON lines to write; an older file is replaced.")]
_Append = Annotated[bool, typer.Option("--append", help="Keep what OUT holds.")]
_List = Annotated[bool, typer.Option("--list", help="Print the cases and stop.")]
_Quick = Annotated[bool, typer.Option("--quick", help="A tiny model and a few runs.")]


def finish(run: Callable[[], int]) -> None:
    """Exit code 2 and one line for a wrong argument, else what the command says."""
    try:
        code = run()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if code:
        raise typer.Exit(code)


def add_suites(app: typer.Typer) -> None:
    """A command for every suite, with the options of its dataclass."""
    for name in SUITES:
        app.command(name)(_command(name))
    app.command()(quick)


def _suite(name: str) -> Any:
    return importlib.import_module(f"benchmarks.suites.{name.replace('-', '_')}")


def _command(name: str) -> Callable[..., None]:
    suite = _suite(name)

    def command(
        out: Out = None,
        append: _Append = False,
        list_cases: _List = False,
        quick: _Quick = False,
        **given: Any,
    ) -> None:
        chosen = {field: value for field, value in given.items() if value not in (None, [])}

        def run() -> int:
            options = dataclasses.replace(
                suite.Options.quick() if quick else suite.Options(), **chosen
            )
            if list_cases:
                print("\n".join(job.label for job in suite.jobs(options)))
                return 0
            fast = quick and not options.turns
            with records.writer(out, append=append) as write, _processes(quick, fast) as children:
                outcome = pool.run(suite.jobs(options), options, write, children)
            own = [r for r in outcome.results if r["suite"] == name]
            tables.show(name, own, suite.KEYS)
            if hasattr(suite, "show"):
                suite.show(own, options)
            return outcome.exit_code

        finish(run)

    fixed = inspect.signature(command, eval_str=True).parameters.values()
    own = [p for p in fixed if p.kind is not inspect.Parameter.VAR_KEYWORD]
    chosen = parameters(suite.Options)
    command.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [*chosen, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
    )
    command.__annotations__ = {p.name: p.annotation for p in (*chosen, *own)}
    command.__doc__ = (suite.__doc__ or "").split("\n\n")[0]
    return command


@contextlib.contextmanager
def _processes(keep: bool, fast: bool) -> Iterator[Children]:
    """Where a suite's processes come from; fast ones compile quickly."""
    children = Children(keep=keep)
    if fast:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {flags}".strip()
    try:
        yield children
    finally:
        children.close()


def quick(out: Out = None) -> None:
    """All GPU suites at tiny shapes, in at most 60 seconds on a CPU."""

    def run() -> int:
        codes = []
        with records.writer(out) as write, _processes(True, True) as children:
            for name in GPU_SUITES:
                print(f"== {name}", flush=True)
                options = _suite(name).Options.quick()
                outcome = pool.run(_suite(name).jobs(options), options, write, children)
                codes.append(outcome.exit_code)
                if outcome.interrupted:
                    break
        return max(codes)

    finish(run)
