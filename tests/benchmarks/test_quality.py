"""`benchmarks quality` and `sweep` end to end on drawn photos: what they measure, keep and say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import records
from benchmarks.__main__ import app
from benchmarks.cases import shapes
from benchmarks.suites.quality import Options, changes, measure, variants
from benchmarks.suites.quality.variants import DENSE, Variant
from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.checkpoints import native
from sparsesam_jax.methods import NAMES
from sparsesam_jax.sparsity.work import encoder_work

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of `quality` and `sweep`: three drawn photos and tiny random weights."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate([(60, 90), (90, 60), (64, 64)]):
        mask = np.zeros((height, width), bool)
        mask[10:40, 20:50] = True
        image = rng.integers(0, 100, (height, width, 3)) + 120 * mask[..., None]
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{index}.png")
        Image.fromarray(255 * mask.astype(np.uint8)).save(folder / "masks" / f"{index}.png")
    config = shapes.model_config(shapes.QUICK_MODEL)
    native.write(folder / "quick.safetensors", config, shapes.random_weights(config))
    return [
        *("--images", f"{folder}/images", "--masks", f"{folder}/masks"),
        *("--weights", f"{folder}/quick.safetensors", "--batch", "2"),
    ]


def test_quality_compares_variants_with_dense(photos: list[str], tmp_path: Path) -> None:
    out = tmp_path / "quality.jsonl"
    file = tmp_path / "variants.json"
    entry = {"name": "sparse", "sparsity": {"density": 0.3, "importance": "sobel"}}
    file.write_text(json.dumps([entry]))
    arguments = [
        "quality",
        *photos,
        "--threads",
        "2",
        "--variants",
        str(file),
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records.read(out):
        by_kind.setdefault(record["kind"], []).append(record)
    assert {tuple(r["ids"]) for r in by_kind["per_photo"]} == {("0", "1", "2")}
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
    assert 0 < sparse["gmacs"] < summaries["dense"]["gmacs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "best"], "preset must be one of default, sobel-keys, released"),
        (["--density", "1.5"], "density must lie in (0, 1], got 1.5"),
        (["--batch", "0"], "batch must be positive, got 0"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        (["--weights", "absent"], "weights must be the name of embedded ones"),
        (["--masks", "absent"], "masks must be a folder, got 'absent'"),
    ],
)
def test_quality_refuses_wrong_arguments(
    photos: list[str], arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["quality", *photos, *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1


def test_quality_stops_at_a_broken_photo(photos: list[str], tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for index, size in enumerate([(90, 60), (60, 90), (9, 9)]):
        Image.new("L", size, 255).save(masks / f"{index}.png")
    result = CliRunner().invoke(app, ["quality", *photos, "--masks", str(masks)])
    assert result.exit_code == 2
    assert "the mask of 2 must have its photo's size (64, 64), got (9, 9)" in result.output


def test_presets_follow_their_names() -> None:
    found = {v.name: v.sparsity for v in variants.presets(list(variants.PRESETS), [0.3])}
    assert len(found) == len(variants.PRESETS)
    assert found["released@0.3"] == Sparsity.released(0.3)
    assert found["default@0.3"] == Sparsity(0.3)
    attention_only = found["attention-only@0.3"]
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
        variants.read(path)


def test_variants_take_densities_per_block(tmp_path: Path) -> None:
    path = tmp_path / "variants.json"
    path.write_text('[{"name": "a", "sparsity": {"density": 0.4, "mlp_density": [1, 0.5]}}]')
    assert variants.read(path) == [Variant("a", Sparsity(0.4, mlp_density=(1, 0.5)))]


def test_sweep_continues_what_was_cut(photos: list[str], tmp_path: Path) -> None:
    file, more, out = (tmp_path / name for name in ("some.json", "more.json", "sweep.jsonl"))
    entries = [
        {"name": "sparse", "sparsity": {"density": 0.3}},
        {"name": "mean", "sparsity": {"density": 0.5}, "group_update": {"skipped": "mean"}},
        {"name": "tome", "method": ["tome", 0.5]},
    ]
    file.write_text(json.dumps(entries[:1]))
    more.write_text(json.dumps(entries[1:]))
    # However slow the machine is, what compiles is waited for.
    patient = ["--processes", "2", "--seconds", "3600", "--timeout", "3600"]
    command = ["sweep", *photos, "--variants", str(file), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, *patient])
    assert result.exit_code == 0, result.output
    first = records.read(out)
    command += ["--variants", str(more)]
    late = CliRunner().invoke(app, [*command, "--seconds", "1e-9"])
    assert late.exit_code == 130
    assert "not run: mean, tome" in late.output
    assert records.read(out) == first
    result = CliRunner().invoke(app, [*command, *patient])
    assert result.exit_code == 0, result.output
    found = records.read(out)
    assert found[: len(first)] == first
    assert [(r["kind"], r["variant"]) for r in found[:4]] == [
        (kind, name) for name in ("dense", "sparse") for kind in ("per_photo", "summary")
    ]
    assert {r["variant"] for r in found[4:]} == {"mean", "tome"}  # whichever compiles first
    assert "images_per_s" not in found[1]
    rows = {row.variant.name: row for row in changes.rows(found, "sweep")}
    assert set(rows) == {"dense", "sparse", "mean", "tome"}
    paired = np.subtract(found[2]["iou"], found[0]["iou"])
    assert rows["sparse"].change == pytest.approx(paired.mean())
    entries[0]["sparsity"] = {"density": 0.4}
    file.write_text(json.dumps(entries[:1]))
    other = CliRunner().invoke(app, command)
    assert other.exit_code == 2
    assert "another variant of the name 'sparse'" in other.output


def test_sweep_has_the_numbers_of_quality(photos: list[str], tmp_path: Path) -> None:
    file = tmp_path / "variants.json"
    fields = {"density": 0.3}
    entries = [
        {"name": "sparse", "sparsity": fields},
        {"name": "first", "sparsity": fields, "group_update": {"skipped": "first"}},
    ]
    file.write_text(json.dumps(entries))
    found = []
    for command in (["quality"], ["sweep", "--seconds", "3600", "--timeout", "3600"]):
        out = tmp_path / f"{command[0]}.jsonl"
        arguments = [*photos, "--variants", str(file), "--out", str(out)]
        result = CliRunner().invoke(app, [*command, *arguments])
        assert result.exit_code == 0, result.output
        rows = (r for r in records.read(out) if r["kind"] == "per_photo")
        found.append({r["variant"]: r for r in rows})
    expected, swept = found
    assert set(expected) == set(swept) == {"dense", "sparse", "first"}
    for name, record in swept.items():
        assert record["ids"] == expected[name]["ids"]
        # A pixel whose logit is nearly 0 may be rounded to either side: 4 of some thousand.
        for key, tolerance in (("iou", 1e-3), ("agreement", 1e-3), ("feature_error", 1e-4)):
            assert record[key] == pytest.approx(expected[name][key], abs=tolerance)


def test_variants_that_rank_alike_share_a_program(photos: list[str]) -> None:
    options = dict(zip(photos[::2], photos[1::2], strict=True))
    sam = Sam.from_pretrained(options["--weights"])
    densities = [Variant(f"{r}", Sparsity(r)) for r in (0.5, 0.3)]
    apart = Variant("apart", Sparsity(0.3, importance="dispersion"))
    spread = [Variant(f"{r}", Sparsity(r, ranking="spread")) for r in (0.5, 0.3)]
    programs = [nnx.graphdef(v.masked(sam)) for v in (*densities, apart, *spread)]
    assert programs[0] == programs[1]
    assert len(set(programs)) == 4


def test_an_interrupt_keeps_what_is_done(photos: list[str], capsys: Any) -> None:
    options = dict(zip(photos[::2], photos[1::2], strict=True))
    found: list[dict[str, Any]] = []

    def interrupted(sam: Sam) -> Iterator[tuple[Variant, SamPredictor]]:
        yield DENSE, SamPredictor(sam)
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        folders = {name: Path(options[f"--{name}"]) for name in ("images", "masks")}
        given = Options(**folders, weights=options["--weights"], batch=2)
        bench = measure.Bench("quality", given, pool)
        bench.compare(interrupted(bench.sam), found.append, Console())
    assert [r["kind"] for r in found] == ["per_photo", "summary"] and bench.found == found
    assert "Interrupted after 1 variants." in capsys.readouterr().out


def test_halves_share_no_photo() -> None:
    names = [f"{index:04}" for index in range(801, 1001)]
    half = changes.choosing_half(names)
    assert half.sum() == 100
    again = changes.choosing_half(names[::-1])
    np.testing.assert_array_equal(half, again[::-1])


def test_candidates_compute_what_the_released_preset_does(tmp_path: Path) -> None:
    config = shapes.model_config("vit_t").image_encoder
    found = variants.candidates(config, [0.3])
    for variant in found:
        density = float(variant.name.rsplit("@", 1)[1])
        budget = encoder_work(config, Sparsity.released(density)).total / 1e9
        assert 0.97 * budget < variant.gmacs(config) <= 1.0001 * budget, variant.name
    variants.write(found, tmp_path / "candidates.json")
    assert variants.read(tmp_path / "candidates.json") == found
    assert DENSE.gmacs(config) == encoder_work(config).total / 1e9


def test_methods_are_swept_by_name(tmp_path: Path) -> None:
    path = tmp_path / "methods.json"
    assert CliRunner().invoke(app, ["candidates", "--methods", str(path)]).exit_code == 0
    found = variants.read(path)
    assert [v.method for v in found] == [(name, r) for r in (0.5, 0.4, 0.3) for name in NAMES]
    config = shapes.model_config("vit_t").image_encoder
    dense = DENSE.gmacs(config)
    spent = {v.method: v.gmacs(config) for v in found}
    assert spent["tome", 0.4] == spent["tome", 0.5] < dense
    assert spent["sparge", 0.3] < spent["sparge", 0.5] < dense < spent["kmeans", 0.5]


def test_help_does_not_import_jax() -> None:
    program = (
        "import sys, typer.testing as t; from benchmarks.__main__ import app\n"
        "assert t.CliRunner().invoke(app, ['quality', '--help']).exit_code == 0\n"
        "assert not {'jax', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
