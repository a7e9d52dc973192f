"""Shards on Ray's workers, one of which is killed, and on processes that JAX has numbered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed import command, contents, draw, environment
from models import random_weights

from sparsesam_jax.cli.app import main

pytestmark = pytest.mark.slow
OPTIONS = ["--batch", "2", "--shard-size", "4", "--workers", "0"]

TWO_WORKERS = """
import sys
import ray
from sparsesam_jax.cli.app import main
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
sys.exit(main(sys.argv[1:]))
"""


def workers_of_ray(driver: int) -> list[int]:
    """Ray's processes that run a task of ours."""
    args = ["ps", "-eo", "pid,ppid,args"]
    lines = subprocess.run(args, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split(None, 2) for line in lines[1:]]
    below = {driver}
    for _ in range(3):  # the raylet, its workers
        below |= {int(pid) for pid, parent, _ in rows if int(parent) in below}
    return [
        int(pid) for pid, _, args in rows if int(pid) in below and args.startswith("ray::_task")
    ]


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos", 300, broken=[2, 3])
    weights = str(random_weights(tmp_path / "small.safetensors"))
    args = ["embed", str(photos), "--weights", weights, *OPTIONS, "--out"]
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_WORKERS, *args, str(tmp_path / "store"), "--engine", "ray"],
        env=environment(RAY_USAGE_STATS_ENABLED="0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    index = tmp_path / "store" / "index"
    while not [*index.glob("*.parquet")] and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(workers_of_ray(process.pid)[0], signal.SIGKILL)
    assert 0 < len([*index.glob("*.parquet")]) < 75
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    assert len([line for line in out.splitlines() if line.startswith("{")]) == 75
    assert "2 of 300 photos left out" in err
    assert main([*args, str(tmp_path / "whole")]) == 1
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_jax_says_which_part_a_process_is(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos", 10)
    weights = str(random_weights(tmp_path / "small.safetensors"))
    args = ["embed", str(photos), "--weights", weights, *OPTIONS, "--out"]
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    # As `srun --ntasks 2` sets them.
    both = [
        subprocess.Popen(
            command(*args, str(tmp_path / "store"), "--shard", "jax"),
            env=environment(**slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    lines = []
    for process in both:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        lines.append(out.count("\n"))
    assert sorted(lines) == [1, 2]
    assert main([*args, str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
