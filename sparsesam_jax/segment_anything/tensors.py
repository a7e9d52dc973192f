"""Between PyTorch's tensors and numpy's arrays; PyTorch is imported only here, and when needed."""

from __future__ import annotations

from typing import Any

import numpy as np


def tensor(array: Any, device: str) -> Any:
    """A tensor of one's own, on a device."""
    import torch

    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return tensor(array.astype(np.float32), device).bfloat16()
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def array(value: Any) -> np.ndarray:
    """A tensor of any device, or what already is an array, on the host."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
