"""The command line: `python -m convert SRC DST`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sparsesam_jax.checkpoints import Dtype, Format, convert_checkpoint
from sparsesam_jax.config import SamConfig


def convert_command(
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
    given = None if config is None else SamConfig.from_json(config.read_text(encoding="utf-8"))
    convert_checkpoint(src, dst, to=to, dtype=dtype, config=given, progress=True)
    typer.echo(f"wrote {dst}")


app = typer.Typer(add_completion=False)
app.command()(convert_command)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 for wrong input."""
    try:
        arguments = None if args is None else [*args]
        return app(args=arguments, prog_name="python -m convert", standalone_mode=False) or 0
    except typer.TyperException as error:
        message = error.format_message()
    except (ValueError, OSError) as error:
        message = str(error)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
