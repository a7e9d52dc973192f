"""`sparsesam` as a process: how it starts, is interrupted and keeps what it compiles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import write_tiny

WITHOUT_JAX = """
import sys
from sparsesam_jax.cli.app import main
code = main(sys.argv[1:])
assert "jax" not in sys.modules
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a photo and a tiny model."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    write_tiny(tmp_path / "tiny.safetensors")
    return tmp_path


def environment(**changed: str) -> dict[str, str]:
    """This process's environment without JAX's cache."""
    kept = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    return kept | {"JAX_PLATFORMS": "cpu"} | changed


def sparsesam(folder: Path, *args: str, **changed: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsesam_jax", *args]
    return subprocess.run(
        command, cwd=folder, env=environment(**changed), capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["segment", "--help"], 0),
        (["convert", "--help"], 0),
        (["evaluate", "--help"], 0),
        (["figures", "--help"], 0),
        (["segment", "none.png", "--point", "1", "1"], 2),
        (["segment", "photo.png"], 2),
        (["segment", "photo.png", "--point", "1", "1", "--weights", "none"], 2),
        (["segment", "photo.png", "--point", "1", "1", "--out", "none/mask.png"], 2),
        (["info", "none"], 2),
        (["demo", "--weights", "none"], 2),
        (["convert", "none.pth", "a.safetensors"], 2),
        (["evaluate", "--images", ".", "--masks", ".", "--method", "magic"], 2),
        (["evaluate", "--images", ".", "--masks", ".", "--weights", "none"], 2),
        (["calibrate", "--images", "none"], 2),
    ],
)
def test_help_and_wrong_input_need_no_jax(folder: Path, args: list[str], code: int) -> None:
    command = [sys.executable, "-c", WITHOUT_JAX, *args]
    result = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == (code == 2)


def test_file_names_that_are_no_text(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "photo.png").rename(folder / name)
    args = ["segment", name, "--point", "1", "1", "--weights", "tiny.safetensors", "--out", "out"]
    result = sparsesam(folder, *args)
    assert result.returncode == 0, result.stderr
    assert "wrote out/caf\\udce9.png" in result.stdout
    assert (folder / "out" / name).is_file()


def test_compilation_cache(folder: Path) -> None:
    command = ["segment", "photo.png", "--point", "1", "1", "--weights", "tiny.safetensors"]
    home = {"XDG_CACHE_HOME": str(folder / "home"), "HOME": str(folder)}
    assert sparsesam(folder, *command, **home).returncode == 0
    (cache,) = (folder / "home" / "sparsesam").iterdir()
    kept = {path.name for path in cache.iterdir()}
    assert cache.name.startswith("jax-") and any("_encode" in name for name in kept)
    # JAX's own variable and the option come before the default.
    assert sparsesam(folder, *command, **home, JAX_COMPILATION_CACHE_DIR="mine").returncode == 0
    assert (folder / "mine").is_dir()
    assert sparsesam(folder, "--compilation-cache", "yours", *command, **home).returncode == 0
    assert any("_encode" in path.name for path in (folder / "yours").iterdir())
    # Nothing was compiled twice, and `off` keeps nothing.
    off = {"XDG_CACHE_HOME": str(folder / "off"), "HOME": str(folder)}
    assert sparsesam(folder, "--compilation-cache", "off", *command, **off).returncode == 0
    assert not (folder / "off").exists()
    # A folder that cannot be made is no reason to fail.
    result = sparsesam(folder, *command, XDG_CACHE_HOME=str(folder / "photo.png"))
    assert result.returncode == 0
    assert result.stderr.startswith("warning: no compilation cache: ")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def default_interrupt() -> Iterator[None]:
    """SIGINT as a terminal's foreground job has it, which processes started here inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupt")
@pytest.mark.parametrize("delay", [0.5, 2.0, 6.0])
def test_interrupted_wherever_it_is(folder: Path, delay: float) -> None:
    # The embedded model takes long to compile, and the compiler does not let Python's handler run.
    args = ["segment", "photo.png", "--point", "1", "1", "--out", "mask.png"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsesam_jax", "--compilation-cache", "off", *args],
        cwd=folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "interrupted\n"
    assert {path.name for path in folder.iterdir()} == {"photo.png", "tiny.safetensors"}


WRITES_FOR_EVER = """
import hashlib
import time
import typer
from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.cli.program import run

app = typer.Typer()

@app.command()
def write(busy: bool = False) -> None:
    with atomic_path("whole.txt") as temporary:
        temporary.write_text("half")
        print("writing", flush=True)
        if busy:  # as a compiler: does not return to Python for a long time
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)
        time.sleep(60)

if __name__ == "__main__":
    run("__main__", None, "program")
"""


@pytest.mark.usefixtures("default_interrupt")
@pytest.mark.parametrize("option", ["--busy", "--no-busy"])
def test_interrupted_while_it_writes(tmp_path: Path, option: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES_FOR_EVER, option],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert len([*tmp_path.iterdir()]) == 1
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not [*tmp_path.iterdir()]
