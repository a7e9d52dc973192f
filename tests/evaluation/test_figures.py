"""`sparsesam figures`: the numbers behind them, and that every kind is drawn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SMALL, random_weights
from PIL import Image

from pallas_kernels import BlockLayout
from sparsesam_jax import Sam, Sparsity
from sparsesam_jax.choices import FigureKind
from sparsesam_jax.cli.app import main
from sparsesam_jax.evaluation import figures
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.transforms import normalise, resize_and_pad
from sparsesam_jax.sparsity import orders
from sparsesam_jax.sparsity.importance import group_importance
from sparsesam_jax.sparsity.plan import Rankings, encoder_plan

MODEL = dataclasses.replace(
    SMALL,
    image_encoder=dataclasses.replace(SMALL.image_encoder, depth=2, global_attn_indexes=(0,)),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_weights(tmp_path_factory.mktemp("weights") / "small.safetensors", MODEL))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        image = rng.integers(0, 256, (60, 90, 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def test_kinds_are_those_of_the_command() -> None:
    assert tuple(figures.KINDS) == get_args(FigureKind)


def test_trace_is_what_the_encoder_does(weights: str, photos: Path) -> None:
    encoder = Sam.from_pretrained(weights).image_encoder
    padded, size = resize_and_pad(np.asarray(Image.open(photos / "a.png")), 128)
    pixels = normalise(jnp.asarray(padded[None]), jnp.asarray([size]))

    @nnx.jit
    def run(encoder: ImageEncoder, pixels: jax.Array):
        outputs = encoder.block_outputs(pixels)
        plan = encoder_plan(encoder.config, None, (8, 8), "xla")[1]
        last = encoder.blocks[1]
        update, _ = last.attn(last.norm1(outputs[0]), outputs[0], plan, Rankings())
        attended = outputs[0] + update
        return figures.trace(encoder, pixels), outputs[1] - attended

    found, update = run(encoder, pixels)
    assert found.norms.shape == (2, 8, 8)
    np.testing.assert_allclose(found.norms[1], np.linalg.norm(update[0], axis=-1), rtol=1e-3)
    assert found.keys.shape == (64, SMALL.image_encoder.embed_dim)
    for mass in (found.attention, found.permuted):  # one block of 64 tokens holds everything
        np.testing.assert_allclose(mass, [[1.0]], atol=1e-5)


def test_correlation_ranks_groups() -> None:
    keys = np.random.default_rng(1).normal(size=(64, 5)).astype(np.float32)
    order = orders.curve_order("morton", 8, 8)
    scores = np.asarray(group_importance(jnp.asarray(keys), order, grid=(8, 8), importance="sobel"))
    norms = np.empty(64)
    norms[order] = np.repeat(scores**3, 4)  # a monotonic function keeps all ranks
    assert figures.group_correlation(norms.reshape(8, 8), keys, "sobel") == pytest.approx(1)
    assert figures.group_correlation(-norms.reshape(8, 8), keys, "sobel") == pytest.approx(-1)


def test_kept_mass_weighs_blocks_by_their_queries() -> None:
    layout = BlockLayout.a_shape(96, 0.5)  # blocks of 64 and 32 queries; the bar and the diagonal
    mass = np.array([[0.75, 0.25], [0.5, 0.5]])
    assert layout.block_mask.tolist() == [[True, False], [True, True]]
    assert figures._kept_mass(mass, layout) == pytest.approx((64 * 0.75 + 32 * 1.0) / 96)


def test_orders_change_one_thing_at_a_time() -> None:
    found = figures.order_variants(0.3)
    assert found.pop("default") == Sparsity(0.3)
    assert set(found) == {
        *("curve hilbert", "curve raster", "curve random"),
        *("layout contiguous", "ranking block", "ranking none"),
    }


@pytest.mark.parametrize("kind", get_args(FigureKind))
def test_figures_are_drawn(kind, weights, photos, tmp_path, monkeypatch) -> None:
    variants = {"default": Sparsity(0.5)}  # the others only take time
    monkeypatch.setattr(figures, "order_variants", lambda density: variants)
    out = tmp_path / "out"
    command = ["figures", kind, "--images", str(photos), "--weights", weights, "--out", str(out)]
    limit = ["--limit", "2" if kind == "correlation" else "1"]
    assert main([*command, *limit, "--density", "0.5"]) == 0
    numbers = json.loads((out / f"{kind}.json").read_text())
    pictures = [path.name for path in sorted(out.glob("*.png"))]
    expected = [f"{kind}.png"] if kind in ("correlation", "orders") else [f"{kind}_a.png"]
    assert pictures == expected
    assert Image.open(out / pictures[0]).width > 300
    if kind == "update-norms":
        assert len(numbers["a"]["mean"]) == 2
    elif kind == "correlation":
        assert set(numbers) == {"sobel", "dispersion"}
        assert all(-1 <= rho <= 1 for rho in numbers["sobel"]["rho"])
    elif kind == "attention":
        assert all(0 < kept <= 1.0001 for kept in numbers["a"]["kept"].values())
    elif kind == "orders":
        assert list(numbers) == list(variants)
        assert all(0 < error["0.5"] < 1 for error in numbers.values())
    else:
        assert list(numbers["a"]) == ["dense", "0.5"]
        assert numbers["a"]["dense"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["update-norms", "--limit", "0"], "limit must be positive, got 0"),
        (["extreme", "--density", "2"], "density must lie in (0, 1], got 2"),
        (["best"], "'best' is not one of"),
        (["orders", "--out", "absent/out"], "out must be a folder"),
    ],
)
def test_wrong_arguments_write_nothing(arguments, message, photos, weights, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--images", str(photos), "--weights", weights]
    if "--out" not in arguments:
        common += ["--out", str(out)]
    assert main(["figures", *arguments, *common]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
