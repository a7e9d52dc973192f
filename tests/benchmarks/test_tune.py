"""Tuning: its cases run by XLA on a CPU, and its kernels are lowered for a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.cases.kernel_cases import OPS, PARTS, Case
from benchmarks.peers import jax_kernels
from benchmarks.run.jobs import relative_error
from benchmarks.suites import kernels, tune
from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11"
)


def small(op: str, density: float, **fields: Any) -> Case:
    """A case of two heads of 32."""
    return Case(op=op, model="quick", batch=2, density=density, **fields)


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("op", [*OPS, *PARTS])
def test_checks_against_float32(op: str, density: float) -> None:
    case = small(op, density, order="groups" if op == "stripe" and density < 1 else None)
    want = jax_kernels.reference_output(case)
    fields = kernels.timed(case)["fields"] | {"config": None, "tiling": None}
    own: dict[str, Any] = dict(suite="tune", what=case, options=tune.Options(runs=1))
    program = tune.TuneJob(implementation="xla", fields=fields, **own).build()
    assert program.output is not None and program.measure is not None
    assert relative_error(program.output, want) < kernels.MAX_ERROR["bfloat16"]
    assert program.measure()["median_ms"] > 0


def test_a_token_that_is_not_routed_may_not_change() -> None:
    case = small("mlp", 0.3)
    _, arrays = jax_kernels.split(case)
    jax_kernels.check_unrouted(case, arrays["x"], arrays)
    token = np.delete(np.arange(256), np.asarray(arrays["index"][1]))[0]
    changed = arrays["x"].at[1, token, 0].add(1.0)
    with pytest.raises(ValueError, match="not routed has changed"):
        jax_kernels.check_unrouted(case, changed, arrays)


@needs_mosaic
@pytest.mark.parametrize(
    ("op", "order"),
    [
        ("stripe", None),
        ("stripe", "tiles"),
        ("stripe", "blocks"),
        ("stripe", "groups"),
        ("window", None),
        ("window", "static"),
        ("window", "heads"),
        *((op, None) for op in ("mlp", *PARTS)),
    ],
)
def test_kernels_are_launched_as_prepared(op: str, order: str | None) -> None:
    density = 1.0 if (op, order) == ("stripe", None) else 0.3
    case = Case(op=op, model="vit_t", batch=1, density=density, order=order)
    for config in tune.configs_of(case):
        assert "mosaic_gpu" in lowered(case, config)


def lowered(case: Case, config: dict[str, Any] | None) -> str:
    """The whole function for a GPU, and the kernel of attention alone."""
    static, arrays = jax_kernels.split(case)
    function = jax_kernels.bind(case, static, "mosaic_gpu", config)
    text = jax.jit(function).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    if case.op not in ("stripe", "window"):
        return text
    found: list[Any] = []

    def operands(arrays: Any) -> Any:
        launch, operands = jax_kernels.prepare(case, static | arrays, config)
        found.append(launch)
        return operands

    shapes = jax.eval_shape(operands, arrays)
    alone = jax.jit(found[0]).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    return text if "mosaic_gpu" in alone else "no kernel alone"


def test_lists_cases_by_their_words() -> None:
    result = CliRunner().invoke(app, ["tune", "lin1", "--list", "--configs", "--only", "B8"])
    lines = result.output.splitlines()
    assert result.exit_code == 0 and all("B8" in line.split() for line in lines)
    assert "lin1 vit_l B8 r0.3 mosaic_gpu cluster=2" in lines
    assert "lin1 vit_l B8 r0.3 mosaic_gpu default" in lines
    result = CliRunner().invoke(app, ["tune", "conv"])
    assert result.exit_code == 2 and "kernel must be one of stripe" in result.output


def test_tunes(tmp_path: Path) -> None:
    out = tmp_path / "tune.jsonl"
    arguments = ["tune", "norm", "--quick", "--only", "r0.4", "--only", "B1", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["implementation"] for r in found} == {"xla", "mosaic_gpu"}, result.output
    for record in found:
        timed = record["implementation"] == "xla"
        assert (record["not_run"] is None) == timed
        assert record["suite"] == "tune" and record["op"] == "norm"
        assert (record["median_ms"] is not None) == timed
