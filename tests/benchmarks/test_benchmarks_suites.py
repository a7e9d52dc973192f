"""The GPU suites on a CPU at tiny shapes: what runs, what is checked, written and said, untimed."""

from __future__ import annotations

import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx
from test_benchmarks import KEYS, start
from toy_case import toy
from typer.testing import CliRunner

from benchmarks import on_gpus, records
from benchmarks.__main__ import app
from benchmarks.cases import shapes
from benchmarks.cases.kernel_cases import Case
from benchmarks.peers import PEERS, jax_models, torch_kernels, torch_models
from benchmarks.report import data
from benchmarks.run import machine
from benchmarks.run.jobs import NotRunError, relative_error
from benchmarks.run.options import SuiteOptions
from benchmarks.run.pool import Pool
from benchmarks.suites import encoder, end_to_end, kernels, scaling
from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.config import PRESETS

NEEDED = KEYS - {"threads", "compile_s"} | {"driver", "clocks", "time"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Records and output of `python -m benchmarks quick`."""
    out = tmp_path_factory.mktemp("quick") / "quick.jsonl"
    process = start("quick", "--out", str(out))
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return records.read(out), text


def test_quick_measures_every_suite(quick: tuple[list[dict[str, Any]], str]) -> None:
    found, _ = quick
    timed = [r for r in found if r["not_run"] is None]
    assert {r["suite"] for r in timed} == {
        "ceilings",
        "kernels",
        "encoder",
        "end-to-end",
        "scaling",
    }
    for record in timed:
        assert record.keys() >= NEEDED, record["suite"]
        assert record["q1_ms"] <= record["median_ms"] <= record["q3_ms"]
        assert record["max_error"] <= record.get("max_error_bound", 2e-2)
    for suite in ("kernels", "encoder"):
        for record in timed:
            if record["suite"] == suite:
                assert record["tflops"] > 0
                assert record["share_of_ceiling"] > 0
    assert {r["implementation"] for r in timed if r["suite"] == "encoder"} == {
        "xla",
        "eager",
        "flex",
        "transformers",
    }
    assert {(r["op"], r["peer"]) for r in timed if r["suite"] == "kernels"} == {
        (op, peer) for op in ("stripe", "window", "mlp") for peer in ("sparsesam_jax", "torch")
    }
    for record in timed:
        if record["suite"] == "encoder" and record["peer"] == "sparsesam_jax":
            assert 0 < record["trace_s"] < record["lower_s"] < record["compile_s"]
            assert 0 < record["xla_s"] < record["compile_s"] and record["repeats_equal"]
    whole = [r for r in timed if r["suite"] == "end-to-end"]
    assert {(r["peer"], r["prompts"]) for r in whole} == {
        (peer, prompts) for peer in ("sparsesam_jax", "transformers") for prompts in (1, 10)
    }
    for record in whole:
        assert list(record["parts_ms"]) == ["preprocess", "encoder", "decoder", "upscale"]


def test_quick_names_what_cannot_run(quick: tuple[list[dict[str, Any]], str]) -> None:
    found, text = quick
    missing = {r["implementation"]: r["not_run"] for r in found if r["not_run"]}
    assert set(missing) == {"mosaic_gpu", "compile"}
    assert "needs" in missing["mosaic_gpu"]
    for reason in missing.values():
        assert f"not run: {reason}" in text
    assert all(r["median_ms"] is None for r in found if r["not_run"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encoder", "--model", "vit"), "model must be one of vit_t"),
        (("encoder", "--density", "0"), "density must lie in (0, 1], got 0.0"),
        (("kernels", "--op", "conv"), "op must be one of stripe, window, mlp; got 'conv'"),
        (("scaling", "--axis", "depth"), "axis must be one of batch"),
        (
            ("end-to-end", "--implementation", "torch"),
            "implementation must be one of mosaic_gpu, xla, ",
        ),
    ],
)
def test_names_wrong_input(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
    assert message in result.output


@pytest.mark.parametrize(
    "sparsity",
    [
        Sparsity(0.3),
        Sparsity(0.3, split="equal", ranking="group"),
        Sparsity(0.5, split="equal", ranking="block"),
        Sparsity(0.5, split="equal", ranking="spread", layout="contiguous"),
    ],
    ids=["default", "group", "block", "spread"],
)
def test_torch_peer_is_the_same_function(sparsity: Sparsity) -> None:
    ours = jax_models.encoder("xla", "quick", 1, "float32", sparsity, own_tables=True)
    flex = torch_models.encoder("flex", "quick", 1, "float32", sparsity)
    assert relative_error(flex.output, ours.output) < 1e-5  # float32, sums in another order


def test_torch_peer_refuses_what_it_does_not_know() -> None:
    with pytest.raises(NotRunError, match="sobel"):
        torch_models.encoder("flex", "quick", 1, "float32", Sparsity.released(0.3))


def test_torch_peer_compiles_as_one_graph() -> None:
    config = shapes.model_config("quick")
    device = torch_models.Torch("flex", "float32")
    model = torch_models.load_encoder(config, "flex", Sparsity(0.3), device)
    pixels = torch.from_numpy(shapes.random_pixels(config, 1)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(pixels), model(pixels))


def test_transformers_predicts_our_masks() -> None:
    model = shapes.QUICK_MODEL
    config = shapes.model_config(model)
    size = shapes.photo_size(config)
    image, points = shapes.random_image(*size), shapes.diagonal_points(2, *size)
    ours = SamPredictor(
        nnx.merge(*jax_models.random_state(Sam.abstract(config), config, "float32"))
    )
    ours.set_image(image)
    masks, *scores = ours.predict(points, np.ones(points.shape[:2], np.int32))
    their_masks, *their_scores = torch_models.predictor("transformers", model, "float32").whole(
        points
    )
    assert their_masks.shape == masks.shape and their_masks.dtype == masks.dtype
    # Where torchvision resizes the image, some pixels are a level off.
    assert (their_masks & masks).sum() > 0.999 * (their_masks | masks).sum()
    for got, want in zip(their_scores, scores, strict=True):
        assert relative_error(got, want) < 2e-3


def test_transformers_runs_dense_only_and_compiled_on_a_gpu_only() -> None:
    densities = (1.0, 0.5, 0.3)
    jobs = end_to_end.jobs(end_to_end.Options(densities=densities))
    for name in end_to_end.Options().implementations:
        found = [job.known["density"] for job in jobs if job.implementation == name]
        assert found == list(densities if PEERS[name].ours else densities[:1])
    with pytest.raises(NotRunError, match=r"torch\.compile is measured on a GPU"):
        torch_models.predictor("transformers-compile", "quick", "float32")


def test_segment_anything_fast_gets_the_bias_of_every_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: Any, k: Any, v: Any, rel_h: Any, rel_w: Any) -> Any:
        bias = (rel_h + rel_w).flatten(-2)  # as that package documents it
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    case = Case(op="stripe", model=shapes.QUICK_MODEL, batch=1, density=1.0, dtype="float32")
    with pytest.raises(ImportError, match="segment_anything_fast"):
        torch_kernels.stripe("segment-anything-fast", case, 1)
    package = types.SimpleNamespace(flash_4=types.SimpleNamespace(_attention_rel_h_rel_w=attention))
    monkeypatch.setitem(sys.modules, "segment_anything_fast", package)
    ours = torch_kernels.stripe("segment-anything-fast", case, 1).output
    want = torch_kernels.stripe("eager", case, 1).output
    np.testing.assert_allclose(ours, want, atol=1e-5)


def test_pool_checks_before_it_times(capsys: pytest.CaptureFixture[str]) -> None:
    written: list[dict[str, Any]] = []
    jobs = [
        toy("one", 1, timed=False, reference=None),
        toy("right", 1.001),
        toy("wrong", 1.1),
        toy("raises", 0),
        toy("dies", -1),
        toy("absent", -2),
        toy("unknown", 1, reference="two"),
    ]
    with Pool() as pool:
        outcome = pool.run(jobs, SuiteOptions(width=3, limit=100, commit="abc"), written.append)
    assert outcome.exit_code == 1
    by_name = {r["implementation"]: r for r in written}
    assert by_name["right"]["median_ms"] == 1.001
    assert by_name["right"]["commit"] == "abc"
    assert by_name["right"]["max_error"] == pytest.approx(1e-3, rel=1e-3)
    assert by_name["wrong"]["not_run"] == "wrong: error 1.00e-01, at most 1e-02"
    assert by_name["wrong"]["median_ms"] is None
    assert by_name["raises"]["not_run"] == "ZeroDivisionError: scale must not be zero"
    assert "ended with code 3: last words" in by_name["dies"]["not_run"]
    assert by_name["absent"]["not_run"] == "no such device"
    assert by_name["unknown"]["max_error"] is None
    assert "unknown: 1.000 ms (1.000-1.000), unchecked" in capsys.readouterr().out


def test_kept_processes_are_used_again_unless_their_case_failed() -> None:
    jobs = [toy("one", 1, reference=None), toy("two", 1), toy("raises", 0), toy("three", 1)]
    with Pool(keep=True) as pool:
        outcome = pool.run(jobs, SuiteOptions(width=1), lambda record: None)
    one, two, failed, three = outcome.results
    assert one["process"] == two["process"] != three["process"] and failed["not_run"]


def test_pool_stops_at_its_limit() -> None:
    with Pool() as pool:
        jobs = [toy("slow", 1, sleeps=60)]
        outcome = pool.run(jobs, SuiteOptions(limit=0.5), lambda record: None)
    assert outcome.exit_code == 1
    assert outcome.results[0]["not_run"] == "its time was up"


def test_interrupted_suite_keeps_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "ceilings.jsonl"
    process = start("kernels", "--quick", "--op", "mlp", "--out", str(out))
    assert process.stdout is not None
    for line in process.stdout:
        if " copy: " in line:
            break
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert {r["suite"] for r in records.read(out)} == {"ceilings"}


def test_appends(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    for number in (1, 2):
        with records.writer(path, append=True) as write:
            write({"a": number})
    assert records.read(path) == [{"a": 1}, {"a": 2}]


def test_every_case_of_the_full_suites_can_be_named() -> None:
    densities = (1.0, 0.5, 0.4, 0.3, 0.25)
    models = tuple(PRESETS)
    options = encoder.Options(models=models, densities=densities, decomposition=(0.3,))
    jobs = encoder.jobs(options)
    names = {job.name for job in jobs}
    assert all(job.reference in names for job in jobs if job.reference)
    assert len({job.label for job in jobs}) == len(jobs)
    for suite in (end_to_end, kernels, scaling):
        jobs = suite.jobs(suite.Options(models=models))
        names = {job.name for job in jobs}
        assert all(job.reference in names for job in jobs if job.reference)
        assert len({job.label for job in jobs}) == len(jobs)


def test_growth() -> None:
    assert data.exponent([(1, 3), (2, 12), (4, 48)]) == pytest.approx(2)
    assert data.exponent([(2, 3)]) is None
    series = [
        {
            "suite": "scaling",
            "axes": ["batch"],
            "model": "quick",
            "implementation": "xla",
            "density": 1.0,
            "sparsity": None,
            "image_size": 256,
            "batch": batch,
            "median_ms": 2.0 * batch,
            "temp_mib": 3.0 * batch**0.5,
            "not_run": None,
        }
        for batch in (4, 1, 2)
    ]
    (fit,) = data.fits(series)
    assert fit["points"] == "1, 2, 4"
    assert fit["time"] == pytest.approx(1)
    assert fit["expected_time"] == pytest.approx(1)
    assert fit["memory"] == pytest.approx(0.5)


def test_relative_error() -> None:
    want = np.ones((2, 2))
    assert relative_error(want * 1.5, want) == pytest.approx(0.5)
    assert relative_error(np.ones(3), want) == float("inf")


def test_gpu_state_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\necho "580.1, 1980, 3201, [N/A], 312.5"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    clocks = {"sm_mhz": 1980, "memory_mhz": 3201, "max_sm_mhz": None, "watts": 312.5}
    assert machine.gpu_state() == {"driver": "580.1", "clocks": clocks}
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert machine.gpu_state() == {"driver": None, "clocks": None}


def test_stages_are_commands_with_known_options(tmp_path: Path) -> None:
    for stage in ("smoke", "encoder", "rest", "autotune"):
        found = list(on_gpus.commands(stage))
        assert found
        for gpu, seconds, arguments in found:
            assert 0 <= gpu < 4 and seconds > 0
            result = CliRunner().invoke(app, [*arguments, "--list"])
            assert result.exit_code == 0, result.output
            assert "B8" in result.output or "B1" in result.output or "r1.0" in result.output
    result = CliRunner().invoke(app, ["on-gpus", "all", str(tmp_path)])
    assert result.exit_code == 2 and "stage must be one of smoke" in result.output
