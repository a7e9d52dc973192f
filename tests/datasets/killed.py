"""`sparsesam embed` killed at random moments: `python tests/datasets/killed.py KILLS PHOTOS`.

The suite kills a few runs of a toy; this is the whole of it, with `vit_t`.
"""

from __future__ import annotations

import contextlib
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


def square(number: int) -> np.ndarray | None:
    """What a worker process does in tests; nothing for 2. Here, where it imports little."""
    if number == 9:
        raise ValueError("nine")
    return None if number == 2 else np.full((300, 300), number)


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
    """Kill a run so many seconds after its first shard; whether it was still alive then."""
    process = subprocess.Popen(
        args, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


def undisturbed(args: Sequence[str]) -> float:
    """Run to the end; seconds from the first shard to the last one."""
    process = subprocess.Popen(args, env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    times = [time.perf_counter() for _ in process.stdout]
    assert process.wait() == 1  # some photos are broken
    return times[-1] - times[0]


def main(kills: int, photos: int) -> None:
    rng = random.Random()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = draw(folder / "photos", photos, broken=[17 % photos, 150 % photos])
        options = ["--image-size", "128", "--padding", "crop", "--shard-size", "16"]
        options += ["--batch", "4", "--workers", "1"]

        def args(store: str, *more: str) -> list[str]:
            return command("embed", str(source), "--out", str(folder / store), *options, *more)

        seconds = undisturbed(args("whole"))
        whole = contents(folder / "whole")
        shards = len([*(folder / "whole").glob("index/*.parquet")])
        print(f"undisturbed: {shards} shards, {seconds:.1f} s from the first to the last")
        both = [
            subprocess.Popen(
                args("parts", "--shard", f"{part}/2"), env=environment(), stdout=subprocess.DEVNULL
            )
            for part in range(2)
        ]
        assert {process.wait() for process in both} <= {0, 1}
        assert contents(folder / "parts") == whole
        print("two processes at once, --shard 0/2 and 1/2: same bytes", flush=True)
        kill = 0
        while kill < kills:
            after = rng.uniform(0, seconds)
            if run_and_kill(args("killed"), after):
                kill += 1
                done = len([*(folder / "killed").glob("index/*.parquet")])
                undisturbed(args("killed"))
                assert contents(folder / "killed") == whole
                print(
                    f"kill {kill}: {after:.1f} s after the first shard, {done} of {shards} done; "
                    "run again: same bytes",
                    flush=True,
                )
            shutil.rmtree(folder / "killed")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
