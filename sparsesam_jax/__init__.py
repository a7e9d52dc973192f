"""SAM (Segment Anything) in Flax NNX, with SparseSAM's block-sparse attention and routed MLP.

The letters that shapes use are those of `pallas_kernels`; here also P prompts of an image, T points
of a prompt, K masks of a prompt, C feature channels.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparsesam_jax.config import PRESETS, ImageEncoderConfig, SamConfig, Sparsity

if TYPE_CHECKING:
    from sparsesam_jax.image_encoder import ImageEncoder
    from sparsesam_jax.predictor import SamPredictor
    from sparsesam_jax.sam import Prediction, Sam

__all__ = [
    "PRESETS",
    "ImageEncoder",
    "ImageEncoderConfig",
    "Prediction",
    "Sam",
    "SamConfig",
    "SamPredictor",
    "Sparsity",
]

# Imported when first asked for: jax and flax take seconds, and `sparsesam --help` needs neither.
_LAZY = {
    "ImageEncoder": "image_encoder",
    "Prediction": "sam",
    "Sam": "sam",
    "SamPredictor": "predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
