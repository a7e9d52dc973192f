"""Reads and writes PyTorch checkpoint files without running what a pickle may contain."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.checkpoints.errors import ConversionError
from sparsesam_jax.checkpoints.native import TensorSpec

if TYPE_CHECKING:
    import torch

# Keys under which training code wraps a state dict.
_WRAPPERS = ("model", "state_dict", "model_state_dict")
# DistributedDataParallel puts it before every name.
_PREFIX = "module."
# Constants of the preprocessing that some files carry along.
_IGNORED = ("pixel_mean", "pixel_std")
# The pages of a mapped file stay in memory once read, so that it is mapped anew from time to time.
_REMAP_BYTES = 64 * 2**20


class TorchSource:
    """A state dict in a PyTorch checkpoint file, mapped into memory instead of read whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _check_archive(path)
        self._state, duplicates = _state_dict(path)
        self._loaded_bytes = 0
        partial = [name for name, value in self._state.items() if not _is_whole(value)]
        if partial:
            raise ConversionError(f"{path} does not hold all values of {', '.join(partial)}")
        self.tensors = {name: _spec(value) for name, value in self._state.items()}
        self.metadata: dict[str, str] = {}
        self.huggingface_config = None
        self.problems = {"duplicate": duplicates}

    def load(self, name: str) -> np.ndarray:
        """The values of one tensor; a view of the mapped file where it can be one."""
        self._loaded_bytes += self.tensors[name].nbytes
        if self._loaded_bytes > _REMAP_BYTES:
            self._loaded_bytes = 0
            self._state, _ = _state_dict(self._path)
        return _to_numpy(self._state[name])


def write(path: Path, tensors: Mapping[str, TensorSpec], load: Callable[[str], np.ndarray]) -> None:
    """Write a state dict as a PyTorch checkpoint file, whole or not at all.

    Unlike safetensors this holds all tensors at once: `torch.save` takes nothing less.

    Args:
        path: The file; one that exists is replaced.
        tensors: Shape and dtype by name.
        load: Returns the named tensor's array.
    """
    torch = _import_torch()
    state = {name: _to_torch(load(name)) for name in tensors}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConversionError("a .pth file needs PyTorch: pip install torch") from error
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


def _state_dict(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The tensors by name without prefixes, and the names that occur twice then."""
    state = _load(path)
    # Bounded, as a pickle can make a dict contain itself.
    for _ in range(len(_WRAPPERS)):
        wrapped = [key for key in _WRAPPERS if _is_dict_at(state, key)]
        if len(wrapped) > 1:
            raise ConversionError(f"{path} has several state dicts: {', '.join(wrapped)}")
        if wrapped:
            state = state[wrapped[0]]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ConversionError(f"{path} holds no state dict")
    named: dict[str, Any] = {}
    duplicates = []
    for key, value in state.items():
        name = key
        while name.startswith(_PREFIX):
            name = name.removeprefix(_PREFIX)
        if name in named:
            duplicates.append(name)
        elif name not in _IGNORED:
            named[name] = value
    return named, duplicates


def _is_dict_at(state: Any, key: str) -> bool:
    return isinstance(state, dict) and isinstance(state.get(key), dict)


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


def _is_whole(value: Any) -> bool:
    """Whether every value of a tensor is in the file: not sparse, not meta, not expanded.

    A few bytes can pose as a tensor of any size by strides of 0.
    """
    torch = _import_torch()
    if not isinstance(value, torch.Tensor):
        return True
    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _spec(value: Any) -> TensorSpec:
    torch = _import_torch()
    if not isinstance(value, torch.Tensor):
        return TensorSpec((), type(value).__name__)
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
