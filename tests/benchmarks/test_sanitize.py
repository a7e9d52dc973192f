"""The program that compute-sanitizer runs: on a CPU its cases by XLA, and its refusal."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.suites import sanitize
from pallas_kernels import implementation


def test_cases_run():
    names = []
    for name, case in sanitize.cases():
        names.append(name)
        assert np.isfinite(np.asarray(case("xla"), np.float32)).all(), name
    assert len(set(names)) == len(names)


def test_needs_a_gpu():
    result = CliRunner().invoke(app, ["sanitize"])
    assert result.exit_code == 2
    assert result.output.startswith("error: needs ")


def test_a_wrong_kernel_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "device_problem", lambda: None)
    right = np.ones(3, np.float32)
    values = {"right": {"xla": right, "mosaic_gpu": right}}
    values["wrong"] = {"xla": right, "mosaic_gpu": 2 * right}
    monkeypatch.setattr(sanitize, "cases", lambda: [(k, v.get) for k, v in values.items()])
    assert sanitize.run() == 1
    assert capsys.readouterr().out == "right: error 0.0e+00\nwrong: error 1.0e+00\n"


@pytest.mark.gpu
def test_cases_on_gpu():
    assert implementation.device_problem() is None
    for name, case in sanitize.cases():
        got, want = (np.asarray(case(x), np.float32) for x in ("mosaic_gpu", "xla"))
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error <= sanitize.MAX_ERROR, name
