"""Every snippet of README and guides runs, on a tiny model in the place of the embedded weights."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import TINY, save_meta
from PIL import Image
from test_cli import CONFIG, write_tiny

from sparsesam_jax import PRESETS, Sparsity
from sparsesam_jax.checkpoints import convert_checkpoint, pretrained
from sparsesam_jax.cli.app import main
from sparsesam_jax.datasets import jobs
from sparsesam_jax.sparsity.work import encoder_work

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
GUIDES = [DOCS / "index.md", DOCS / "terms.md", *sorted((DOCS / "guides").glob("*.md"))]
DOCUMENTS = [README, *GUIDES]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(document: Path) -> list[tuple[str, str]]:
    """Language and text of the blocks of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text(document), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> Iterator[list[str]]:
    """The commands of the shell blocks, those that `&&` joins one by one."""
    for language, block in blocks(document):
        for line in block.splitlines() if language == "sh" else []:
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


def named(documents: list[Path]) -> list[Any]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in documents]


def having(language: str) -> list[Any]:
    return named([path for path in DOCUMENTS if language in dict(blocks(path))])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the documents name, `vit_t` being a tiny model."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 90, 3), np.uint8)
    mask = np.zeros((60, 90), np.uint8)
    mask[10:40, 20:70] = 255
    Image.fromarray(pixels).save("photo.jpg")
    for name, image in (("photos", pixels), ("masks", mask)):
        Path(name).mkdir()
        Image.fromarray(image).save(f"{name}/one.png")
    Path("boxes.json").write_text('{"one.png": {"boxes": [[20, 10, 70, 40]]}}')
    embedded = tmp_path / "embedded.safetensors"
    write_tiny(embedded)
    locate = pretrained.locate
    for module in (pretrained, jobs):
        monkeypatch.setattr(
            module, "locate", lambda name: embedded if name == "vit_t" else locate(name)
        )
    Path("boxes.csv").write_text("image,x0,y0,x1,y1\none.png,20,10,70,55\n")
    save_meta(tmp_path / "sam_vit_b_01ec64.pth", finite=True)
    hq = type(TINY)(**{**vars(TINY), "hq": True})
    save_meta(tmp_path / "sam_hq_vit_b.pth", hq, finite=True)
    return tmp_path


@pytest.mark.parametrize("document", named(DOCUMENTS))
def test_every_block_is_of_a_language_that_is_tested(document: Path):
    assert {name for name, _ in blocks(document)} <= {"sh", "python"}
    known = {"pip", "pytest", "sparsesam"}
    if document.name == "benchmarks.md":
        known |= {"python", "bash"}
    assert {words[0] for words in commands(document)} <= known


def test_readme_is_short():
    assert len(text(README).splitlines()) <= 150


