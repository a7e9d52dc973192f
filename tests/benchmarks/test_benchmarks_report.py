"""The report from raw files: the same bytes always, the newest record of every case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_benchmarks import ROOT
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.report import data, document

Records = Sequence[dict[str, Any]]
COMMON: dict[str, Any] = {
    "device": "A GPU",
    "driver": "1.2",
    "versions": {"jax": "0.11.2", "torch": "2.11"},
    "commit": "0123456789",
    "time": "2026-01-01T00:00:00+00:00",
    "not_run": None,
    "dtype": "bfloat16",
    "image_size": 1024,
    "batch": 8,
    "model": "vit_l",
    "peer": "sparsesam_jax",
    "runs": 20,
}


def encoder(implementation: str, density: float, ms: float, **fields: Any) -> dict[str, Any]:
    record = COMMON | {
        "suite": "encoder",
        "implementation": implementation,
        "density": density,
        "sparse": None if density == 1 else "attention and MLP",
        "median_ms": 8 * ms,
        "q1_ms": 7.9 * ms,
        "q3_ms": 8.1 * ms,
        "ms_per_image": ms,
        "queued_ms": 7.2 * ms,
        "peak_mib": 1000.0,
        "tflops": 500.0,
        "ceiling": {"products": 600.0, "attention": 400.0, "copy": 4.0, "copies": 4.0},
        "share_of_ceiling": 0.5,
        "max_error": 1e-2,
    }
    return record | fields


def scaling(axes: list[str], batch: int, ms: float) -> dict[str, Any]:
    fields = {"suite": "scaling", "axes": axes, "batch": batch, "temp_mib": 10.0 * batch}
    return encoder("mosaic_gpu", 1.0, ms) | fields | {"sparsity": None, "sparse": None}


def end_to_end(implementation: str, prompts: int, ms: float, **fields: Any) -> dict[str, Any]:
    parts = {"preprocess": 1.0, "encoder": 2.0, "decoder": 3.0, "upscale": 4.0}
    own = {"suite": "end-to-end", "batch": 1, "prompts": prompts, "parts_ms": parts}
    return encoder(implementation, 1.0, ms) | own | {"median_ms": ms, **fields}


RECORDS = [
    encoder("xla", 1.0, 18.0),
    encoder("mosaic_gpu", 1.0, 9.0),
    encoder("mosaic_gpu", 0.3, 4.5, sparse="attention"),
    encoder(
        "mosaic_gpu",
        0.3,
        3.0,
        parts_ms={"matmul_add": 16.0, "gather_norm_kernel": 2.0, "fusion_1": 4.0},
        floor_ms={"products": 12.0, "attention": 1.0},
    ),
    encoder("compile", 1.0, 9.5, peer="torch", what="torch.compile"),
    encoder("eager", 1.0, 0.0, peer="torch", median_ms=None, not_run="no package"),
    end_to_end("mosaic_gpu", 1, 20.0),
    end_to_end("transformers-compile", 1, 30.0, peer="transformers", what="SamModel"),
    scaling(["batch"], 1, 1.0),
    scaling(["batch", "density"], 8, 8.0),
]


def write(folder: Path, records: Records, name: str = "a.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    results = write(tmp_path / "results", RECORDS)
    written = []
    for name, order in (("one", 1), ("two", -1)):
        folder = tmp_path / name
        folder.mkdir()
        write(results, RECORDS[::order])
        document.write(results, folder / "benchmarks.md")
        written.append(contents(folder))
    assert written[0] == written[1]
    names = ("encoder", "decomposition", "roofline", "scaling")
    assert set(written[0]) == {"benchmarks.md", *(f"benchmarks_{name}.svg" for name in names)}
    text = written[0]["benchmarks.md"].decode()
    assert "Not run: kernels, ceilings, cpu." in text
    assert "A GPU, driver 1.2, jax 0.11.2, torch 2.11, commit 0123456;" in text
    assert "| vit_l | 8 | 0.3 | 18.00 | 9.00 (2.00 x) | 4.50 (2.00 x) | 3.00 (1.50 x) |" in text
    compiled = "| PyTorch compile | 9.50 | 9.38 to 9.62 | 8.55 | 1000 | 500 | 50%"
    assert f"| vit_l | 8 | dense {compiled}" in text
    assert "| no package | encoder vit_l B8 dense eager |" in text
    assert "| batch | vit_l | mosaic_gpu | 1 | 1, 8 | 1.00 | 1.00 | 1.00 | 1.00 |" in text
    assert "- *transformers-compile*: SamModel." in text
    ours, theirs = (line for line in text.splitlines() if line.endswith("4.0 | 1.0e-02 |"))
    assert ours.startswith("| vit_l | dense | mosaic_gpu | 1 | 20.0 |")
    assert theirs.startswith("| vit_l | dense | transformers-compile | 1 | 30.0 |")
    parts = "| vit_l | 8 | 0.3 | mosaic_gpu | 0.000 | 0.000 | 0.250 | 2.000 | 0.500 | 1.500 | 0.125"
    assert parts in text


def test_another_dtype_is_in_the_first_table_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    written = []
    for other in (
        [],
        [encoder("mosaic_gpu", 1.0, 8.75, dtype="float16", parts_ms={"matmul": 1.0})],
    ):
        results = write(tmp_path / "results", [*RECORDS, *other])
        document.write(results, folder / "benchmarks.md")
        written.append(contents(folder))
    usual, both = written
    line = "| vit_l | 8 | dense | mosaic_gpu float16 | 8.75 | "
    before, after = (x["benchmarks.md"].decode().splitlines() for x in written)
    assert [x for x in after if not x.startswith(line)] == before != after
    assert all(both[name] == usual[name] for name in usual if name.endswith(".svg"))


def test_newest_record_wins(tmp_path: Path) -> None:
    later = {"time": "2026-02-01T00:00:00+00:00"}
    write(tmp_path, [encoder("xla", 1.0, 2.0, **later), encoder("mosaic_gpu", 1.0, 3.0)], "a.jsonl")
    failed = {"median_ms": None, "not_run": "no GPU", **later}
    write(
        tmp_path, [encoder("xla", 1.0, 1.0), encoder("mosaic_gpu", 1.0, 0.0, **failed)], "b.jsonl"
    )
    nowhere = failed | {"device": None}
    write(tmp_path, [encoder("xla", 1.0, 0.0, **nowhere)], "c.jsonl")
    found = {r["implementation"]: r["ms_per_image"] for r in data.newest(tmp_path)}
    assert found == {"xla": 2.0, "mosaic_gpu": 3.0}


def test_scaling_runs_of_one_axis_each_meet(tmp_path: Path) -> None:
    write(tmp_path, [scaling(["batch"], 8, 8.0), scaling(["image_size"], 8, 8.5)])
    (found,) = data.newest(tmp_path)
    assert found["axes"] == ["batch", "image_size"]


def test_needs_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="results must hold records of a suite, got none"):
        data.newest(tmp_path)
    result = CliRunner().invoke(app, ["report", "--results", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith("error: results must hold") and result.output.count("\n") == 1


@pytest.mark.parametrize("vectors", [True, False], ids=["as it is", "without AVX"])
def test_document_is_the_one_of_the_raw_files(vectors: bool, tmp_path: Path) -> None:
    """Whatever the processor: numpy's last digits depend on its vector instructions."""
    features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    environment = dict(os.environ)
    if not vectors:
        environment["NPY_DISABLE_CPU_FEATURES"] = " ".join(features)
    command = [sys.executable, "-m", "benchmarks", "report", "--out", f"{tmp_path}/benchmarks.md"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for name, content in contents(tmp_path).items():
        expected = (ROOT / "docs" / name).read_bytes()
        assert content == expected, f"{name}: run python -m benchmarks report"
