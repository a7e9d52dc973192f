"""The benchmarks end to end at tiny shapes: what they check, write and say. Nothing is timed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks import cpu, records, shapes
from benchmarks.__main__ import app
from benchmarks.metrics import bootstrap_interval, iou
from benchmarks.timing import Spread
from benchmarks.variants import PRESETS, Variant, preset_variants, read_variants
from benchmarks.worker import CheckError, Job
from sparsesam_jax import Sparsity, weights

ROOT = Path(__file__).resolve().parents[1]
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
            process.wait(timeout=8)
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


def test_dense_that_differs_is_not_timed() -> None:
    features = np.ones((1, 2, 2, 3), np.float32)

    def case(peer: str, output: np.ndarray) -> cpu.Case:
        job = Job(
            peer=peer,
            implementation="any",
            weights="",
            pixels="",
            output="",
            threads=1,
            warmups=0,
        )
        return cpu.Case(job, output=output)

    torch = case("transformers", features)
    cpu.check([torch, case("sparsesam_jax", features * (1 + 1e-4))])
    with pytest.raises(CheckError, match=r"sparsesam_jax any must agree .* got 1.00e-03"):
        cpu.check([torch, case("sparsesam_jax", features * (1 + 1e-3))])
    with pytest.raises(CheckError, match="finite"):
        cpu.check([torch, case("sparsesam_jax", features * np.nan)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of `quality`: three drawn photos of different sizes, and tiny random weights."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for index, (height, width) in enumerate([(60, 90), (90, 60), (64, 64)]):
        mask = np.zeros((height, width), bool)
        mask[10:40, 20:50] = True
        image = rng.integers(0, 100, (height, width, 3)) + 120 * mask[..., None]
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{index}.png")
        Image.fromarray(255 * mask.astype(np.uint8)).save(folder / "masks" / f"{index}.png")
        rows.append(dict(id=index, box_x0=20, box_y0=10, box_x1=49, box_y1=39))
    with open(folder / "manifest.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    config = shapes.model_config(shapes.QUICK_MODEL)
    weights.write(folder / "quick.safetensors", config, shapes.random_weights(config))
    return [
        *("quality", "--images", f"{folder}/images", "--masks", f"{folder}/masks"),
        *("--manifest", f"{folder}/manifest.csv", "--weights", f"{folder}/quick.safetensors"),
        *("--batch", "2", "--threads", "2"),
    ]


def test_quality_compares_variants_with_dense(photos: list[str], tmp_path: Path) -> None:
    out = tmp_path / "quality.jsonl"
    variants = tmp_path / "variants.json"
    entry = {"name": "sparse", "sparsity": {"density": 0.3, "importance": "sobel"}}
    variants.write_text(json.dumps([entry]))
    arguments = [*photos, "--variants", str(variants), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records.read(out):
        by_kind.setdefault(record["kind"], []).append(record)
    assert by_kind["photos"][0]["ids"] == ["0", "1", "2"]
    rows = {row["variant"]: row for row in by_kind["per_photo"]}
    summaries = {row["variant"]: row for row in by_kind["summary"]}
    assert list(rows) == list(summaries) == ["dense", "sparse"]
    for name, summary in summaries.items():
        assert len(rows[name]["iou"]) == summary["images"] == 3
        assert summary["miou"] == pytest.approx(np.mean(rows[name]["iou"]), abs=1e-5)
        assert summary["images_per_s"] > 0
    assert rows["dense"]["agreement"] == [1, 1, 1]
    assert rows["dense"]["feature_error"] == [0, 0, 0]
    assert summaries["dense"]["difference"] is None
    sparse = summaries["sparse"]
    paired = np.subtract(rows["sparse"]["iou"], rows["dense"]["iou"])
    assert sparse["difference"] == pytest.approx(paired.mean(), abs=2e-5)
    low, high = sparse["difference_ci95"]
    assert low <= sparse["difference"] <= high
    assert min(rows["sparse"]["feature_error"]) > 0
    assert Sparsity(**sparse["sparsity"]) == Sparsity(0.3, importance="sobel")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "best"], "preset must be one of default, released"),
        (["--density", "1.5"], "density must lie in (0, 1], got 1.5"),
        (["--batch", "0"], "batch must be positive, got 0"),
        (["--dtype", "int8"], "dtype must be one of float32, float16, bfloat16; got 'int8'"),
        (["--weights", "absent"], "weights must be one of the embedded"),
        (["--manifest", "absent.csv"], "absent.csv"),
    ],
)
def test_quality_refuses_wrong_arguments(
    photos: list[str], arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, [*photos, *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1


def test_quality_names_a_missing_photo(photos: list[str], tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("id,box_x0,box_y0,box_x1,box_y1\n0,0,0,9,9\n7,0,0,9,9\n")
    result = CliRunner().invoke(app, [*photos, "--manifest", str(manifest)])
    assert result.exit_code == 2
    assert "7 is missing" in result.output


def test_presets_follow_their_names() -> None:
    variants = {v.name: v.sparsity for v in preset_variants(list(PRESETS), [0.3])}
    assert len(variants) == len(PRESETS)
    assert variants["released@0.3"] == Sparsity.released(0.3)
    assert variants["default@0.3"] == Sparsity(0.3)
    attention_only = variants["attention-only@0.3"]
    assert attention_only is not None
    assert attention_only.block_density(0, 12) == (0.3, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be a JSON list"),
        ('[{"name": "a"}]', "must be a JSON list"),
        ('[{"name": "a", "sparsity": {"densty": 1}}]', "a: .*densty"),
        ('[{"name": "a", "sparsity": {"density": 2}}]', r"a: density must lie in \(0, 1\]"),
        ('[{"name": "dense", "sparsity": {"density": 1}}]', "a name of its own"),
    ],
)
def test_variants_are_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "variants.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_variants(path)


def test_variants_take_densities_per_block(tmp_path: Path) -> None:
    path = tmp_path / "variants.json"
    path.write_text('[{"name": "a", "sparsity": {"density": 0.4, "mlp_density": [1, 0.5]}}]')
    assert read_variants(path) == [Variant("a", Sparsity(0.4, mlp_density=(1, 0.5)))]


def test_iou() -> None:
    a, b = np.zeros((2, 4, 4), bool)
    assert iou(a, b) == 1
    a[:2] = True
    b[1:3] = True
    assert iou(a, b) == pytest.approx(4 / 12)


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1, 400)
    low, high = bootstrap_interval(differences)
    assert (low, high) == bootstrap_interval(differences)
    # The normal theory's half width, which 10,000 draws know within some percent.
    half = 1.96 * differences.std() / 20
    assert (low, high) == pytest.approx(
        (differences.mean() - half, differences.mean() + half), abs=0.1 * half
    )


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


def test_help_does_not_import_jax() -> None:
    program = (
        "import sys, typer.testing as t; from benchmarks.__main__ import app\n"
        "assert t.CliRunner().invoke(app, ['quality', '--help']).exit_code == 0\n"
        "assert not {'jax', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
