"""The commands of `sparsesam`, one function each, and its global options."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from sparsesam_jax.cli import (
    analysis,
    compilation_cache,
    convert,
    dataset,
    demo,
    evaluate,
    everything,
    info,
    segment,
    tune,
)
from sparsesam_jax.cli.options import Command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"sparsesam {importlib.metadata.version('sparsesam-jax')}")
        raise typer.Exit
    return wanted


@app.callback()
def _sparsesam(
    cache: Annotated[
        str | None,
        typer.Option(
            "--compilation-cache",
            metavar="PATH|off",
            help="Where compiled programs are kept. Without it: where JAX_COMPILATION_CACHE_DIR "
            "and JAX_ENABLE_COMPILATION_CACHE say, else in the user's cache folder.",
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """SAM in Flax NNX with SparseSAM's sparse attention: promptable segmentation of photos."""
    if problem := compilation_cache.configure(cache):
        typer.echo(f"warning: {problem}", err=True)


for _command in (
    demo.demo,
    segment.segment,
    everything.everything,
    dataset.embed,
    dataset.segment_dataset,
    info.info,
    convert.convert,
    evaluate.evaluate,
    evaluate.evaluate_coco,
    analysis.calibrate,
    analysis.figures,
    tune.tune,
):
    app.command(cls=Command)(_command)
app.add_typer(dataset.store, name="store")
