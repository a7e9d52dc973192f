"""Every snippet of the README runs, on a tiny model in the place of the embedded weights."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from checkpoint_files import TINY, save_meta  # noqa: E402
from test_cli import write_tiny  # noqa: E402

from sparsesam_jax.checkpoints import convert_checkpoint, pretrained  # noqa: E402
from sparsesam_jax.cli.app import main  # noqa: E402

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def commands() -> Iterator[list[str]]:
    """The commands of the shell blocks, those that `&&` joins one by one."""
    for text in blocks("sh"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the README names, `vit_t` being a tiny model."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    embedded = tmp_path / "embedded.safetensors"
    write_tiny(embedded)
    locate = pretrained.locate
    monkeypatch.setattr(
        pretrained, "locate", lambda name: embedded if name == "vit_t" else locate(name)
    )
    save_meta(tmp_path / "sam_vit_b_01ec64.pth")
    hq = type(TINY)(**{**vars(TINY), "hq": True})
    save_meta(tmp_path / "sam_hq_vit_b.pth", hq)
    return tmp_path


def test_every_block_is_of_a_language_that_is_tested():
    assert {name for name, _ in BLOCKS} == {"sh", "python"}
    assert {words[0] for words in commands()} == {"pip", "pytest", "sparsesam"}
    assert len(README.splitlines()) <= 150


def test_python_blocks(folder: Path):
    names: dict[str, object] = {}
    for text in blocks("python"):
        exec(compile(text, "README.md", "exec"), names)
    best, masks = names["best"], names["masks"]
    assert isinstance(best, np.ndarray)
    assert (best.dtype, best.shape) == (np.bool_, (60, 90))
    assert np.shape(masks) == (1, 1, 3, 60, 90)


def test_sparsesam_commands(folder: Path, capsys: pytest.CaptureFixture[str]):
    convert_checkpoint("sam_vit_b_01ec64.pth", "sam-vit-base", to="huggingface")
    for words in commands():
        if words[0] == "sparsesam":
            assert main(words[1:]) == 0, (words, capsys.readouterr().err)
    for name in (
        "overlay.png",
        "mask.png",
        "layout.png",
        "tuned.pth",
        "tuned",
        "from_hf.safetensors",
    ):
        assert Path(name).exists(), name


def test_set_up_commands_fit_the_project():
    extras = PROJECT["optional-dependencies"]
    for words in commands():
        if words[0] == "pip":
            assert words[1] == "install"
            for name in re.findall(r"\[([\w,-]+)\]", words[-1]):
                assert set(name.split(",")) <= extras.keys()
    for name in re.findall(r"`(\w+)` brings|`(\w+)` what", README):
        assert set(name) & extras.keys(), name
    assert PROJECT["scripts"]["sparsesam"] == "sparsesam_jax.cli.app:main"
    assert PROJECT["requires-python"] == ">=3.11"
    assert any(requirement.startswith("pytest") for requirement in extras["test-jax"])
    # The demo's photo comes with scikit-image, so that has to come without an extra.
    assert any(requirement.startswith("scikit-image") for requirement in PROJECT["dependencies"])


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).is_file(), target
    assert (ROOT / "docs" / "demo.png").stat().st_size < 400_000
