"""The attention benchmarks' table, with a toy function in place of a kernel."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import jax.numpy as jnp
import pytest

from benchmarks import gpu_table
from benchmarks.gpu_table import Programs, Task, changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    size: int = 4

    def __str__(self) -> str:
        return f"size {self.size}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    fits: bool = True
    dies: bool = False


def plan(case: Case, config: Config | None) -> Programs:
    if config and not config.fits:
        raise ValueError("does not fit")
    if config and config.dies:
        os._exit(3)
    return Programs(
        whole=lambda x: 2 * (x + 1),
        prepare=lambda x: (x + 1, 2.0),
        kernel=lambda operands: operands[0] * operands[1],
        arrays=jnp.arange(case.size, dtype=jnp.float32),
        error=lambda out: gpu_table.frobenius_error(out, 2.0 * jnp.arange(1, case.size + 1)),
        flops=float(case.size),
    )


def table(monkeypatch, tmp_path, *arguments: str) -> list[dict]:
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["table", "--out", str(out), *arguments])
    configs = [Config(), Config(fits=False), Config(dies=True)]
    gpu_table.main("A toy.", plan, [Case(), Case(size=8)], configs)
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_measures_every_case(monkeypatch, tmp_path, capfd):
    records = table(monkeypatch, tmp_path)
    assert sorted(record["size"] for record in records) == [4, 8]
    for record in records:
        assert record["error"] == 0
        assert record["tflops"] == pytest.approx(record["size"] / record["kernel_ms"] / 1e9)
        assert {"ms", "spread_ms", "kernel_spread_ms", "device", "jax"} < set(record)
    lines = capfd.readouterr().out.splitlines()
    assert sorted(line.split(": ")[-1] for line in lines) == ["size 4", "size 8"]


def test_says_what_it_could_not_measure(monkeypatch, tmp_path, capfd):
    records = table(monkeypatch, tmp_path, "--configs", "--only", "8")
    assert [record["fits"] for record in records] == [True]
    out = capfd.readouterr().out
    assert "size 8 fits=False: failed: does not fit" in out
    assert "not all measured (exit 3): size 8 dies=True" in out


def test_stops_at_the_limit(monkeypatch, tmp_path, capfd):
    assert table(monkeypatch, tmp_path, "--limit", "0") == []
    assert capfd.readouterr().out.count("not all measured (stopped)") == 2


def test_lists_tasks(monkeypatch, tmp_path, capsys):
    assert table(monkeypatch, tmp_path, "--list", "--configs", "--only", "4") == []
    assert capsys.readouterr().out.splitlines() == [
        "size 4",
        "size 4 fits=False",
        "size 4 dies=True",
    ]


def test_names_what_is_no_default():
    assert str(Task(Case(size=5), Config(dies=True))) == "size 5 dies=True"
    assert changes(None) == changes(Config()) == ""
