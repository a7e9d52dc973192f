"""`sparsesam convert`, which is also `python -m convert`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sparsesam_jax.choices import Dtype, Format
from sparsesam_jax.cli.program import run


def convert(
    src: Annotated[
        Path, typer.Argument(help="Checkpoint: .pth, .safetensors or a Hugging Face folder.")
    ],
    dst: Annotated[Path, typer.Argument(help="What to write; a file that exists is replaced.")],
    to: Annotated[
        Format | None,
        typer.Option(help="Format of DST. Without it: .pth is meta, .safetensors is native."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of all tensors. Without it: as in SRC.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="JSON of a SamConfig, for a checkpoint whose tensors leave it open."),
    ] = None,
) -> None:
    """Convert a SAM or SAM-HQ checkpoint between Meta's, Hugging Face's and the native format."""
    from sparsesam_jax.config import SamConfig

    if not src.exists():
        raise ValueError(f"SRC must be a checkpoint, got {str(src)!r}, which does not exist")
    given = None if config is None else SamConfig.from_json(config.read_text(encoding="utf-8"))
    from sparsesam_jax.checkpoints import convert_checkpoint

    convert_checkpoint(src, dst, to=to, dtype=dtype, config=given, progress=True)
    typer.echo(f"wrote {dst}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(convert)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command alone; arguments and result as `sparsesam_jax.cli.app.main`."""
    return run("sparsesam_jax.cli.convert", args, "python -m convert")


if __name__ == "__main__":
    sys.exit(main())
