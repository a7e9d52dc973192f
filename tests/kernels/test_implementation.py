"""The rule for `implementation`, and what it says where a kernel cannot run."""

import jax
import pytest

from pallas_kernels import implementation, tuning
from pallas_kernels.implementation import resolve


def test_auto_is_the_kernel_where_it_runs(monkeypatch):
    problems = ["q must be small, got a large one"]
    monkeypatch.setattr(implementation, "device_problem", lambda: None)
    assert resolve("auto", function="f") == "mosaic_gpu"
    assert resolve("auto", function="f", problems=problems) == "xla"
    assert resolve("xla", function="f") == "xla"
    monkeypatch.setattr(implementation, "device_problem", lambda: "needs a GPU")
    assert resolve("auto", function="f") == "xla"


def test_mosaic_gpu_where_nothing_is_in_the_way(monkeypatch):
    monkeypatch.setattr(implementation, "device_problem", lambda: None)
    assert resolve("mosaic_gpu", function="f") == "mosaic_gpu"
    with pytest.raises(ValueError, match=r"unsupported for f: q must be small, got a large one"):
        resolve("mosaic_gpu", function="f", problems=["q must be small, got a large one"])


def test_this_machine_is_named():
    if jax.default_backend() != "cpu":
        pytest.skip("says what a CPU lacks")
    with pytest.raises(ValueError, match=r"needs (jax >= 0.11|a GPU of compute capability 9.x)"):
        resolve("mosaic_gpu", function="f")


def test_unknown():
    with pytest.raises(ValueError, match="implementation must be one of auto, xla, mosaic_gpu"):
        resolve("triton", function="f")  # pyright: ignore[reportArgumentType]


def test_tilings_go_by_device_and_others_take_the_measured_ones(monkeypatch):
    kind = jax.devices()[0].device_kind
    monkeypatch.setattr(tuning, "BY_DEVICE", {"NVIDIA H200": tuning.H200})
    assert tuning.tuned() is tuning.H200
    own = tuning.H200._replace(windows=tuning.H200.windows[1:])
    monkeypatch.setitem(tuning.BY_DEVICE, kind, own)
    assert tuning.tuned() is own
