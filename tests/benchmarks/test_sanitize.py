"""The program that compute-sanitizer runs: on a CPU its cases by XLA, and its refusal."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.suites import sanitize
from pallas_kernels import implementation


def test_cases_are_the_functions_that_they_name():
    labels = []
    for case in sanitize.cases():
        labels.append(str(case))
        assert 0 < sanitize.error(case, "xla") < sanitize.MAX_ERROR, labels[-1]
    assert len(set(labels)) == len(labels)
    unbiased = [str(case) for case in sanitize.cases(["no-bias"])]
    assert {label.split()[0] for label in unbiased} == {"stripe", "window"}
    assert set(unbiased) < set(labels)


def test_needs_a_gpu():
    result = CliRunner().invoke(app, ["sanitize"])
    assert result.exit_code == 2
    assert result.output.startswith("error: needs ")


def test_a_wrong_kernel_is_said(monkeypatch, capsys):
    monkeypatch.setattr(implementation, "device_problem", lambda: None)
    monkeypatch.setattr(sanitize, "cases", lambda only: ["right", "wrong"])
    monkeypatch.setattr(sanitize, "error", {"right": 0.0, "wrong": 1.0}.get)
    assert sanitize.sanitize() == 1
    assert capsys.readouterr().out == "right: error 0.0e+00\nwrong: error 1.0e+00\n"


@pytest.mark.gpu
def test_cases_on_gpu():
    assert implementation.device_problem() is None
    assert sanitize.sanitize() == 0
