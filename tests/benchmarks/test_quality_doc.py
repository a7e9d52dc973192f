"""`docs/quality.md` is what the kept raw files say, byte for byte."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.cases import shapes
from benchmarks.report import quality_document
from benchmarks.suites.quality.variants import Variant
from sparsesam_jax import Sparsity

ROOT = Path(__file__).resolve().parents[2]
DENSE = np.linspace(0.5, 0.9, 10)


def test_the_document_is_what_the_raw_files_say(tmp_path: Path) -> None:
    out = tmp_path / "quality.md"
    results = str(ROOT / "benchmarks" / "results")
    command = ["quality-doc", "--results", results, "--out", str(out)]
    assert CliRunner().invoke(app, command).exit_code == 0
    kept = (ROOT / "docs" / "quality.md").read_bytes()
    assert out.read_bytes() == kept, "run python -m benchmarks quality-doc"


def entries(variant: Variant, change: float, **fields: Any) -> list[dict[str, Any]]:
    """A sweep's two records of a variant that changes every photo's IoU alike."""
    summary = {
        "kind": "summary",
        "suite": "sweep",
        "model": "vit_t",
        "device": "a chip",
        "dtype": "float32",
        "versions": {"jax": "0"},
        "images": 10,
        "miou": float((DENSE + change).mean()),
        "agreement": 0.9,
        "feature_error": 0.1,
        "variant": variant.name,
        "density": variant.density,
        "gmacs": variant.gmacs(shapes.model_config("vit_t").image_encoder),
    }
    ids = [f"{index:02}" for index in range(10)]
    photos = {"kind": "per_photo", "variant": variant.name, "ids": ids}
    return [
        photos | {"iou": (DENSE + change).tolist()},
        summary | json.loads(json.dumps(variant.definition)) | fields,
    ]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_verdicts_follow_the_numbers(tmp_path: Path) -> None:
    dense = entries(Variant("dense"), 0)
    write(
        tmp_path / "quality_a.jsonl",
        [
            *dense,
            *entries(Variant("x", Sparsity.released(0.4)), -0.0110),
            *entries(Variant("y", Sparsity(0.4)), -0.0039),
            *entries(Variant("tome", method=("tome", 0.4)), -0.0100),
            *entries(Variant("ours", method=("sparsesam", 0.4)), -0.0039),
            *entries(Variant("tome 3", method=("tome", 0.3)), -0.0100),
            *entries(Variant("ours 3", method=("sparsesam", 0.3)), -0.0070),
            *entries(Variant("mean", dataclasses.replace(Sparsity(0.3)), group_update={}), -0.0001),
        ],
    )
    write(
        tmp_path / "quality_b.jsonl",
        [
            *(record | {"device": "another"} for record in dense),
            *entries(Variant("x again", Sparsity.released(0.4)), -0.0081, device="another"),
        ],
    )
    (tmp_path / "cpu.jsonl").write_text("not about quality\n")
    paths = sorted(tmp_path.glob("quality*.jsonl"))
    text = quality_document.document(paths)
    assert text == quality_document.document(paths)
    # Found by what was measured; of equally many photos, in the last file.
    assert "dispersion of the keys, per head | 0.4 | 10 | -0.0080 | -0.0081 | yes |" in text
    assert "Density 0.4: it loses 0.0039; a loss of 0.004 is allowed: met." in text
    assert "Density 0.3: it loses 0.0070; a loss of 0.006 is allowed: **not met**." in text
    assert "Density 0.4: ToMe loses 2.6 times as much (target 2.1: met)." in text
    assert "Density 0.3: ToMe loses 1.4 times as much (target 2.1: **not met**)." in text
    assert "| x | 10 | a chip: 0.6890; another: 0.6919 | 0.00290 |" in text
    table = text[text.index("## All of quality_a.jsonl") :]
    assert "| mean | 0.3 |" in table


def test_the_measurement_on_most_photos_is_shown(tmp_path: Path) -> None:
    few = [*entries(Variant("dense"), 0), *entries(Variant("few", Sparsity(0.4)), -0.5)]
    for record in few:
        for key in {"iou", "ids"} & record.keys():
            record[key] = record[key][:4]
        if "images" in record:
            record["images"] = 4
    write(tmp_path / "quality_a.jsonl", few)
    many = [*entries(Variant("dense"), 0), *entries(Variant("many", Sparsity(0.4)), -0.0039)]
    write(tmp_path / "quality_b.jsonl", many)
    write(tmp_path / "quality_c.jsonl", few)
    text = quality_document.document(sorted(tmp_path.glob("quality*.jsonl")))
    assert "Up to 10 photos that `vit_t` never saw" in text
    assert "| `Sparsity(r)` | 0.4 | 10 | 33.47 | -0.0039 |" in text


def test_sentences_are_short() -> None:
    """Documents are for a stranger: at most 25 words, tables and lists of versions aside."""
    for name in ("benchmarks", "quality"):
        text = (ROOT / "docs" / f"{name}.md").read_text()
        lines = (x for x in text.splitlines() if not x.startswith(("|", "NVIDIA", "AMD", "[q")))
        prose = re.sub(r"\]\([^)]*\)|\n *-", ". ", "\n".join(lines))
        for sentence in re.split(r"[.;?!](?:\*\*)?\s|\n\n", prose):
            assert len(sentence.split()) <= 25, sentence


def test_without_raw_files_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "quality.md"
    command = ["quality-doc", "--results", str(tmp_path), "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "results must hold quality*.jsonl, got none" in result.output
    assert not out.exists()


@pytest.mark.parametrize("text", ["", '{"kind": "photos", "ids": []}\n'])
def test_a_file_without_dense_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "quality_a.jsonl").write_text(text)
    with pytest.raises(ValueError, match="must hold a sweep with its dense record"):
        quality_document.write(tmp_path, tmp_path / "quality.md")
