"""SAM (Segment Anything) in Flax NNX, with SparseSAM's block-sparse attention and routed MLP.

The letters that shapes use are those of `pallas_kernels`; here also P prompts of an image, T points
of a prompt, K masks of a prompt, C feature channels.
"""

from sparsesam_jax.config import PRESETS, ImageEncoderConfig, SamConfig, Sparsity
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
