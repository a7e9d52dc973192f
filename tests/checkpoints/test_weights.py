"""Weights files: what is written is read back, and what is no weights file is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import checkpoint_files
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import TINY

from sparsesam_jax.checkpoints import native
from sparsesam_jax.config import PRESETS, SamConfig


def random_arrays(config: SamConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(spec.shape).astype(dtype)
        for name, spec in native.parameter_shapes(config).items()
    }


@pytest.mark.parametrize("hq", [False, True])
@pytest.mark.parametrize("config", [TINY, PRESETS["vit_t"]], ids=["tiny", "vit_t"])
def test_parameters_are_those_of_metas_state_dict(config: SamConfig, hq: bool):
    config = dataclasses.replace(config, hq=hq)
    expected = {}
    for key, shape in checkpoint_files.meta_shapes(config).items():
        name, axes = checkpoint_files.native_of(key, shape)
        expected[name] = tuple(shape[axis] for axis in axes)
    found = {name: spec.shape for name, spec in native.parameter_shapes(config).items()}
    assert found == expected


def test_parameter_counts_of_vit_b():
    shapes = native.parameter_shapes(PRESETS["vit_b"])
    assert len(shapes) == 314
    assert round(sum(np.prod(spec.shape) for spec in shapes.values()) / 1e6, 1) == 93.7
    hq = native.parameter_shapes(dataclasses.replace(PRESETS["vit_b"], hq=True))
    assert len(hq) == 314 + 25


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_reads_back_what_it_wrote(tmp_path: Path, dtype: str):
    path, arrays = tmp_path / "w.safetensors", random_arrays(TINY, dtype)
    native.write(path, TINY, arrays, name="tiny")
    config, read = native.read(path)
    assert config == TINY
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(read[name], array)
    assert native.inspect(path)[0] == {
        "format": "sparsesam_jax",
        "config": TINY.to_json(),
        "name": "tiny",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_safetensors_library_reads_mixed_dtypes_each_aligned(tmp_path: Path):
    path, arrays = tmp_path / "w.safetensors", random_arrays(TINY)
    arrays = {
        name: array.astype(native.DTYPES[index % 3])
        for index, (name, array) in enumerate(arrays.items())
    }
    native.write(path, TINY, arrays)
    read = safetensors.numpy.load_file(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    header = json.loads(content[8 : 8 + size])
    assert all(
        header[name]["data_offsets"][0] % array.itemsize == 0 for name, array in arrays.items()
    )


def test_writes_jax_arrays(tmp_path: Path):
    arrays = {name: jnp.asarray(array) for name, array in random_arrays(TINY, "bfloat16").items()}
    native.write(tmp_path / "w.safetensors", TINY, arrays)
    _, read = native.read(tmp_path / "w.safetensors")
    assert all(array.dtype == ml_dtypes.bfloat16 for array in read.values())


def test_write_lists_all_problems_and_leaves_the_old_file(tmp_path: Path):
    path, arrays = tmp_path / "w.safetensors", random_arrays(TINY)
    path.write_bytes(b"old")
    del arrays["image_encoder.pos_embed"]
    arrays["extra.kernel"] = np.zeros(3, np.float32)
    arrays["image_encoder.neck.1.scale"] = np.zeros((1, 16), np.float32)
    arrays["image_encoder.neck.1.bias"] = np.zeros(16, np.int32)
    with pytest.raises(ValueError, match=r"^arrays must be the parameters of config") as error:
        native.write(path, TINY, arrays)
    message = str(error.value)
    for text in (
        "1 missing (image_encoder.pos_embed)",
        "1 unknown (extra.kernel)",
        "1 wrongly shaped (image_encoder.neck.1.scale: expected (16,), got (1, 16))",
        "(image_encoder.neck.1.bias: int32)",
    ):
        assert text in message
    assert "\n" not in message
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path):
    specs = {name: native.TensorSpec((4,), "float32") for name in "ab"}

    def load(name: str) -> np.ndarray:
        return np.zeros(4 if name == "a" else 5, np.float32)

    with pytest.raises(ValueError, match="b must be"):
        native.write_safetensors(tmp_path / "w.safetensors", {}, specs, load)
    assert not list(tmp_path.iterdir())


def broken_files(folder: Path) -> dict[str, Path]:
    good = folder / "good.safetensors"
    native.write(good, TINY, random_arrays(TINY))
    content = good.read_bytes()
    files = {
        "empty": b"",
        "text": b"no weights\n" * 9,
        "short": content[:5],
        "cut header": content[:1000],
        "cut values": content[:-1],
        "longer": content + b"\0",
        "damaged header": content[:8] + b"{{" + content[10:],
        "huge header": b"\xff" * 8 + content[8:],
        "damaged config": content.replace(b'\\"depth\\"', b'\\"depht\\"', 1),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, folder / "foreign")
    metadata = native.native_metadata(TINY)
    integers = {"a": np.zeros(3, np.int32)}
    safetensors.numpy.save_file(integers, folder / "integers", metadata)
    return {name: folder / name for name in (*files, "foreign", "integers")}


def test_what_is_no_weights_file_gives_one_line(tmp_path: Path):
    for name, path in broken_files(tmp_path).items():
        with pytest.raises(ValueError) as error:
            native.read(path)
        assert "\n" not in str(error.value), name
    with pytest.raises(FileNotFoundError):
        native.read(tmp_path / "absent")


def test_reading_needs_no_torch(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    native.write(path, TINY, random_arrays(TINY, "bfloat16"))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from sparsesam_jax.checkpoints import native\n"
        "config, arrays = native.read(sys.argv[1])\n"
        "print(len(arrays), arrays['image_encoder.pos_embed'].dtype)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == [str(len(random_arrays(TINY))), "bfloat16"], run.stderr
