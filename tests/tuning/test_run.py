"""Whole runs: they learn, continue after a kill, and do the same on two devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_weights
from tuning_cases import SIDE, TINY, discs, losses, settings, tiny_sam, write_discs

from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.cli.app import main
from sparsesam_jax.tuning.augment import STILL, Augmentation
from sparsesam_jax.tuning.data import Photos, find, load
from sparsesam_jax.tuning.lora import add_lora, load_lora, merge_lora, save_lora
from sparsesam_jax.tuning.objective import Objective
from sparsesam_jax.tuning.parameters import take_apart
from sparsesam_jax.tuning.prompting import Prompting
from sparsesam_jax.tuning.run import Stage, tune
from sparsesam_jax.tuning.step import Fixed, Optimiser, Step, initial_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    write_discs(folder, 8)
    random_weights(folder / "tiny.safetensors", TINY)
    return folder


@pytest.fixture(scope="module")
def photos(folder: Path) -> Photos:
    return load(find(folder / "images", masks=folder / "masks"), SIDE)


def command(folder: Path, out: Path, *options: str) -> list[str]:
    """`sparsesam tune` on the discs."""
    return [
        *("tune", "--images", str(folder / "images"), "--masks", str(folder / "masks")),
        *("--side", str(SIDE), "--weights", str(folder / "tiny.safetensors"), "--out", str(out)),
        *("--stage", "64:2", "--prompts", "1", "--rounds", "2", "--train", "all"),
        *("--log-every", "1", "--save-every", "4", *options),
    ]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "sparsesam_jax", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
    )


def test_a_killed_run_continues_with_the_same_losses(folder: Path, tmp_path: Path):
    options = ("--steps", "40")
    killed = start(command(folder, tmp_path / "killed", *options))
    log = tmp_path / "killed" / "log.jsonl"
    for _ in range(3000):
        if log.exists() and len(losses(log.parent)) >= 9:
            break
        assert killed.poll() is None, "the run has ended by itself"
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model.safetensors.tmp").exists()
    before = len(losses(log.parent))
    assert 9 <= before < 40
    assert main(command(folder, tmp_path / "killed", *options)) == 2  # without --resume
    assert main(command(folder, tmp_path / "killed", *options, "--resume")) == 0
    assert main(command(folder, tmp_path / "whole", *options)) == 0
    resumed, whole = losses(tmp_path / "killed"), losses(tmp_path / "whole")
    assert resumed.keys() == whole.keys() == set(range(1, 41))
    for step, loss in whole.items():
        assert resumed[step] == pytest.approx(loss, abs=1e-6)
    for name in ("losses.png", "settings.json"):
        assert (tmp_path / "whole" / name).stat().st_size > 0
    assert main(command(folder, tmp_path / "whole", "--steps", "41", "--resume")) == 2


def test_two_devices_make_the_same_step_as_one(folder: Path, tmp_path: Path):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    options = ("--steps", "2", "--learning-rate", "1e-3", "--warmup", "0")
    two = start(command(folder, tmp_path / "two", *options), XLA_FLAGS=flags)
    assert main(command(folder, tmp_path / "one", *options)) == 0
    assert two.wait() == 0
    for step, loss in losses(tmp_path / "one").items():
        assert losses(tmp_path / "two")[step] == pytest.approx(loss, rel=1e-5)


def test_a_run_learns_and_takes_the_average(photos: Photos, tmp_path: Path):
    sam = tiny_sam(tmp_path)
    before = np.asarray(sam.mask_decoder.iou_token.embedding[...])
    wanted = settings(
        stages=(Stage(image_size=64, batch=8),),
        steps=150,
        log_every=10,
        save_every=1000,
        objective=Objective(prompting=Prompting(rounds=2)),
        optimiser=Optimiser(learning_rate=3e-3, warmup=10, ema=0.9),
    )
    held_out = discs(4, first=100)
    tuned = tune(sam, photos, wanted, tmp_path / "run", validation=held_out)
    rows = list(map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()))
    first, last = (row for row in (rows[1], rows[-2]))
    assert last["loss"] < 0.7 * first["loss"]
    assert rows[-1]["validation"]["box"] > 0.5
    np.testing.assert_array_equal(sam.mask_decoder.iou_token.embedding[...], before)
    saved = Sam.from_pretrained(tmp_path / "run" / "model.safetensors")
    for name, value in take_apart(tuned, ["all"]).tuned.items():
        np.testing.assert_array_equal(take_apart(saved, ["all"]).tuned[name], value)


def test_low_rank_updates_are_tuned_alone_saved_and_merged(photos: Photos, tmp_path: Path):
    sam = tiny_sam(tmp_path)
    wanted = settings(train=("lora",), steps=3)
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        add_lora(sam, 0)
    tuned = tune(add_lora(sam, 2), photos, wanted, tmp_path / "run")
    old, new = take_apart(sam, ["all"]).tuned, take_apart(tuned, ["all"]).tuned
    for name in old:
        np.testing.assert_array_equal(old[name], new[name])
    image = discs(1)[0].image
    masks = []
    save_lora(tuned, tmp_path / "lora.safetensors")
    for model in (
        tuned,
        merge_lora(tuned),
        load_lora(sam, tmp_path / "run" / "lora.safetensors"),
        load_lora(sam, tmp_path / "lora.safetensors"),
        Sam.from_pretrained(tmp_path / "run" / "model.safetensors"),
        sam,
    ):
        predictor = SamPredictor(model)
        predictor.set_image(image)
        box = np.array([5, 5, 30, 30])
        masks.append(predictor.predict(box=box, return_logits=True)[0])
    for found in masks[1:5]:
        # A product more or less moves float32 by its rounding.
        np.testing.assert_allclose(found, masks[0], atol=2e-3 * np.abs(masks[0]).max())
    assert not np.allclose(masks[5], masks[0], atol=1e-5)
    with pytest.raises(ValueError, match="merge it first"):
        add_lora(tuned, 1)
    with pytest.raises(ValueError, match="must have a low-rank update"):
        save_lora(sam, tmp_path / "none.safetensors")


def test_a_teacher_is_followed(photos: Photos, tmp_path: Path):
    sam = tiny_sam(tmp_path)
    teacher = Sam.from_pretrained(random_weights(tmp_path / "other.safetensors", TINY, seed=1))
    embeddings = tmp_path / "embeddings"
    embeddings.mkdir()
    predictor = SamPredictor(teacher)
    for index in range(8):
        height, width = photos.sizes[index]
        predictor.set_image(photos.images[index, :height, :width])
        predictor.embedding.save(embeddings / f"{index}.safetensors")
    plain = Augmentation(**(vars(STILL) | {"colour": 0.0, "grey": 0.0}))
    options = {"augmentation": plain, "steps": 2}
    follows = Objective(prompting=Prompting(rounds=1), features=1.0)
    wanted = settings(objective=follows, **options)
    tune(sam, photos, wanted, tmp_path / "model", teacher=teacher)
    images = tmp_path / "photos" / "images"
    write_discs(tmp_path / "photos", 8)
    sources = find(images, masks=images.parent / "masks")
    with_features = load(sources, SIDE, embeddings=embeddings)
    tune(sam, with_features, wanted, tmp_path / "folder")
    # Features in float16.
    for step, loss in losses(tmp_path / "model").items():
        assert losses(tmp_path / "folder")[step] == pytest.approx(loss, rel=2e-3)
    with pytest.raises(ValueError, match="objective needs a teacher, got none"):
        tune(sam, photos, wanted, tmp_path / "none")
    with pytest.raises(ValueError, match=r"must leave photos with features in place, got .*flip"):
        tune(sam, with_features, settings(objective=follows), tmp_path / "moved")
    itself = Objective(prompting=Prompting(rounds=1), teacher_masks=True)
    tune(sam, photos, settings(objective=itself, steps=1), tmp_path / "itself", teacher=sam)
    row = json.loads((tmp_path / "itself" / "log.jsonl").read_text().splitlines()[-1])
    assert row["iou_0"] == pytest.approx(1.0, abs=1e-6)


def test_a_sparse_encoder_is_tuned_as_it_runs(photos: Photos, tmp_path: Path):
    sam = tiny_sam(tmp_path).with_sparsity(Sparsity(0.5, split="equal", block_size=4))
    tuned = tune(sam, photos, settings(steps=2, train=("encoder",)), tmp_path / "run")
    assert tuned.image_encoder.sparsity == sam.image_encoder.sparsity
    changed = [
        not np.array_equal(value, take_apart(sam, ["encoder"]).tuned[name])
        for name, value in take_apart(tuned, ["encoder"]).tuned.items()
    ]
    assert all(changed)


def test_micro_batches_give_the_gradient_of_the_batch(photos: Photos, tmp_path: Path):
    def mean_square(sam, example, key, teacher, features):
        return (sam.encode(example.pixels).features ** 2).mean(), {}

    parts = take_apart(tiny_sam(tmp_path), ["neck"])
    plain = Augmentation(**(vars(STILL) | {"colour": 0.0, "grey": 0.0}))
    optimiser = Optimiser(warmup=0)
    batch = jax.tree.map(jnp.asarray, photos.draw(0, 0, 4, 1))
    found = []
    for count in (1, 2):
        step = Step(parts, None, mean_square, optimiser, plain, 64, count, 0)  # pyright: ignore
        state = initial_state(parts, optimiser)
        found.append(jax.jit(step.__call__)(state, Fixed(parts.fixed, {}), batch, jnp.float32(0)))
    assert found[0][1]["gradient"] == pytest.approx(float(found[1][1]["gradient"]), rel=1e-5)
    for name, value in found[0][0].tuned.items():
        np.testing.assert_allclose(found[1][0].tuned[name], value, atol=1e-6)


def test_what_is_wrong_is_said(photos: Photos, tmp_path: Path):
    with pytest.raises(ValueError, match="either steps or seconds must be given"):
        settings(seconds=1.0)
    with pytest.raises(ValueError, match=r"batch must be a multiple of accumulate \(2\), got 3"):
        settings(stages=(Stage(image_size=64, batch=3),), accumulate=2)
    with pytest.raises(ValueError, match="image_size must be a multiple of 16, got 60"):
        wanted = settings(stages=(Stage(image_size=60, batch=2),))
        tune(tiny_sam(tmp_path), photos, wanted, tmp_path / "run")
    stages = (Stage(image_size=64, batch=2, share=1), Stage(image_size=96, batch=2, share=3))
    assert [settings(stages=stages).stage(p) for p in (0, 0.24, 0.25, 0.99, 1)] == [0, 0, 1, 1, 1]
