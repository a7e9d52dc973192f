"""What looks into the encoder: `sparsesam calibrate` and `figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsesam_jax.choices import FigureKind, Preset
from sparsesam_jax.cli.options import (
    BitsOption,
    MaxPixelsOption,
    ProductsOption,
    ValueRangeOption,
    WeightsOption,
    check_positive,
)


def calibrate(
    images: Annotated[str, typer.Option(help="Folder or pattern of photos; no masks are needed.")],
    density: Annotated[
        float, typer.Option(help="The budget: what this density computes in all blocks.")
    ] = 0.4,
    preset: Annotated[Preset, typer.Option(help="What a density keeps.")] = "sparsesam",
    weights: WeightsOption = "vit_t",
    limit: Annotated[int, typer.Option(help="Only the first N photos.")] = 8,
    probes: Annotated[int, typer.Option(help="Random directions a photo.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the directions.")] = 0,
    bits: BitsOption = None,
    value_range: ValueRangeOption = None,
    max_pixels: MaxPixelsOption = None,
    out: Annotated[Path, typer.Option(help="The JSON, for `evaluate --sparsity`.")] = Path(
        "calibrated.json"
    ),
) -> None:
    """Give every block's attention and MLP its own density, at equal computed work.

    Measures on a handful of photos how much each density of each block changes the features, to
    first order, and spends the work where it saves most error.
    """
    from sparsesam_jax.checkpoints.atomic import check_file
    from sparsesam_jax.checkpoints.sources import locate
    from sparsesam_jax.config import Sparsity
    from sparsesam_jax.predict.image_files import PhotoReader, find_photos

    check_positive(limit=limit, probes=probes)
    reader = PhotoReader(bits=bits, value_range=value_range, max_pixels=max_pixels)
    check_file(out, "out")
    sparsity = Sparsity(density) if preset == "sparsesam" else Sparsity.released(density)
    photos = [reader.read(path) for path in find_photos([images])[:limit]]
    locate(weights)

    from rich.console import Console

    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.evaluation.calibrate import run

    run(Sam.from_pretrained(weights), sparsity, photos, out, Console(), probes=probes, seed=seed)
    typer.echo(f"wrote {out}")


def figures(
    kind: Annotated[FigureKind, typer.Argument(help="Which figure.", show_default=False)],
    images: Annotated[str, typer.Option(help="Folder or pattern of photos.")],
    weights: WeightsOption = "vit_t",
    density: Annotated[
        list[float] | None,
        typer.Option(metavar="R ...", help="[attention, orders 0.3; extreme 0.3 0.2 0.1 0.05]"),
    ] = None,
    limit: Annotated[int, typer.Option(help="Only the first N photos.")] = 3,
    products: ProductsOption = "dtype",
    bits: BitsOption = None,
    value_range: ValueRangeOption = None,
    max_pixels: MaxPixelsOption = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and numbers.")] = Path("figures"),
) -> None:
    """The SparseSAM paper's figures on one's own photos, and their numbers as KIND.json.

    update-norms: the MLP's update of every token, block by block (Fig. 10). correlation: of
    importance with it (Fig. 4). attention: before and after the permutation (Fig. 3). orders: error
    with other curves, layouts, rankings (Fig. 9). extreme: masks at very low densities (Fig. 8).
    """
    from sparsesam_jax.checkpoints.atomic import check_folder
    from sparsesam_jax.checkpoints.sources import locate
    from sparsesam_jax.config import Sparsity
    from sparsesam_jax.predict.image_files import PhotoReader, find_photos

    check_positive(limit=limit)
    reader = PhotoReader(bits=bits, value_range=value_range, max_pixels=max_pixels)
    check_folder(out)
    densities = density or ([0.3, 0.2, 0.1, 0.05] if kind == "extreme" else [0.3])
    for value in densities:
        Sparsity(value)
    photos = {path.stem: reader.read(path) for path in find_photos([images])[:limit]}
    locate(weights)

    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.evaluation.figures import draw

    draw(kind, Sam.from_pretrained(weights, products=products), photos, out, densities)
    typer.echo(f"wrote {out}")
