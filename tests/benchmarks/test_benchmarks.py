"""The CPU benchmark end to end at tiny shapes: what it checks, writes and says, untimed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_case import Toy, ToyCpu, toy

from benchmarks import records
from benchmarks.run.pool import Pool
from benchmarks.run.timing import Spread
from benchmarks.suites import cpu

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "suite",
    "peer",
    "model",
    "batch",
    "density",
    "implementation",
    "dtype",
    "median_ms",
    "q1_ms",
    "q3_ms",
    "compile_s",
    "ms_per_image",
    "peak_mib",
    "max_error",
    "device",
    "threads",
    "versions",
    "commit",
}


def start(*arguments: str, cwd: Path = ROOT, path: Path | None = None) -> subprocess.Popen[str]:
    """`python -m benchmarks`, with `path` in front of what can be imported."""
    places = [str(ROOT), *([str(path)] if path else [])][:: -1 if path else 1]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "benchmarks", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background job, as CI may be, ignores Ctrl-C, and so would all it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_quick_cpu_measures_every_peer(tmp_path: Path) -> None:
    out = tmp_path / "results" / "cpu.jsonl"
    process = start("cpu", "--quick", "--runs", "3", "--warmups", "0", "--out", str(out))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    found = {(r["peer"], r["implementation"], r["density"]): r for r in records.read(out)}
    assert set(found) == {
        ("transformers", "eager", 1.0),
        ("transformers", "sdpa", 1.0),
        ("sparsesam_jax", "xla", 1.0),
        ("sparsesam_jax", "xla", 0.3),
    }
    for record in found.values():
        assert set(record) >= KEYS
        assert record["not_run"] is None
        assert len(record["times_ms"]) == 3
        assert record["q1_ms"] <= record["median_ms"] <= record["q3_ms"]
        assert record["name"] in text
    ours = found["sparsesam_jax", "xla", 1.0]
    assert ours["reference"] == "transformers eager"
    assert ours["max_error"] <= cpu.MAX_DENSE_ERROR
    assert ours["compile_s"] > 0
    assert ours["ratio_to_pytorch"] > 0
    sparse = found["sparsesam_jax", "xla", 0.3]
    assert sparse["reference"] == "sparsesam_jax xla"
    assert sparse["relative_error"] > 0
    assert sparse["gflop"] < ours["gflop"]


def test_interrupted_cpu_keeps_results_and_names_missing_peers(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no transformers on this machine')")
    out = tmp_path / "cpu.jsonl"
    arguments = ("cpu", "--quick", "--runs", "1000000", "--warmups", "0", "--out", str(out))
    process = start(*arguments, path=broken.parent)
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("timing"):
                break
        # The first rounds take milliseconds; the seconds are there for a busy machine.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=4)
    finally:
        process.send_signal(signal.SIGINT)
        text = "".join(lines) + process.communicate(timeout=120)[0]
    assert process.returncode == 130, text
    assert "transformers sdpa: not run: no transformers on this machine" in text
    for record in records.read(out):
        missing = record["peer"] == "transformers"
        assert (record["not_run"] is not None) == missing
        assert (record["median_ms"] is None) == missing
        assert bool(record["times_ms"]) != missing


def test_dense_that_differs_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    def case(name: str, scale: float, bound: float | None = cpu.MAX_DENSE_ERROR) -> Toy:
        reference = None if name == "torch" else "torch"
        return toy(name, scale, reference=reference, max_error=bound, kind=ToyCpu)

    written: list[dict[str, Any]] = []
    jobs = [case("torch", 1), case("near", 1.0001), case("far", 1.001), case("nan", np.nan, None)]
    jobs.append(case("sparse", 2, None))
    with Pool() as pool:
        outcome = pool.run(jobs, cpu.Options(runs=2, commit="abc"), written.append)
    assert outcome.exit_code == 1
    found = {record["name"]: record for record in written}
    assert found["near"]["times_ms"] == [1.0001, 1.0001] and found["near"]["runs"] == 2
    assert found["far"]["not_run"] == "wrong: error 1.00e-03, at most 2e-04"
    assert found["nan"]["not_run"] == "wrong: error nan"
    assert found["sparse"]["max_error"] == found["sparse"]["relative_error"] == 1
    for name in ("far", "nan"):
        assert found[name]["median_ms"] is None and found[name]["times_ms"] == []
    assert "timing 2 rounds" in capsys.readouterr().out


def test_spread() -> None:
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(3, 2, 4, 5)
    assert Spread.of([7]) == Spread(7, 7, 7, 1)
    with pytest.raises(ValueError, match="at least one run"):
        Spread.of([])


def test_writer_keeps_every_record_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.jsonl"
    with records.writer(path) as write:
        assert not path.exists()  # an older file stays until there is something new
        write({"a": 1})
        assert records.read(path) == [{"a": 1}]
        write({"b": [2]})
    assert records.read(path) == [{"a": 1}, {"b": [2]}]
