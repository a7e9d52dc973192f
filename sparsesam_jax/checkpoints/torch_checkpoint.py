"""Reads and writes PyTorch checkpoint files without running what a pickle may contain."""

from __future__ import annotations

import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.checkpoints.errors import ConversionError
from sparsesam_jax.checkpoints.native import TensorSpec
from sparsesam_jax.checkpoints.wrapping import Entry

if TYPE_CHECKING:
    import torch

# The pages of a mapped file stay in memory once read, so that it is mapped anew from time to time.
_REMAP_BYTES = 64 * 2**20


class TorchSource:
    """The tensors in a PyTorch checkpoint file, mapped into memory instead of read whole.

    Dicts may be nested: a tensor's name has the keys that lead to it, joined by dots.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        _check_archive(path)
        self._content = _load(path)
        self._loaded_bytes = 0
        self._keys: dict[str, Entry] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self.entries: dict[Entry, list[str]] = {}
        self.beside: list[Entry] = []
        self.metadata = _metadata(self._content)
        duplicates, partial = [], []
        self.problems = {"named twice": duplicates, "without all their values": partial}
        torch = _import_torch()
        if not isinstance(self._content, dict):
            raise ConversionError(f"{path} holds no state dict")
        for entry, key, value in _leaves(self._content):
            name = ".".join(map(str, (*entry, key)))
            if not isinstance(value, torch.Tensor):
                self.beside.append((*map(str, entry), str(key)))
            elif name in self.tensors:
                duplicates.append(name)
            else:
                self._keys[name] = (*entry, key)
                self.tensors[name] = _spec(value)
                self.entries.setdefault(tuple(map(str, entry)), []).append(name)
                if not _is_whole(value):
                    partial.append(name)

    def load(self, name: str) -> np.ndarray:
        """The values of one tensor; a view of the mapped file where it can be one."""
        self._loaded_bytes += self.tensors[name].nbytes
        if self._loaded_bytes > _REMAP_BYTES:
            self._loaded_bytes = 0
            self._content = _load(self._path)
        value = self._content
        for key in self._keys[name]:
            value = value[key]
        return _to_numpy(value)


def write(
    path: Path,
    metadata: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
    load: Callable[[str], np.ndarray],
) -> None:
    """Write a state dict as a PyTorch checkpoint file, whole or not at all.

    Unlike safetensors this holds all tensors at once: `torch.save` takes nothing less.

    Args:
        path: The file; one that exists is replaced.
        metadata: Text that goes where `torch.nn.Module.state_dict` has its modules' versions, which
            `load_state_dict` looks up and otherwise ignores.
        tensors: Shape and dtype by name.
        load: Returns the named tensor's array.
    """
    torch = _import_torch()
    state = OrderedDict((name, _to_torch(load(name))) for name in tensors)
    vars(state)["_metadata"] = OrderedDict({"": {"version": 1, **metadata}})
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConversionError("PyTorch's checkpoints need PyTorch: pip install torch") from error
    return torch


def _check_archive(path: Path) -> None:
    """Compare the archive's checksums, which `torch.load` does not look at."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                # PyTorch writes 0 where it was told to compute no checksum.
                if record.CRC:
                    with archive.open(record) as content:
                        while content.read(2**20):
                            pass
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError, EOFError) as error:
        raise ConversionError(f"{path} is corrupt: {error}") from error


def _metadata(content: Any) -> dict[str, str]:
    """The text that `write` has put beside the tensors, and nothing else that may be there."""
    modules = getattr(content, "_metadata", None)
    whole = modules.get("") if isinstance(modules, dict) else None
    items = whole.items() if isinstance(whole, dict) else ()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, str)}


def _leaves(content: dict[Any, Any]) -> Iterator[tuple[Entry, Any, Any]]:
    """Keys of the dict, key in it and value of all that is no dict, the outermost dict first.

    Each dict is looked into once, as a pickle can make one contain itself.
    """
    seen = {id(content)}
    waiting: deque[tuple[Entry, dict[Any, Any]]] = deque([((), content)])
    while waiting:
        entry, dictionary = waiting.popleft()
        for key, value in dictionary.items():
            if not isinstance(value, dict):
                yield entry, key, value
            elif id(value) not in seen:
                seen.add(id(value))
                waiting.append(((*entry, key), value))


def _load(path: Path) -> Any:
    torch = _import_torch()
    try:
        # What it warns of (pickle protocols, old storages) either loads or is an error below.
        with warnings.catch_warnings(action="ignore"):
            return torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
                mmap=zipfile.is_zipfile(path),
            )
    except OSError:
        raise
    # A broken file can make the unpickler raise anything, and its messages fill pages.
    except Exception as error:
        raise ConversionError(
            f"{path} is no intact PyTorch checkpoint, or has more in it than tensors "
            f"({type(error).__name__}); save the model's state dict alone"
        ) from error


def _is_whole(value: torch.Tensor) -> bool:
    """Whether every value of a tensor is in the file: not sparse, not meta, not expanded.

    A few bytes can pose as a tensor of any size by strides of 0.
    """
    torch = _import_torch()
    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _spec(value: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(value.shape), str(value.dtype).removeprefix("torch."))


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    torch = _import_torch()
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(array: np.ndarray) -> torch.Tensor:
    torch = _import_torch()
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
