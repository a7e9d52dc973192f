"""What the built wheel installs."""

from __future__ import annotations

import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder


def test_the_wheel_installs_two_packages_and_nothing_else(tmp_path: Path):
    root = Path(__file__).parents[1]
    (wheel,) = WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "pallas_kernels",
        "sparsesam_jax",
    }
    # `convert` would shadow the convert.py of whoever stands in a folder with one.
    for name in ("checkpoints/conversion.py", "py.typed", "weights/vit_t.safetensors"):
        assert f"sparsesam_jax/{name}" in names
