"""The scripts of `examples` run, on a tiny model and small photos."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import random_weights
from PIL import Image
from tuning_cases import write_discs

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and two photos of a bright rectangle with their masks."""
    folder = tmp_path_factory.mktemp("examples")
    random_weights(folder / "tiny.safetensors")
    rng = np.random.default_rng(0)
    for name, (top, left) in {"a": (10, 20), "b": (30, 40)}.items():
        mask = np.zeros((60, 90), np.uint8)
        mask[top : top + 25, left : left + 30] = 255
        noise = rng.integers(0, 60, (60, 90, 3))
        photo = np.where(mask[..., None] > 0, 190 + noise, noise).astype(np.uint8)
        for kind, pixels in (("photos", photo), ("masks", mask)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{name}.png")
    return folder


def run(script: str, folder: Path, *arguments: str | Path) -> Any:
    main = runpy.run_path(str(EXAMPLES / script))["main"]
    return main([*map(str, arguments), "--weights", str(folder / "tiny.safetensors")])


def test_every_script_is_listed_and_tested():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert SCRIPTS == ["compare.py", "features.py", "jit_vmap_export.py", "tune_decoder.py"]
    for name in SCRIPTS:
        assert f"[{name}]({name})" in listed


def test_features(folder: Path):
    losses, iou = run("features.py", folder, folder / "photos", folder / "masks", "--steps", "60")
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert iou > 0.6


def test_compare(folder: Path, capsys: pytest.CaptureFixture[str]):
    agreements = run("compare.py", folder, folder / "photos", "--density", "1")
    assert agreements == [1.0, 1.0]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["a.png", "b.png", "mean agreement 1.000"]
    sparse = run("compare.py", folder, folder / "photos", "--density", "0.3")
    assert all(0 <= value <= 1 for value in sparse)


def test_compare_needs_photos(tmp_path: Path, folder: Path):
    with pytest.raises(SystemExit):
        run("compare.py", folder, tmp_path)


def test_jit_vmap_export(folder: Path, tmp_path: Path):
    photo, out = folder / "photos" / "a.png", tmp_path / "sam.jaxexport"
    masks = run("jit_vmap_export.py", folder, photo, "--out", out)
    assert masks["jit"].shape == (4, 60, 90)
    assert masks["vmap"].shape == (3, 4, 60, 90)
    assert masks["export"].shape == (3, 60, 90)
    # The same function: a logit of nearly zero may fall to either side.
    assert (masks["vmap"][1] == masks["jit"]).mean() > 0.999
    assert (masks["export"] == masks["jit"][:3]).mean() > 0.999
    assert out.stat().st_size > 0


def test_tune_decoder(folder: Path, tmp_path: Path):
    write_discs(tmp_path, 6)
    counts = ("--count", "4", "--held-out", "2", "--steps", "150", "--learning-rate", "3e-3")
    arguments = (tmp_path / "images", tmp_path / "masks", *counts, "--out", tmp_path / "run")
    before, after = run("tune_decoder.py", folder, *arguments)
    assert after > before + 0.1
    assert (tmp_path / "run" / "model.safetensors").stat().st_size > 0