@pytest.mark.parametrize("document", having("python"))
def test_python_blocks(document: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    if document.name == "photos.md":  # Meta's registry checks that weights are of the model named
        monkeypatch.setitem(PRESETS, "vit_t", CONFIG)
    if document.name == "datasets.md":
        assert main(["embed", "photos", "--out", "store", "--workers", "0"]) == 0
    names: dict[str, Any] = {}
    for language, block in blocks(document):
        if language == "python":
            exec(compile(block, str(document), "exec"), names)
    if document == README:
        assert isinstance(names["best"], np.ndarray)
        assert (names["best"].dtype, names["best"].shape) == (np.bool_, (60, 90))
        assert np.shape(names["masks"]) == (1, 1, 3, 60, 90)


WRITTEN = {
    "README.md": ["overlay.png", "mask.png", "layout.png", "tuned.pth", "tuned"],
    "index.md": ["overlay.png"],
    "tuning.md": ["tuning/model.safetensors", "tuning/losses.png"],
    "photos.md": ["overlay.png", "mask.png"],
    "conversion.md": ["vit_b.safetensors", "from_hf.safetensors", "tuned.pth", "tuned"],
    "datasets.md": ["store/features/c/0/0/0/0", "results.json"],
    "evaluation.md": ["evaluation/summary.json", "evaluation/quality.png", "calibrated.json"],
}


@pytest.mark.parametrize("document", having("sh"))
def test_sparsesam_commands(document: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    convert_checkpoint("sam_vit_b_01ec64.pth", "sam-vit-base", to="huggingface")
    for words in commands(document):
        if words[0] != "sparsesam" or words[1] == "evaluate-coco":  # which needs COCO's files
            continue
        assert main(words[1:]) == 0, (words, capsys.readouterr().err)
    for name in WRITTEN.get(document.name, []):
        assert Path(name).exists(), name


@pytest.mark.parametrize("document", having("sh"))
def test_set_up_commands_fit_the_project(document: Path):
    extras = PROJECT["optional-dependencies"]
    for words in commands(document):
        if words[0] == "pip":
            assert words[1] == "install"
            for name in re.findall(r"\[([\w,-]+)\]", words[-1]):
                assert set(name.split(",")) <= extras.keys()


def test_what_the_readme_installs():
    extras = PROJECT["optional-dependencies"]
    for name in re.findall(r"`(\w+)` brings|`(\w+)` what", text(README)):
        assert set(name) & extras.keys(), name
    assert PROJECT["scripts"]["sparsesam"] == "sparsesam_jax.cli.app:main"
    assert PROJECT["requires-python"] == ">=3.11"
    assert any(requirement.startswith("pytest") for requirement in extras["test-jax"])
    # The demo's photo comes with scikit-image, so that has to come without an extra.
    assert any(requirement.startswith("scikit-image") for requirement in PROJECT["dependencies"])


def rows(markdown: str) -> list[list[str]]:
    """The cells of all tables."""
    return [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]


def test_shares_are_those_of_the_counted_work():
    """Percent of the dense encoder's multiply-accumulates, in README and terms."""

    def share(model: str, density: str) -> str:
        encoder = PRESETS[model].image_encoder
        work = encoder_work(encoder, Sparsity(float(density))).total
        return f"{100 * work / encoder_work(encoder).total:.0f}"

    for document in (README, DOCS / "terms.md"):
        tables = [cells for cells in rows(text(document)) if len(cells) == 5]
        table = [(re.search(r"0\.\d+", cells[0]), cells[1:]) for cells in tables]
        found = [(density[0], shares) for density, shares in table if density]
        assert len(found) >= 3
        for density, shares in found:
            assert shares == [share(model, density) for model in PRESETS]


def test_times_are_those_of_the_benchmarks():
    """The README's table of times, in docs/benchmarks.md, which is written from raw files."""
    section = text(DOCS / "benchmarks.md").partition("## Image encoder")[2].partition("\n## ")[0]
    measured = {tuple(cells[:4]): cells[4] for cells in rows(section)}
    names = {"kernels": "mosaic_gpu", "SDPA": "PyTorch compile", "FlexAttention": "PyTorch flex"}
    columns = [(m, b) for b in ("8", "1") for m in ("vit_b", "vit_l", "vit_h")]
    times = [cells for cells in rows(text(README)) if len(cells) == 1 + len(columns)][2:]
    assert len(times) == 6
    for label, *values in times:
        found = re.match(r"(?:dense|Sparsity\(([\d.]+)\)`?), (?:PyTorch: )?(\w+)", label)
        assert found, label
        density, name = found[1] or "dense", names[found[2]]
        assert values == [measured[model, batch, density, name] for model, batch in columns], label


def test_quality_is_that_of_the_sweep():
    """The README's table of quality, in docs/quality.md, which is written from raw files."""
    section = text(README).partition("**Quality.**")[2].partition("## ")[0]
    measured = [cells for cells in rows(text(DOCS / "quality.md")) if len(cells) == 10]
    names = {"Sparsity": "sparsesam", "Sparsity.released": "released", "ToMe": "tome"}
    table = rows(section)[2:]
    assert len(table) >= 3
    for label, change, gmacs in table:
        found = re.match(r"([\w.]+)(?:\(([\d.]+)\))?", label)
        assert found, label
        name, density = names[found[1]], found[2] or "0.4"
        cells = next(cells for cells in measured if cells[:2] == [name, density])
        assert [gmacs, change] == [cells[3], f"{cells[4]} ({cells[5]})"], label


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text(README)):
        if not target.startswith("https://"):
            assert (ROOT / target).is_file(), target
    assert (DOCS / "demo.png").stat().st_size < 400_000
