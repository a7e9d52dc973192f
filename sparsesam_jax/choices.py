"""What a user may choose by name. Imports no JAX, so that a command line can offer it at once.

The names of methods are the keys of `sparsesam_jax.methods.registry.METHODS`, likewise without JAX.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pallas_kernels.choices import Implementation

__all__ = [
    "Curve",
    "Dtype",
    "Features",
    "FigureKind",
    "Format",
    "Implementation",
    "Importance",
    "Layout",
    "Padding",
    "Preset",
    "Products",
    "PromptKind",
    "ProtocolName",
    "Ranking",
    "Split",
    "check_choice",
]

Dtype = Literal["float32", "bfloat16", "float16"]
Products = Literal["dtype", "float8"]  # of the encoder's blocks: in the compute dtype, or in e4m3
Format = Literal["native", "meta", "huggingface"]  # of a checkpoint

# The fields of `config.Sparsity`, which says what they mean.
Curve = Literal["morton", "hilbert", "raster", "random"]
Layout = Literal["interleave", "contiguous"]
Ranking = Literal["group", "block", "spread", "none"]
Importance = Literal["sobel", "dispersion", "uniform", "random"]
Features = Literal["keys", "input"]
Split = Literal["balanced", "equal"]
Padding = Literal["square", "crop"]  # of photos that are no squares
Preset = Literal["sparsesam", "released"]  # what a density alone stands for

# Evaluation: prompts that are taken from ground truth, protocols and the paper's figures.
PromptKind = Literal["box", "point", "points3", "box+point"]
ProtocolName = Literal["sam", "hq44k", "release"]
FigureKind = Literal["update-norms", "correlation", "attention", "orders", "extreme"]


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless `value`, the argument `name`, is one of a Literal's `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")
