"""Who is measured: this project and PyTorch, on the same weights and inputs.

A peer is one entry of `PEERS`. Its framework's modules build it: `jax_models` and `torch_models`
encoders and predictors, `jax_kernels` and `torch_kernels` single functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
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


_ALL = "encoder predictor stripe window mlp"
_META, _SAM_MODEL = "Meta's modules", "SamModel of transformers"
PEERS = {
    "mosaic_gpu": Peer("sparsesam_jax", "this project, Mosaic GPU kernels", _ALL, _ALL),
    "xla": Peer("sparsesam_jax", "this project, XLA", _ALL, _ALL),
    "float8": Peer(
        "sparsesam_jax",
        "this project, Mosaic GPU kernels, the blocks' products in float8",
        dense="encoder",
        sparse="encoder",
    ),
    "float8-xla": Peer(
        "sparsesam_jax",
        "this project, XLA, the blocks' products in float8",
        dense="encoder",
        sparse="encoder",
    ),
    "eager": Peer(
        "torch",
        f"{_META}, all logits in memory, nothing compiled",
        "encoder stripe window mlp",
        "mlp",
        "eager",
    ),
    "sdpa": Peer(
        "torch",
        f"{_META}, SDPA with the bias in memory, nothing compiled",
        "encoder stripe window",
        "window",
    ),
    "compile": Peer(
        "torch",
        "sdpa under torch.compile",
        "encoder stripe window mlp",
        "window mlp",
        compiled="default",
        needs_gpu=True,
    ),
    "compile-max-autotune": Peer(
        *("torch", "sdpa under torch.compile(mode='max-autotune')", "encoder"),
        compiled="max-autotune",
        needs_gpu=True,
    ),
    "flex": Peer(
        "torch",
        "global blocks by FlexAttention with the rel-pos in its score_mod, windows by SDPA, under "
        "torch.compile",
        "encoder stripe",
        "encoder stripe",
        "flex",
        compiled="default",  # but on a CPU, for tests
    ),
    "segment-anything-fast": Peer(
        "torch",
        "segment-anything-fast's Triton kernel, where that package is installed",
        dense="stripe",
        attention="fast",
    ),
    "transformers": Peer(
        "transformers", f"{_SAM_MODEL} with SDPA, nothing compiled", "encoder predictor"
    ),
    "transformers-compile": Peer(
        "transformers",
        f"{_SAM_MODEL} with its encoder under torch.compile",
        dense="encoder predictor",
        compiled="default",
        needs_gpu=True,
    ),
    "transformers-eager": Peer(
        "transformers", f"{_SAM_MODEL}, eager attention", "encoder", attention="eager"
    ),
}
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
        whole: What `SamPredictor.predict` returns for points [P, T, 2], from the image on.
        parts: Calls of preprocess, encoder, decoder and upscale for such points; all wait. This
            project's encoder includes its preprocess.
        notes: What the record says even where nothing is timed.
        start_peak: Forgets the peak of memory until now, where the framework can.
        peak: The peak of memory since then, as the record has it.
    """

    whole: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    parts: Callable[[np.ndarray], dict[str, Callable[[], Any]]]
    notes: dict[str, Any]
    start_peak: Callable[[], None]
    peak: Callable[[], dict[str, Any]]
