"""`sparsesam info`: what a weights file holds, and what its encoder computes at some densities."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsesam_jax.cli.options import DensitiesOption

if TYPE_CHECKING:
    from pallas_kernels import BlockLayout
    from sparsesam_jax.checkpoints.native import TensorSpec
    from sparsesam_jax.config import ImageEncoderConfig, Sparsity

DENSITIES = [0.3, 0.4, 0.5]


def info(
    weights: Annotated[
        str, typer.Argument(help="vit_t (embedded), or a checkpoint: a file or a folder.")
    ],
    density: DensitiesOption = DENSITIES,
    layout: Annotated[
        Path | None, typer.Option(help="A picture of the block layouts at these densities.")
    ] = None,
) -> None:
    """Describe a checkpoint, and what an encoder of their shape computes at some densities."""
    from sparsesam_jax.checkpoints.sources import locate
    from sparsesam_jax.config import Sparsity
    from sparsesam_jax.predict.image_files import check_writable, write_images

    if layout is not None:
        check_writable(layout)
    sparsities = [Sparsity(value) for value in density]
    path = locate(weights)

    from sparsesam_jax.checkpoints import open_checkpoint, size_in_bytes
    from sparsesam_jax.predict.overlay import draw_layouts

    checkpoint = open_checkpoint(path)
    config, tensors = checkpoint.config, checkpoint.tensors
    count = sum(math.prod(spec.shape) for spec in tensors.values())
    dtypes = ", ".join(sorted({spec.dtype for spec in tensors.values()}))
    fields = json.loads(config.to_json())
    encoder = fields.pop("image_encoder")
    typer.echo(f"weights        {checkpoint.metadata.get('name', path.name)} ({path})")
    typer.echo(f"format         {', '.join([checkpoint.format, *checkpoint.remarks])}")
    typer.echo(f"size           {size_in_bytes(path) / 1e6:.1f} MB, {dtypes}")
    typer.echo(f"parameters     {count:,} in {len(tensors)} tensors")
    for title, values in (("image encoder", encoder), ("decoder", fields)):
        typer.echo(f"{title:15}" + ", ".join(f"{key} {value}" for key, value in values.items()))
    typer.echo(f"encoder size   {_sizes_as_text(tensors)}")
    rows = []
    for sparsity in sparsities:
        layouts = _layouts(config.image_encoder, sparsity)
        typer.echo(f"density {sparsity.density:g}")
        for kind, one in layouts.items():
            typer.echo(f"  {kind:10} {_layout_as_text(one)}")
        typer.echo(f"  {'MLP':10} {_routing_as_text(config.image_encoder, sparsity)}")
        rows.append([(f"{kind}, density {sparsity.density:g}", x) for kind, x in layouts.items()])
    if layout is not None:
        write_images({layout: draw_layouts(rows)})
        typer.echo(f"wrote {layout}")


def _sizes_as_text(tensors: Mapping[str, TensorSpec]) -> str:
    """Bytes of the image encoder's parameters in 16 bits and with products in float8."""
    shapes = {n: spec.shape for n, spec in tensors.items() if n.startswith("image_encoder.")}
    kernels = [s for n, s in shapes.items() if ".blocks." in n and n.endswith(".kernel")]
    whole = 2 * sum(map(math.prod, shapes.values()))
    # A byte a weight in the place of two, and a float32 scale an output channel.
    smaller = whole + sum(4 * shape[1] - math.prod(shape) for shape in kernels)
    return f"{whole / 1e6:.1f} MB in 16 bits, {smaller / 1e6:.1f} MB with --products float8"


def _layouts(config: ImageEncoderConfig, sparsity: Sparsity) -> dict[str, BlockLayout]:
    """The layout of each kind of attention that the encoder has."""
    from sparsesam_jax.sparsity.plan import attention_layout

    grid = (config.grid_size, config.grid_size)
    layouts: dict[str, BlockLayout] = {}
    for index in range(config.depth):
        kind = "global" if config.is_global(index) else "windowed"
        layouts.setdefault(kind, attention_layout(config, sparsity, index, grid))
    return layouts


def _layout_as_text(layout: BlockLayout) -> str:
    diagonal = " and the diagonal" if layout.diagonal else ""
    return (
        f"{layout.bar_len} of {layout.seq_len} keys{diagonal}; {layout.kv_num_blocks.sum()} of "
        f"{layout.num_q_blocks * layout.num_kv_blocks} blocks ({layout.density:.3f})"
    )


def _routing_as_text(config: ImageEncoderConfig, sparsity: Sparsity) -> str:
    """What the MLPs run on."""
    from sparsesam_jax.sparsity.plan import num_routed_tokens

    grid = (config.grid_size, config.grid_size)
    counts = {
        index: count
        for index in range(config.depth)
        if (count := num_routed_tokens(config, sparsity, index, grid)) is not None
    }
    if not counts:
        return "all tokens in all blocks"
    blocks = " ".join(map(str, counts))
    tokens = next(iter(counts.values()))
    return f"{tokens} of {grid[0] * grid[1]} tokens in blocks {blocks}; all in the others"
