"""`sparsesam embed` killed at random moments: `python tests/datasets/killed.py KILLS PHOTOS`.

The suite kills a few runs of a toy; this is the whole of it, with `vit_t`.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
SIZES = [(96, 128), (128, 96), (128, 72), (60, 200), (128, 128)]


def draw(folder: Path, count: int, *, broken: Sequence[int] = ()) -> Path:
    """A folder of photos of several shapes, some of them broken."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (*SIZES[index % len(SIZES)], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05}.jpg")
    for index in broken:
        path = folder / f"{index:05}.jpg"
        path.write_bytes(path.read_bytes()[: 900 * (index % 2)])
    return folder


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "sparsesam_jax", *args]


def environment(**changed: str) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | changed


def contents(store: Path) -> dict[str, str]:
    """Every file and folder of a store, and what is in it."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(store.rglob("*"))
    }


def run_and_kill(args: Sequence[str], seconds: float) -> bool:
    """Whether the process was still alive to be killed after so many seconds."""
    process = subprocess.Popen(
        args, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def main(kills: int, photos: int) -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = draw(folder / "photos", photos, broken=[17 % photos, 150 % photos])
        options = ["--image-size", "128", "--padding", "crop", "--shard-size", "16"]
        options += ["--batch", "4", "--workers", "1"]

        def args(store: str) -> list[str]:
            return command("embed", str(source), "--out", str(folder / store), *options)

        subprocess.run(args("warm"), env=environment(), capture_output=True, check=False)
        began = time.perf_counter()
        code = subprocess.run(args("whole"), env=environment(), capture_output=True, check=False)
        seconds = time.perf_counter() - began
        whole = contents(folder / "whole")
        assert code.returncode == 1, code.stderr
        print(f"undisturbed: {seconds:.1f} s, {len(whole)} files and folders", flush=True)
        kill = 0
        while kill < kills:
            after = rng.uniform(0, 1) * seconds
            if run_and_kill(args("killed"), after):
                kill += 1
                done = len([*(folder / "killed").glob("index/*.parquet")])
                code = subprocess.run(args("killed"), env=environment(), capture_output=True)
                same = contents(folder / "killed") == whole
                print(
                    f"kill {kill}: after {after:.1f} s with {done} shards done, "
                    f"then exit code {code.returncode}, same bytes: {same}",
                    flush=True,
                )
                assert same and code.returncode == 1, code.stderr
            shutil.rmtree(folder / "killed", ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
