"""Weights files: safetensors with one tensor per parameter and the configuration in the metadata.

A tensor is named by its parameter's path in the model, joined by dots, and lies in JAX layout. The
metadata has `format` ("sparsesam_jax"), `config` (the JSON of a `SamConfig`) and, where it has one,
the model's `name`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors relies on)
import numpy as np
import safetensors

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.checkpoints.errors import few, list_problems, one_line
from sparsesam_jax.config import SamConfig

if TYPE_CHECKING:
    import jax

FORMAT = "sparsesam_jax"
# Where files of other formats have the model's configuration beside their tensors, if they were
# written here: tensors do not tell all of it, such as the decoder's number of heads.
CONFIG_KEY = "sparsesam_jax.config"
DTYPES = ("float32", "float16", "bfloat16")

# Other codes (integers, float8) stay as safetensors writes them: they only appear in errors.
_DTYPE_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPE_NAMES = {code: name for name, code in _DTYPE_CODES.items()}


class TensorSpec(NamedTuple):
    """What a file says about a tensor: its shape and the name of its dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def parameter_shapes(config: SamConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of all parameters of a model, without allocating them.

    Args:
        config: Shape of the model.

    Returns:
        Name (path joined by dots) -> shape and dtype, in the model's order.

    Raises:
        ValueError: No model can have this configuration.
    """
    return dict(_parameter_shapes(config))


@functools.lru_cache(maxsize=16)
def _parameter_shapes(config: SamConfig) -> tuple[tuple[str, jax.ShapeDtypeStruct], ...]:
    # Imported here, where a checkpoint is found to be one: a broken file is said at once.
    import jax
    from flax import nnx

    from sparsesam_jax.model.sam import SamModel

    model = SamModel.abstract(config)
    return tuple(
        (".".join(map(str, path)), jax.ShapeDtypeStruct(variable.shape, variable.dtype))
        for path, variable in nnx.to_flat_state(nnx.state(model))
    )


def read(path: str | os.PathLike[str]) -> tuple[SamConfig, dict[str, np.ndarray]]:
    """Read a weights file; needs no PyTorch.

    Args:
        path: The file.

    Returns:
        The configuration and the arrays by parameter name, in the file's dtypes. Whether they are
        the model's is for the caller to check (`mismatches`).

    Raises:
        ValueError: The file is no safetensors file, or has no configuration in its metadata.
        OSError: The file cannot be read.
    """
    metadata, tensors = inspect(path)
    config = config_of(path, metadata)
    wrong = [f"{name}: {spec.dtype}" for name, spec in tensors.items() if spec.dtype not in DTYPES]
    if wrong:
        raise ValueError(f"{path} must have tensors of {', '.join(DTYPES)}, got {few(wrong)}")
    return config, {name: load_tensor(path, name) for name in tensors}


def write(
    path: str | os.PathLike[str],
    config: SamConfig,
    arrays: Mapping[str, jax.Array | np.ndarray],
    name: str | None = None,
) -> None:
    """Write a weights file whole or not at all.

    Args:
        path: The file; one that exists is replaced.
        config: Shape of the model.
        arrays: Its parameters by name: float32, float16 or bfloat16.
        name: What the model is called, if anything.

    Raises:
        ValueError: The arrays are not the parameters of such a model. Nothing is written.
    """
    tensors = {key: TensorSpec(tuple(a.shape), a.dtype.name) for key, a in arrays.items()}
    expected = {key: spec.shape for key, spec in parameter_shapes(config).items()}
    problems = mismatches(expected, tensors)
    if problems:
        raise ValueError(f"arrays must be the parameters of config, got {'; '.join(problems)}")
    write_safetensors(
        path, native_metadata(config, name), tensors, lambda key: np.asarray(arrays[key])
    )


def native_metadata(config: SamConfig, name: str | None = None) -> dict[str, str]:
    """The metadata of a weights file."""
    metadata = {"format": FORMAT, "config": config.to_json()}
    return metadata if name is None else metadata | {"name": name}


def config_of(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> SamConfig:
    """The configuration in a weights file's metadata.

    Raises:
        ValueError: There is none.
    """
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise ValueError(
            f"{path} must have format '{FORMAT}' and a config in its metadata, "
            f"got {dict(metadata)}; checkpoints of other formats need to be converted first"
        )
    return SamConfig.from_json(metadata["config"])


def mismatches(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, TensorSpec],
    dtypes: Sequence[str] = DTYPES,
) -> list[str]:
    """Everything that keeps a file's tensors from being the expected ones.

    Args:
        expected: Name -> shape.
        found: Name -> shape and dtype, as a file has them.
        dtypes: The dtypes that will do.

    Returns:
        One text for each kind of problem: how many tensors, and the first few; empty if all fit.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    common = [(name, spec) for name, spec in found.items() if name in expected]
    return list_problems(
        {
            "missing": missing,
            "unknown": unknown,
            "wrongly shaped": [
                f"{name}: expected {expected[name]}, got {spec.shape}"
                for name, spec in common
                if spec.shape != expected[name]
            ],
            f"of another dtype than {', '.join(dtypes)}": [
                f"{name}: {spec.dtype}" for name, spec in common if spec.dtype not in dtypes
            ],
        }
    )


def inspect(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    """Metadata and tensors of any safetensors file, without reading the values.

    Raises:
        ValueError: It is no safetensors file, or a broken one.
        OSError: The file cannot be read.
    """
    with _opened(path) as file:
        tensors = {}
        for name in file.keys():  # noqa: SIM118  (the handle is no mapping)
            piece = file.get_slice(name)
            code = str(piece.get_dtype())
            tensors[name] = TensorSpec(tuple(piece.get_shape()), _DTYPE_NAMES.get(code, code))
        return dict(file.metadata() or {}), tensors


def load_tensor(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """The values of one tensor of a safetensors file.

    The file is opened for this tensor alone: safetensors maps the file into memory, and pages once
    read stay resident as long as the mapping does, so that one mapping for all tensors would have
    the whole file in memory beside the arrays.
    """
    with _opened(path) as file:
        return file.get_tensor(name)


def write_safetensors(
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
    load: Callable[[str], np.ndarray],
) -> None:
    """Write a safetensors file with one tensor in memory at a time, whole or not at all.

    Written here because the library's writer wants all tensors in memory at once. The format: the
    header's length (8 bytes, little endian), the header (JSON, padded with blanks to 8 bytes), the
    values without gaps.

    Args:
        path: The file; one that exists is replaced.
        metadata: Text by name.
        tensors: Shape and dtype by name.
        load: Returns the named tensor's array.
    """
    # Widest dtype first, as the library does: every tensor then lies aligned to its item size.
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        spec = tensors[name]
        header[name] = {
            "dtype": _DTYPE_CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            array = np.ascontiguousarray(load(name))
            if TensorSpec(array.shape, array.dtype.name) != tensors[name]:
                raise ValueError(
                    f"{name} must be {tensors[name]}, got {array.shape} {array.dtype.name}"
                )
            file.write(array.reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[safetensors.safe_open]:
    # Opened once by hand because the library's own errors leave out the path.
    with open(path, "rb"):
        pass
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no intact safetensors file: {one_line(error)}") from error
