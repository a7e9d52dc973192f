"""`sparsesam figures`: the SparseSAM paper's figures on one's own photos.

Every figure is a picture and a JSON with the numbers in it:

- `update-norms` (Fig. 10): norm of the MLP's update of every token, a map a block.
- `correlation` (Fig. 4): rank correlation, over groups, of importance with that norm, by block.
- `attention` (Fig. 3): where attention's weight lies, in blocks of tokens, before and after the
  permutation.
- `orders` (Fig. 9): error of the features with other curves, layouts and rankings.
- `extreme` (Fig. 8): masks at very low densities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image
from scipy import stats

from pallas_kernels import BlockLayout
from sparsesam_jax.checkpoints.atomic import atomic_path, check_folder
from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.choices import Curve, FigureKind, Importance, check_choice
from sparsesam_jax.config import Sparsity
from sparsesam_jax.evaluation.metrics import iou, relative_error
from sparsesam_jax.evaluation.plots import check_matplotlib
from sparsesam_jax.evaluation.runs import write_json
from sparsesam_jax.methods.sequences import (
    Sequences,
    block_sequences,
    in_chunks,
    position_bias,
    product,
    softmax,
)
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.layers import add
from sparsesam_jax.model.transforms import normalise, resize_and_pad
from sparsesam_jax.predict.overlay import draw_masks, side_by_side
from sparsesam_jax.predict.predictor import SamPredictor
from sparsesam_jax.predict.prompts import Prompt
from sparsesam_jax.sparsity import orders
from sparsesam_jax.sparsity.importance import group_importance, rank
from sparsesam_jax.sparsity.plan import Rankings, attention_layout, encoder_plan

Photos = dict[str, np.ndarray]  # by name, RGB

_BLOCK = 64  # tokens of `attention`'s blocks, as the default sparsity has them
_SCORES: tuple[Importance, ...] = ("sobel", "dispersion")
_PANEL = 360  # longest side of a photo in `extreme`


class Trace(NamedTuple):
    """What a dense encoder does to one image.

    Attributes:
        norms: Of the MLP's update of every token, [depth, Gh, Gw].
        keys: Of the first global block, biased and of all heads, [Gh * Gw, d].
        attention: Of that block, mean over heads and queries of a block, [blocks, blocks], the
            tokens in raster order.
        permuted: The same in the order of Stripe-Sort attention.
    """

    norms: Float[Array, "depth Gh Gw"]
    keys: Float[Array, "N d"]
    attention: Float[Array, "blocks blocks"]
    permuted: Float[Array, "blocks blocks"]


def draw(kind: FigureKind, sam: Sam, photos: Photos, out: Path, densities: Sequence[float]) -> None:
    """Draw one figure into a folder.

    Args:
        kind: Which.
        sam: A dense model.
        photos: By name.
        out: The folder, which is made.
        densities: Of `orders` and `extreme`; `attention` shows the layout of the first.

    Raises:
        ValueError: There is no such figure, or the folder is not as it must be.
    """
    check_choice("figure", kind, FigureKind)
    check_matplotlib()
    check_folder(out)
    out.mkdir(exist_ok=True)
    numbers = KINDS[kind](sam, photos, out, densities)
    write_json(out / f"{kind}.json", numbers)


def trace(encoder: ImageEncoder, pixels: Float[Array, "1 H W 3"]) -> Trace:
    """Run a dense encoder on one image and keep what the figures show."""
    config = encoder.config
    x = encoder.embed(pixels)
    grid = (x.shape[1], x.shape[2])
    plans = encoder_plan(config, None, grid, encoder.implementation)
    first = min(config.global_attn_indexes)
    norms, found = [], ()
    for index, (block, plan) in enumerate(zip(encoder.blocks, plans, strict=True)):
        normed = block.norm1(x)
        if index == first:
            sequences, _ = block_sequences(block, normed, config.num_heads, None)
            keys = (sequences.k + sequences.key_bias)[0].swapaxes(0, 1)
            keys = keys.reshape(grid[0] * grid[1], -1)
            raster = jnp.arange(grid[0] * grid[1])
            found = (
                keys,
                *(_block_mass(sequences, order) for order in (raster, _sequence(keys, grid))),
            )
        x = add(x, block.attn(normed, x, plan, Rankings())[0])
        update = block.mlp(block.norm2(x))
        norms.append(jnp.linalg.norm(update[0].astype(jnp.float32), axis=-1))
        x = add(x, update)
    return Trace(jnp.stack(norms), *found)


def group_correlation(
    norms: Float[np.ndarray, "Gh Gw"], keys: Float[np.ndarray, "N d"], importance: Importance
) -> float:
    """Spearman's rho of the groups' importance and the mean update norm of their tokens."""
    grid = (norms.shape[0], norms.shape[1])
    order = orders.curve_order("morton", *grid)
    scores = group_importance(jnp.asarray(keys), order, grid=grid, importance=importance)
    full = len(order) // orders.GROUP * orders.GROUP
    groups = norms.reshape(-1)[order[:full]].reshape(-1, orders.GROUP).mean(-1)
    found: Any = stats.spearmanr(np.asarray(scores), groups)
    return float(found.statistic)


def order_variants(density: float) -> dict[str, Sparsity]:
    """The default sparsity with one of curve, layout and ranking changed at a time."""
    base = Sparsity(density)
    found = {"default": base}
    for curve in get_args(Curve):
        found[f"curve {curve}"] = dataclasses.replace(base, curve=curve)
    found["layout contiguous"] = dataclasses.replace(base, layout="contiguous")
    found["ranking block"] = dataclasses.replace(base, ranking="block")
    found["ranking none"] = dataclasses.replace(base, ranking="none")
    return {name: value for name, value in found.items() if name == "default" or value != base}


def _update_norms(sam: Sam, photos: Photos, out: Path, densities: Sequence[float]) -> Any:
    from matplotlib.figure import Figure

    numbers = {}
    for name, found in _traces(sam, photos).items():
        norms = np.asarray(found.norms)
        columns = min(6, len(norms) + 1)
        rows = -(-(len(norms) + 1) // columns)
        figure = Figure(figsize=(2.2 * columns, 2.4 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        axes[0].imshow(resize_and_pad(photos[name], sam.config.image_encoder.image_size)[0])
        axes[0].set_title(name)
        for index, values in enumerate(norms):
            shown = axes[index + 1].imshow(values)
            axes[index + 1].set_title(f"block {index}: {values.mean():.2f}")
            figure.colorbar(shown, ax=axes[index + 1], shrink=0.7)
        _save(figure, axes, out / f"update-norms_{name}.png")
        numbers[name] = {"mean": norms.mean((1, 2)).tolist(), "std": norms.std((1, 2)).tolist()}
    return numbers


def _correlation(sam: Sam, photos: Photos, out: Path, densities: Sequence[float]) -> Any:
    from matplotlib.figure import Figure

    found = _traces(sam, photos).values()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    numbers = {}
    for importance in _SCORES:
        rho = np.array([_correlations(one, importance) for one in found])
        numbers[importance] = {"rho": rho.mean(0).tolist(), "std": rho.std(0).tolist()}
        axis.errorbar(range(rho.shape[1]), rho.mean(0), rho.std(0), marker="o", label=importance)
    axis.set_xlabel("block")
    axis.set_ylabel("rank correlation with the MLP's update norm")
    axis.set_title(f"importance at the first global block, {len(photos)} photos")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.legend()
    _save(figure, [], out / "correlation.png")
    return numbers


def _attention(sam: Sam, photos: Photos, out: Path, densities: Sequence[float]) -> Any:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    config = sam.config.image_encoder
    first = min(config.global_attn_indexes)
    sparsity = Sparsity(densities[0])
    layout = attention_layout(config, sparsity, first, (config.grid_size, config.grid_size))
    numbers = {}
    for name, found in _traces(sam, photos).items():
        masses = {"raster order": found.attention, "Stripe-Sort order": found.permuted}
        figure = Figure(figsize=(11, 5), layout="constrained")
        axes = figure.subplots(1, 2)
        kept = {}
        for axis, (title, values) in zip(axes, masses.items(), strict=True):
            values = np.asarray(values)
            kept[title] = _kept_mass(values, layout)
            shown = axis.imshow(values, norm=LogNorm(vmin=max(values.min(), 1e-5)))
            axis.set_title(f"{title}: {100 * kept[title]:.1f} % of the weight in the layout")
            skipped = np.ma.masked_where(layout.block_mask, np.ones(values.shape))
            axis.imshow(skipped, cmap="Reds", vmin=0, vmax=1, alpha=0.25)
            figure.colorbar(shown, ax=axis, shrink=0.8)
        figure.suptitle(
            f"{name}, block {first}, in blocks of {_BLOCK} tokens; tinted: not computed at "
            f"density {densities[0]:g}"
        )
        _save(figure, axes, out / f"attention_{name}.png")
        numbers[name] = {"density": layout.density, "kept": kept}
    return numbers


def _orders(sam: Sam, photos: Photos, out: Path, densities: Sequence[float]) -> Any:
    from matplotlib.figure import Figure

    pixels = {name: _pixels(sam, photo) for name, photo in photos.items()}
    encode = nnx.jit(lambda encoder, x: encoder(x))
    dense = {name: encode(sam.image_encoder, x) for name, x in pixels.items()}
    numbers: dict[str, dict[str, float]] = {}
    for density in densities:
        for variant, sparsity in order_variants(density).items():
            encoder = sam.with_sparsity(sparsity).image_encoder
            errors = [
                float(relative_error(encode(encoder, x), dense[name])[0])
                for name, x in pixels.items()
            ]
            numbers.setdefault(variant, {})[f"{density:g}"] = float(np.mean(errors))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(densities)
    for index, density in enumerate(densities):
        heights = [values[f"{density:g}"] for values in numbers.values()]
        places = np.arange(len(heights)) + index * width
        axis.bar(places, heights, width, label=f"density {density:g}")
    axis.set_xticks(np.arange(len(numbers)) + 0.4 - width / 2, list(numbers), rotation=30)
    axis.set_ylabel("relative error of the features")
    axis.set_title(f"{len(photos)} photos")
    axis.legend()
    _save(figure, [], out / "orders.png")
    return numbers


def _extreme(sam: Sam, photos: Photos, out: Path, densities: Sequence[float]) -> Any:
    models = {"dense": sam} | {f"{r:g}": sam.with_sparsity(Sparsity(r)) for r in densities}
    panels: dict[str, list[tuple[str, Image.Image]]] = {name: [] for name in photos}
    numbers: dict[str, dict[str, float]] = {name: {} for name in photos}
    dense: dict[str, np.ndarray] = {}
    for title, model in models.items():
        predictor = SamPredictor(model)
        for name, photo in photos.items():
            centre = np.array([[photo.shape[1] / 2, photo.shape[0] / 2]])
            prompt = Prompt(centre, np.ones(1, np.int32), None)
            predictor.set_image(photo)
            masks, _, _ = predictor.predict(**prompt.arguments, multimask_output=False)
            agreement = iou(masks[0], dense.setdefault(name, masks[0]))
            numbers[name][title] = agreement
            picture = draw_masks(photo, [masks[0]], [prompt])
            scale = _PANEL / max(picture.size)
            width, height = (max(1, round(side * scale)) for side in picture.size)
            text = title if model is sam else f"{title}, IoU with dense {agreement:.2f}"
            panels[name].append((text, picture.resize((width, height))))
    for name, row in panels.items():
        with atomic_path(out / f"extreme_{name}.png") as temporary:
            side_by_side(row).save(temporary, format="png")
    return numbers


KINDS: dict[FigureKind, Callable[[Sam, Photos, Path, Sequence[float]], Any]] = {
    "update-norms": _update_norms,
    "correlation": _correlation,
    "attention": _attention,
    "orders": _orders,
    "extreme": _extreme,
}


def _traces(sam: Sam, photos: Photos) -> dict[str, Trace]:
    compiled = nnx.jit(trace)
    return {
        name: compiled(sam.image_encoder, _pixels(sam, photo)) for name, photo in photos.items()
    }


def _pixels(sam: Sam, photo: np.ndarray) -> Array:
    padded, size = resize_and_pad(photo, sam.config.image_encoder.image_size)
    return normalise(jnp.asarray(padded[None]), jnp.asarray([size]))


def _correlations(found: Trace, importance: Importance) -> list[float]:
    """The correlation of every block."""
    keys = np.asarray(found.keys)
    return [group_correlation(norms, keys, importance) for norms in np.asarray(found.norms)]


def _sequence(keys: Array, grid: tuple[int, int]) -> Array:
    """The order of Stripe-Sort attention as the default sparsity ranks these keys."""
    sparsity = Sparsity(1.0)
    order = orders.curve_order(sparsity.curve, *grid)
    scores = group_importance(keys, order, grid=grid, importance=sparsity.importance)
    return orders.stripe_sequence(order, rank(scores), sparsity.layout)


def _block_mass(sequences: Sequences, order: Array) -> Array:
    """Attention's weight on blocks of keys, mean over heads and the queries of a block."""
    length = order.shape[0]
    block_of = orders.inverse(order) // _BLOCK
    blocks = -(-length // _BLOCK)
    member = (block_of[:, None] == np.arange(blocks)).astype(jnp.float32)  # [N, blocks]

    def attend(q: Array, rel_h: Array, rel_w: Array) -> Array:
        logits = product("shqd,shkd->shqk", q, sequences.k) * q.shape[-1] ** -0.5
        weights = softmax(logits + position_bias(sequences, rel_h, rel_w))
        return product("shqk,kj->shqj", weights, member)

    mass = in_chunks(attend, sequences.q, sequences.rel_h, sequences.rel_w)[0].mean(0)
    return product("qi,qj->ij", member / member.sum(0), mass)


def _kept_mass(mass: np.ndarray, layout: BlockLayout) -> float:
    """The share of the weight that a layout computes."""
    sizes = np.diff(np.minimum(np.arange(len(mass) + 1) * _BLOCK, layout.seq_len))
    return float((mass * layout.block_mask).sum(1) @ sizes / sizes.sum())


def _save(figure: Any, axes: Any, path: Path) -> None:
    """Write a figure whose axes have no ticks; those without content go."""
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        if not axis.has_data():
            axis.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
