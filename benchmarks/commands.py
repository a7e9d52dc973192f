"""Commands from dataclasses, and the one of every suite; `--quick` runs it tiny, on a CPU too."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.models import ParameterInfo

from benchmarks import records
from benchmarks.report import tables
from benchmarks.run.pool import Pool

GPU_SUITES = ("ceilings", "kernels", "encoder", "end-to-end", "scaling")
SUITES = ("cpu", *GPU_SUITES, "tune", "photos")
Out = Annotated[Path | None, typer.Option(help="JSON lines to write; an older file is replaced.")]
_Append = Annotated[bool, typer.Option("--append", help="Keep what OUT holds.")]
_List = Annotated[bool, typer.Option("--list", help="Print the cases and stop.")]
_Quick = Annotated[bool, typer.Option("--quick", help="A tiny model and a few runs.")]


def add(app: typer.Typer, function: Callable[..., Any], name: str | None = None) -> None:
    """A command of a function: it exits with what that returns, with 2 after a wrong argument.

    A parameter that is a dataclass becomes an option for each of its fields that is one.
    """
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    grouped: dict[str, Any] = {
        p.name: p.annotation for p in parameters if dataclasses.is_dataclass(p.annotation)
    }

    @functools.wraps(function)
    def command(context: typer.Context, **given: Any) -> None:
        try:
            for parameter, kind in grouped.items():
                fields = {f.name: given.pop(f.name) for f in _fields(kind)}
                if given.get("quick"):
                    sources = {name: str(context.get_parameter_source(name)) for name in fields}
                    told = [name for name in fields if sources[name].endswith("COMMANDLINE")]
                    changes = {name: fields[name] for name in told}
                    given[parameter] = dataclasses.replace(kind.quick(), **changes)
                else:
                    given[parameter] = kind(**fields)
            code = function(**given) or 0
        except (ValueError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            code = 2
        except KeyboardInterrupt:
            code = 130
        if code:
            raise typer.Exit(code)

    place = inspect.Parameter.KEYWORD_ONLY
    shown = [inspect.Parameter("context", place, annotation=typer.Context)]
    shown += [_listed(p.replace(kind=place)) for p in parameters if p.name not in grouped]
    shown += [field for kind in grouped.values() for field in _fields(kind)]
    command.__signature__ = inspect.Signature(shown)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {p.name: p.annotation for p in shown}
    app.command(name)(command)


def _fields(kind: type[Any]) -> Iterator[inspect.Parameter]:
    """Parameters of the fields that are annotated as options; a sequence may be repeated."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        _, *extras = typing.get_args(hints[field.name]) or (None,)
        if extras and isinstance(extras[0], ParameterInfo):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            elif default is dataclasses.MISSING:
                default = inspect.Parameter.empty
            place, hint = inspect.Parameter.KEYWORD_ONLY, hints[field.name]
            yield _listed(inspect.Parameter(field.name, place, default=default, annotation=hint))


def _listed(parameter: inspect.Parameter) -> inspect.Parameter:
    """A sequence as Typer has it, which may be repeated."""
    hint, *extras = typing.get_args(parameter.annotation) or (None,)
    if typing.get_origin(hint) is not collections.abc.Sequence:
        return parameter
    return parameter.replace(annotation=Annotated[list[typing.get_args(hint)[0]], *extras])


def add_suites(app: typer.Typer) -> None:
    """A command for every suite, with the options of its dataclass."""
    for name in SUITES:
        add(app, _command(name), name)
    add(app, quick)


def _suite(name: str) -> Any:
    return importlib.import_module(f"benchmarks.suites.{name.replace('-', '_')}")


def _command(name: str) -> Callable[..., int]:
    suite = _suite(name)

    def command(
        options: Any,
        out: Out = None,
        append: _Append = False,
        list_cases: _List = False,
        quick: _Quick = False,
    ) -> int:
        if list_cases:
            print("\n".join(job.label for job in suite.jobs(options)))
            return 0
        fast = quick and not options.turns
        with records.writer(out, append=append) as write, Pool(keep=quick, fast=fast) as pool:
            outcome = pool.run(suite.jobs(options), options, write)
        own = [r for r in outcome.results if r["suite"] == name]
        tables.show(name, own, suite.KEYS)
        if hasattr(suite, "show"):
            suite.show(own, options)
        return outcome.exit_code

    command.__annotations__["options"] = suite.Options
    command.__doc__ = (suite.__doc__ or "").split("\n\n")[0]
    return command


def quick(out: Out = None) -> int:
    """All GPU suites at tiny shapes, in at most 60 seconds on a CPU."""
    codes = []
    with records.writer(out) as write, Pool(keep=True, fast=True) as pool:
        for name in GPU_SUITES:
            print(f"== {name}", flush=True)
            options = _suite(name).Options.quick()
            codes.append(pool.run(_suite(name).jobs(options), options, write).exit_code)
            if codes[-1] == 130:
                break
    return max(codes)
