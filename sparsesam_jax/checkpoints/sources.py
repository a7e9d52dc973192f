"""Opens a checkpoint, whatever holds it: one interface over safetensors files and PyTorch's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparsesam_jax.checkpoints import native
from sparsesam_jax.checkpoints.errors import ConversionError, one_line
from sparsesam_jax.checkpoints.native import TensorSpec

INDEX_NAME = "model.safetensors.index.json"
MODEL_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


class Source(Protocol):
    """A checkpoint that is open for reading, tensor by tensor."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Name -> shape and dtype."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The text that the file carries beside its tensors."""
        ...

    @property
    def huggingface_config(self) -> Mapping[str, Any] | None:
        """The config.json in the same folder, where a folder was opened."""
        ...

    @property
    def problems(self) -> Mapping[str, list[str]]:
        """What the container itself has wrong: kind -> the tensors concerned."""
        ...

    def load(self, name: str) -> np.ndarray:
        """The values of one tensor."""
        ...


class SafetensorsSource:
    """One safetensors file, or the shards of one checkpoint."""

    def __init__(
        self,
        files: list[Path],
        huggingface_config: dict[str, Any] | None = None,
        index: dict[str, str] | None = None,
    ) -> None:
        self.tensors: dict[str, TensorSpec] = {}
        self.metadata: dict[str, str] = {}
        self.huggingface_config = huggingface_config
        self._file_of: dict[str, Path] = {}
        duplicates = []
        for file in files:
            self.metadata, tensors = native.inspect(file)
            duplicates += [name for name in tensors if name in self.tensors]
            self.tensors |= tensors
            self._file_of |= dict.fromkeys(tensors, file)
        strayed = [
            name
            for name, file in (index or {}).items()
            if name not in self._file_of or self._file_of[name].name != file
        ]
        self.problems = {"in several shards": duplicates, "not in their shard": strayed}

    def load(self, name: str) -> np.ndarray:
        """The values of one tensor."""
        return native.load_tensor(self._file_of[name], name)


def open_source(path: Path) -> Source:
    """Open a checkpoint file or a Hugging Face folder.

    The content decides what it is, not the name.

    Raises:
        ConversionError: It is no checkpoint, or a broken one.
        OSError: It cannot be read.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise ConversionError(f"{path} is empty")
    # safetensors: 8 bytes of length, then a JSON object. PyTorch: a zip, or a pickle (before 1.6).
    if start[8:] == b"{":
        return SafetensorsSource([path])
    if start.startswith((b"PK\x03\x04", b"\x80")):
        from sparsesam_jax.checkpoints.torch_checkpoint import TorchSource

        return TorchSource(path)
    raise ConversionError(f"{path} is neither a PyTorch checkpoint nor a safetensors file")


def _open_folder(folder: Path) -> Source:
    if (folder / MODEL_NAME).is_file():
        return SafetensorsSource([folder / MODEL_NAME], _read_config(folder))
    if (folder / INDEX_NAME).is_file():
        return _open_shards(folder / INDEX_NAME)
    raise ConversionError(f"{folder} has neither {MODEL_NAME} nor {INDEX_NAME}")


def _open_shards(path: Path) -> Source:
    index = _read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ConversionError(f"{path} must have a weight_map from tensors to files, got {index!r}")
    for file in index.values():
        # A path in an index could otherwise have any file of the machine read.
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ConversionError(f"{path} must name files of its own folder, got {file!r}")
    files = [path.parent / file for file in sorted(set(index.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ConversionError(f"{path} names files that are not there: {', '.join(absent)}")
    return SafetensorsSource(files, _read_config(path.parent), index)


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG_NAME
    return _read_json(path) if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content
