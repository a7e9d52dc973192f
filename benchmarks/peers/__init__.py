"""Who is measured: this project and PyTorch, on the same weights and inputs.

A peer is one entry of `peers.toml`. Its framework's modules build it: `jax_models` and
`torch_models` encoders and predictors, `jax_kernels` and `torch_kernels` single functions.
"""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MODELS = ("encoder", "predictor")


class Peer(NamedTuple):
    """One implementation.

    Attributes:
        package: Whose code it is: the record's `peer`.
        what: What runs, in words.
        dense: What it computes of `MODELS` and `kernel_cases.OPS`, by spaces.
        sparse: What it computes at densities below 1 too.
        attention: Of the PyTorch modules: eager, sdpa, flex or fast (`torch_sam.attend`).
        compiled: Mode of torch.compile; None compiles nothing.
        needs_gpu: Whether it is measured on a GPU only.
    """

    package: str
    what: str
    dense: str
    sparse: str = ""
    attention: str = "sdpa"
    compiled: str | None = None
    needs_gpu: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this project."""
        return self.package == "sparsesam_jax"


_FILE = Path(__file__).with_name("peers.toml").read_text(encoding="utf-8")
PEERS = {name: Peer(**entry) for name, entry in tomllib.loads(_FILE).items()}
OURS = tuple(name for name, peer in PEERS.items() if peer.ours)


def names(what: str, density: float = 1.0) -> tuple[str, ...]:
    """Who computes `what` at a density."""
    return tuple(
        name for name, p in PEERS.items() if what in (p.dense if density == 1 else p.sparse).split()
    )


def builder(name: str, what: str) -> Callable[..., Any]:
    """The function that builds a peer's encoder, predictor or kernel; imports its framework."""
    framework = "jax" if PEERS[name].ours else "torch"
    kind = "models" if what in MODELS else "kernels"
    return getattr(importlib.import_module(f"benchmarks.peers.{framework}_{kind}"), what)


class Predictor(NamedTuple):
    """What a peer builds to go from an image to its masks.

    Attributes:
        device: As a `Runnable` has it.
        whole: What `SamPredictor.predict` returns for points [P, T, 2], from the image on.
        parts: Calls of preprocess, encoder, decoder and upscale for such points; all wait. This
            project's encoder includes its preprocess.
        notes: What the record says even where nothing is timed.
    """

    device: Any
    whole: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    parts: Callable[[np.ndarray], dict[str, Callable[[], Any]]]
    notes: dict[str, Any]
