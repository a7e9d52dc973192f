"""The command line of what looks into the encoder: `sparsesam calibrate` and `figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsesam_jax.cli.lists import ListsCommand

FigureKind = Literal["update-norms", "correlation", "attention", "orders", "extreme"]
Preset = Literal["sparsesam", "released"]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(calibrate)
    app.command(cls=ListsCommand)(figures)


def calibrate(
    images: Annotated[Path, typer.Option(help="Folder of photos; no masks are needed.")],
    density: Annotated[
        float, typer.Option(help="The budget: what this density computes in all blocks.")
    ] = 0.4,
    preset: Annotated[Preset, typer.Option(help="What a density keeps.")] = "sparsesam",
    weights: Annotated[str, typer.Option(help="vit_t (embedded) or a converted file.")] = "vit_t",
    limit: Annotated[int, typer.Option(help="Only the first N photos.")] = 8,
    probes: Annotated[int, typer.Option(help="Random directions a photo.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the directions.")] = 0,
    out: Annotated[Path, typer.Option(help="The JSON, for `evaluate --sparsity`.")] = Path(
        "calibrated.json"
    ),
) -> None:
    """Give every block's attention and MLP its own density, at equal computed work.

    Measures on a handful of photos how much each density of each block changes the features, to
    first order, and spends the work where it saves most error.
    """
    from rich.console import Console

    for name, value in (("limit", limit), ("probes", probes)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise ValueError(f"out must be a file in a folder, got {str(out)!r}")
    paths = photo_paths(images)[:limit]
    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.config import Sparsity
    from sparsesam_jax.evaluation.calibrate import run

    sparsity = Sparsity(density) if preset == "sparsesam" else Sparsity.released(density)
    sam = Sam.from_pretrained(weights)
    run(sam, sparsity, paths, out, Console(), probes=probes, seed=seed)
    typer.echo(f"wrote {out}")


def figures(
    kind: Annotated[FigureKind, typer.Argument(help="Which figure.", show_default=False)],
    images: Annotated[Path, typer.Option(help="Folder of photos.")],
    weights: Annotated[str, typer.Option(help="vit_t (embedded) or a converted file.")] = "vit_t",
    density: Annotated[
        list[float] | None,
        typer.Option(metavar="R ...", help="[attention, orders 0.3; extreme 0.3 0.2 0.1 0.05]"),
    ] = None,
    limit: Annotated[int, typer.Option(help="Only the first N photos.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for pictures and numbers.")] = Path("figures"),
) -> None:
    """The SparseSAM paper's figures on one's own photos, and their numbers as KIND.json.

    update-norms: the MLP's update of every token, block by block (Fig. 10). correlation: of
    importance with it (Fig. 4). attention: before and after the permutation (Fig. 3). orders: error
    with other curves, layouts, rankings (Fig. 9). extreme: masks at very low densities (Fig. 8).
    """
    from sparsesam_jax.config import Sparsity

    if limit < 1:
        raise ValueError(f"limit must be positive, got {limit}")
    densities = density or ([0.3, 0.2, 0.1, 0.05] if kind == "extreme" else [0.3])
    for value in densities:
        Sparsity(value)
    paths = photo_paths(images)[:limit]
    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.evaluation.figures import draw

    draw(kind, Sam.from_pretrained(weights), paths, out, densities)
    typer.echo(f"wrote {out}")


def photo_paths(folder: Path) -> list[Path]:
    """The files of a folder, sorted.

    Raises:
        ValueError: It is no folder, or it is empty.
    """
    if not folder.is_dir():
        raise ValueError(f"images must be a folder, got {str(folder)!r}")
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not paths:
        raise ValueError(f"images must hold at least one photo, got none in {folder}")
    return paths
