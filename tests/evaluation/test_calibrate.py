"""`sparsesam calibrate`: the assignment, and that its errors are the features' to first order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SMALL, random_weights
from PIL import Image

from sparsesam_jax import Sam, Sparsity
from sparsesam_jax.cli.app import main
from sparsesam_jax.evaluation import calibrate
from sparsesam_jax.evaluation.calibrate import Choice
from sparsesam_jax.evaluation.sparsity_file import read_sparsity
from sparsesam_jax.model.transforms import normalise, resize_and_pad
from sparsesam_jax.sparsity.work import encoder_work

# A global block and a windowed one behind it, whose MLP may be routed.
MODEL = dataclasses.replace(
    SMALL,
    image_encoder=dataclasses.replace(SMALL.image_encoder, depth=2, global_attn_indexes=(0,)),
)
CONFIG = MODEL.image_encoder


def test_choices_are_what_computes_differently() -> None:
    sparsity = Sparsity(0.4, block_size=16)
    parts = calibrate.choices(CONFIG, sparsity)
    assert [(part[0].block, part[0].part) for part in parts] == [
        (block, part) for block in range(2) for part in ("attention", "mlp")
    ]
    for part in parts:
        work = [choice.work for choice in part]
        assert work == sorted(set(work))
        assert part[-1].density == 1
    # Only the windowed block behind the first global one has a routed MLP.
    assert [len(part) for part in parts[1::2]] == [1, len(calibrate.LEVELS)]


def test_work_goes_where_it_saves_most() -> None:
    def part(block: int, *work: int) -> list[Choice]:
        return [Choice(block, "mlp", 0.1 * (i + 1), w) for i, w in enumerate(work)]

    parts = [part(0, 10, 20, 30), part(1, 10, 20, 30)]
    # The first part's gain comes with the second step only.
    errors = [np.array([9.0, 9.0, 0.0]), np.array([3.0, 1.0, 0.0])]
    taken = calibrate.assign(parts, errors, 40)
    assert [choice.work for choice in taken] == [30, 10]
    assert [choice.work for choice in calibrate.assign(parts, errors, 50)] == [30, 20]
    assert [choice.work for choice in calibrate.assign(parts, errors, 60)] == [30, 30]
    with pytest.raises(ValueError, match=r"budget must allow the cheapest choices \(20\), got 19"):
        calibrate.assign(parts, errors, 19)


def test_calibrate_command(tmp_path: Path, capsys) -> None:
    weights = str(random_weights(tmp_path / "small.safetensors", MODEL))
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (90, 120, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    out = tmp_path / "mine.json"
    command = ["calibrate", "--images", str(tmp_path / "images"), "--weights", weights]
    arguments = [*command, "--out", str(out), "--density", "0.5"]
    assert main([*arguments, "--probes", "0"]) == 2
    assert main([*arguments, "--images", str(out)]) == 2
    assert not out.exists()
    assert main([*arguments, "--probes", "2"]) == 0
    assert "densities at equal work" in capsys.readouterr().out
    found = read_sparsity(out)
    assert isinstance(found.attention_density, tuple)
    assert encoder_work(CONFIG, found).total <= encoder_work(CONFIG, Sparsity(0.5)).total
    expected = {"attention_density": None, "mlp_density": None}
    assert dataclasses.replace(found, **expected) == Sparsity(0.5)


def test_errors_are_the_features(tmp_path: Path) -> None:
    sam = Sam.from_pretrained(str(random_weights(tmp_path / "small.safetensors", MODEL)))
    image = np.random.default_rng(1).integers(0, 256, (100, 128, 3)).astype(np.uint8)
    # The last block's MLP: behind it there is but the neck.
    part = calibrate.choices(CONFIG, Sparsity(0.5))[-1]
    chosen = [choice for choice in part if choice.density in (0.5, 0.85, 1.0)]
    (errors,) = calibrate.measure(sam.image_encoder, Sparsity(0.5), [image], [chosen], probes=60)
    padded, size = resize_and_pad(image, CONFIG.image_size)
    pixels = normalise(jnp.asarray(padded[None]), jnp.asarray([size]))
    encode = nnx.jit(lambda encoder, x: encoder(x))
    dense = np.asarray(encode(sam.image_encoder, pixels))
    for choice, error in zip(chosen[:-1], errors, strict=False):
        sparsity = calibrate.at(Sparsity(0.5), 1.0, (1.0, choice.density))
        found = np.asarray(encode(sam.with_sparsity(sparsity).image_encoder, pixels))
        expected = ((found - dense) ** 2).sum() / (dense**2).sum()
        # 60 directions know a mean square within some 40 %; the neck is not linear.
        assert 0.4 * expected < error < 2 * expected
    assert errors[0] > errors[1] > errors[2] == 0
