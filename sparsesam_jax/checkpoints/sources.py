"""Finds and opens checkpoints: one interface over safetensors files, PyTorch's, and folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparsesam_jax.checkpoints import native
from sparsesam_jax.checkpoints.errors import ConversionError, few, one_line
from sparsesam_jax.checkpoints.native import TensorSpec
from sparsesam_jax.checkpoints.wrapping import Entry

EMBEDDED_WEIGHTS = ("vit_t",)
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
MODEL_NAME = "model.safetensors"

# What is taken of a folder: the first of these that is there. A variant such as fp16 has a name
# between.
_CHOICES = (
    (MODEL_NAME,),
    (INDEX_NAME,),
    ("model.safetensors.index.*.json",),
    ("model.*.safetensors",),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json",),
    ("pytorch_model.bin.index.*.json",),
    ("pytorch_model.*.bin",),
    ("*.safetensors", "*.pth", "*.pt", "*.bin"),
)


class Source(Protocol):
    """A checkpoint that is open for reading, tensor by tensor."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Name -> shape and dtype."""
        ...

    @property
    def entries(self) -> Mapping[Entry, Sequence[str]]:
        """Entry of the file -> names of the tensors in it. A safetensors file has one entry."""
        ...

    @property
    def beside(self) -> Sequence[Entry]:
        """The keys that lead to what is no tensor: numbers, texts."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The text that the file carries beside its tensors."""
        ...

    @property
    def problems(self) -> Mapping[str, list[str]]:
        """What the container itself has wrong: kind -> the tensors concerned."""
        ...

    def load(self, name: str) -> np.ndarray:
        """The values of one tensor."""
        ...


class SafetensorsSource:
    """One safetensors file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.metadata, self.tensors = native.inspect(path)
        self.entries: dict[Entry, list[str]] = {(): [*self.tensors]}
        self.beside: list[Entry] = []
        self.problems: dict[str, list[str]] = {}

    def load(self, name: str) -> np.ndarray:
        """The values of one tensor."""
        return native.load_tensor(self._path, name)


class ShardsSource:
    """The files that an index names, as one checkpoint."""

    def __init__(self, index: Mapping[str, str], shards: Mapping[str, Source]) -> None:
        self.tensors: dict[str, TensorSpec] = {}
        self.entries: dict[Entry, list[str]] = {}
        self.metadata: dict[str, str] = {}
        self.beside = [path for shard in shards.values() for path in shard.beside]
        self._shard_of: dict[str, Source] = {}
        file_of: dict[str, str] = {}
        duplicates = []
        self.problems: dict[str, list[str]] = {"in several shards": duplicates}
        for file, shard in shards.items():
            duplicates += [name for name in shard.tensors if name in self.tensors]
            for entry, names in shard.entries.items():
                self.entries.setdefault(entry, []).extend(n for n in names if n not in file_of)
            self.tensors |= shard.tensors
            self._shard_of |= dict.fromkeys(shard.tensors, shard)
            file_of |= dict.fromkeys(shard.tensors, file)
            for kind, names in shard.problems.items():
                self.problems.setdefault(kind, []).extend(names)
        strayed = [name for name, file in index.items() if file_of.get(name) != file]
        self.problems["not in their shard"] = strayed

    def load(self, name: str) -> np.ndarray:
        """The values of one tensor."""
        return self._shard_of[name].load(name)


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a name or a path means. Imports no JAX, to be called before all work.

    Raises:
        ValueError: It is neither the name of embedded weights nor a file or folder that exists.
    """
    if name_or_path in EMBEDDED_WEIGHTS:
        return Path(str(files("sparsesam_jax") / "weights" / f"{name_or_path}.safetensors"))
    path = Path(name_or_path)
    if not path.exists():
        raise ValueError(
            f"weights must be the name of embedded ones ({', '.join(EMBEDDED_WEIGHTS)}) or a "
            f"checkpoint (.safetensors, .pth, folder of Hugging Face) that exists, "
            f"got {os.fspath(name_or_path)!r}"
        )
    return path


def size_in_bytes(path: Path) -> int:
    """Bytes of a checkpoint's file, or of all files in its folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def open_source(path: Path) -> tuple[Source, Path | None]:
    """Open a checkpoint file, a Hugging Face folder or an index of shards.

    The content decides what it is, not the name.

    Returns:
        The source, and the config.json beside it where there is one.

    Raises:
        ConversionError: It is absent, no checkpoint, or a broken one.
        OSError: It cannot be read.
    """
    if path.is_dir():
        path = _file_in(path)
    source = _open_shards(path) if path.suffix == ".json" else _open_file(path)
    # Beside a file of another name, a config.json may well be something else's.
    config = path.parent / CONFIG_NAME
    is_huggingface = path.name.startswith(("model.", "pytorch_model."))
    return source, config if is_huggingface and config.is_file() else None


def _open_file(path: Path) -> Source:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise ConversionError(f"{path} does not exist") from error
    if not start:
        raise ConversionError(f"{path} is empty")
    # safetensors: 8 bytes of length, then a JSON object. PyTorch: a zip, or a pickle (before 1.6).
    if start[8:] == b"{":
        return SafetensorsSource(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        from sparsesam_jax.checkpoints.torch_checkpoint import TorchSource

        return TorchSource(path)
    raise ConversionError(f"{path} is neither a PyTorch checkpoint nor a safetensors file")


def _file_in(folder: Path) -> Path:
    for patterns in _CHOICES:
        found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        if len(found) > 1:
            names = few(path.name for path in found)
            raise ConversionError(f"{folder} has several checkpoints ({names}): name one of them")
        if found:
            return found[0]
    raise ConversionError(
        f"{folder} has no checkpoint: {MODEL_NAME}, pytorch_model.bin or another file of its kind"
    )


def _open_shards(path: Path) -> Source:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ConversionError(f"{path} must have a weight_map from tensors to files, got {index!r}")
    for file in index.values():
        # A path in an index could otherwise have any file of the machine read.
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ConversionError(f"{path} must name files of its own folder, got {file!r}")
    shards = sorted(set(index.values()))
    absent = [file for file in shards if not (path.parent / file).is_file()]
    if absent:
        raise ConversionError(f"{path} names files that are not there: {few(absent)}")
    return ShardsSource(index, {file: _open_file(path.parent / file) for file in shards})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConversionError: There is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} does not exist") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content
