"""`sparsesam calibrate`: a density for every block's attention and MLP, at equal computed work.

Of every block, each density of its attention and of its MLP alone changes the block's output by
some Delta. To first order that changes the encoder's features F by `J Delta`, J the derivative of F
by the block's output, and with random directions u (unit normal)

    E_u (u^T J Delta)^2 = ||J Delta||^2,

so one gradient `u^T J` an image and direction gives the error of every choice at once. Errors of
different blocks are taken as independent and add up, relative to `||F||^2`. From the cheapest
choices on, the step that saves most error per multiply-accumulate is taken as long as the sum stays
within the work that the same sparsity computes with one density for all blocks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.evaluation.sparsity_file import write_sparsity
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.transforms import normalise, resize_and_pad
from sparsesam_jax.sparsity.plan import Rankings, check_sparsity, encoder_plan
from sparsesam_jax.sparsity.split import block_densities
from sparsesam_jax.sparsity.work import BlockWork, encoder_work

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)


class Choice(NamedTuple):
    """A density of one block's attention or MLP.

    Attributes:
        block: The block.
        part: `attention` or `mlp`.
        density: What that part keeps.
        work: What the part then computes, in multiply-accumulates.
    """

    block: int
    part: str
    density: float
    work: int


def choices(config: ImageEncoderConfig, sparsity: Sparsity) -> list[list[Choice]]:
    """For every part of every block its choices, the cheapest first; dense is the last.

    Of densities that compute the same (a block layout has few) the largest stands for all. A part
    that the sparsity never touches has one choice.
    """
    found = []
    each = {level: encoder_work(config, at(sparsity, level, level)) for level in LEVELS}
    for block, part in itertools.product(range(config.depth), ("attention", "mlp")):
        by_work: dict[int, Choice] = {}
        for level in LEVELS:
            work = _part(each[level].blocks[block], part)
            by_work[work] = Choice(block, part, level, work)
        found.append([by_work[work] for work in sorted(by_work)])
    return found


def at(
    sparsity: Sparsity,
    attention: float | tuple[float, ...],
    mlp: float | tuple[float, ...],
) -> Sparsity:
    """The sparsity with other densities."""
    return dataclasses.replace(sparsity, attention_density=attention, mlp_density=mlp)


def measure(
    encoder: ImageEncoder,
    sparsity: Sparsity,
    images: Iterable[np.ndarray],
    parts: Sequence[Sequence[Choice]],
    *,
    probes: int = 4,
    seed: int = 0,
) -> list[Float[np.ndarray, " choices"]]:
    """The relative squared error of the features for every choice, mean over the images.

    Args:
        encoder: A dense encoder.
        sparsity: How a density chooses what it keeps.
        images: Photos, RGB, [height, width, 3].
        parts: As `choices` gives them.
        probes: Random directions an image.
        seed: Of the directions.
    """
    wanted = [[choice for choice in part if choice.density < 1] for part in parts]
    compiled = nnx.jit(_errors, static_argnums=(1, 2))
    key = jax.random.key(seed)
    totals: list[np.ndarray] = []
    frozen = tuple(tuple(part) for part in wanted)
    for image in images:
        padded, size = resize_and_pad(image, encoder.config.image_size)
        pixels = normalise(jnp.asarray(padded[None]), jnp.asarray([size]))
        for _ in range(probes):
            key, probe = jax.random.split(key)
            totals.append(np.asarray(compiled(encoder, sparsity, frozen, pixels, probe)))
    if not totals:
        raise ValueError("images must have at least one, got none")
    means = iter(np.mean(totals, axis=0))
    return [
        np.array([next(means) if choice.density < 1 else 0.0 for choice in part]) for part in parts
    ]


def assign(
    parts: Sequence[Sequence[Choice]],
    errors: Sequence[Float[np.ndarray, " choices"]],
    budget: int,
) -> list[Choice]:
    """One choice a part, within a budget of multiply-accumulates for all parts.

    Raises:
        ValueError: The cheapest choices are over the budget.
    """
    taken = [0] * len(parts)
    spent = sum(part[0].work for part in parts)
    if spent > budget:
        raise ValueError(f"budget must allow the cheapest choices ({spent}), got {budget}")
    while True:
        best: tuple[float, int, int] | None = None
        for index, part in enumerate(parts):
            now = taken[index]
            for step in range(now + 1, len(part)):
                cost = part[step].work - part[now].work
                gain = (errors[index][now] - errors[index][step]) / cost
                if spent + cost <= budget and (best is None or gain > best[0]):
                    best = (gain, index, step)
        if best is None:
            return [part[step] for part, step in zip(parts, taken, strict=True)]
        _, index, step = best
        spent += parts[index][step].work - parts[index][taken[index]].work
        taken[index] = step


def calibrate(
    sam: Sam, sparsity: Sparsity, images: Iterable[np.ndarray], *, probes: int = 4, seed: int = 0
) -> Sparsity:
    """The sparsity with densities per block that compute at most what it computes now.

    Args:
        sam: The model, dense.
        sparsity: Its densities give the budget, its other fields stay.
        images: A handful of photos.
        probes: Random directions an image.
        seed: Of the directions.

    Raises:
        ValueError: There is no image, or the sparsity does not fit the model.
        NotImplementedError: The model is in float8, which has no gradient.
    """
    config = sam.config.image_encoder
    check_sparsity(sparsity, config)
    budget = sum(
        _part(block, part)
        for block in encoder_work(config, sparsity).blocks
        for part in ("attention", "mlp")
    )
    parts = choices(config, sparsity)
    errors = measure(sam.image_encoder, sparsity, images, parts, probes=probes, seed=seed)
    chosen = {(c.block, c.part): c.density for c in assign(parts, errors, budget)}
    attention, mlp = (
        tuple(chosen[block, part] for block in range(config.depth)) for part in ("attention", "mlp")
    )
    return at(sparsity, attention, mlp)


def run(
    sam: Sam,
    sparsity: Sparsity,
    photos: Sequence[np.ndarray],
    out: Path,
    console: Console,
    *,
    probes: int,
    seed: int,
) -> Sparsity:
    """Calibrate on photos, write the JSON, print the densities."""
    found = calibrate(
        sam, sparsity, track(photos, "measuring", console=console), probes=probes, seed=seed
    )
    write_sparsity(out, found)
    console.print(table(sam.config.image_encoder, sparsity, found))
    return found


def table(config: ImageEncoderConfig, before: Sparsity, after: Sparsity) -> Table:
    """The densities of every block, and what the encoder computes before and after."""
    spent = [encoder_work(config, sparsity).total / 1e9 for sparsity in (before, after)]
    result = Table(
        title=f"densities at equal work: {spent[0]:.2f} GMAC before, {spent[1]:.2f} after",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("block", "kind", "attention", "MLP"):
        result.add_column(name, justify="right")
    for index, (attention, mlp) in enumerate(block_densities(config, after)):
        kind = "global" if config.is_global(index) else "window"
        result.add_row(str(index), kind, f"{attention:g}", f"{mlp:g}")
    return result


def _part(work: BlockWork, part: str) -> int:
    return work.attention if part == "attention" else work.mlp


def _errors(
    encoder: ImageEncoder,
    sparsity: Sparsity,
    parts: tuple[tuple[Choice, ...], ...],
    pixels: Array,
    key: Array,
) -> Array:
    """`(u^T J Delta)^2 / ||F||^2` of every choice for one direction u."""
    start = encoder.embed(pixels)
    # At density 1 the blocks are dense and rank all the same.
    grid = (start.shape[1], start.shape[2])
    options = {"grid": grid, "implementation": encoder.implementation}
    ranking = encoder_plan(encoder.config, at(sparsity, 1.0, 1.0), **options)
    dense = encoder_plan(encoder.config, None, **options)
    inputs: list[Array] = []
    outputs: list[Array] = []

    def features(shifts: list[Array]) -> Array:
        x = start
        for block, plan, shift in zip(encoder.blocks, dense, shifts, strict=True):
            x = block(x, plan, Rankings())[0] + shift
        return encoder.neck_features(x)

    x, rankings = start, Rankings()
    for block, plan in zip(encoder.blocks, ranking, strict=True):
        inputs.append(x)
        x, rankings = block(x, plan, rankings)
        outputs.append(x)
    whole, pull = jax.vjp(features, [jnp.zeros_like(x) for x in outputs])
    direction = jax.random.normal(key, whole.shape, whole.dtype)
    (slopes,) = pull(direction)
    found = []
    for choice in itertools.chain.from_iterable(parts):
        attention = choice.density if choice.part == "attention" else 1.0
        mlp = choice.density if choice.part == "mlp" else 1.0
        index = choice.block
        sparse = encoder_plan(encoder.config, at(sparsity, attention, mlp), **options)[index]
        # What the block would rank is ranked: it reads what was found when all was dense.
        sparse = dataclasses.replace(sparse, ranks=False)
        changed, _ = encoder.blocks[index](inputs[index], sparse, rankings)
        change = changed - outputs[index]
        found.append((slopes[index] * change).astype(jnp.float32).sum() ** 2)
    return jnp.stack(found) / (whole.astype(jnp.float32) ** 2).sum()
