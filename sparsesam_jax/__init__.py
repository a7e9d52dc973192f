"""SAM (Segment Anything) in Flax NNX, with SparseSAM's block-sparse attention and routed MLP.

The letters that shapes use are those of `pallas_kernels`; here also P prompts of an image, T points
of a prompt, K masks of a prompt, C feature channels.
"""

from typing import TYPE_CHECKING

import lazy_loader

from sparsesam_jax.config import PRESETS, ImageEncoderConfig, SamConfig, Sparsity

if TYPE_CHECKING:
    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.model.image_encoder import ImageEncoder
    from sparsesam_jax.model.sam import Prediction
    from sparsesam_jax.predict.automatic_masks import AutomaticMaskGenerator
    from sparsesam_jax.predict.embedding import Embedding
    from sparsesam_jax.predict.predictor import SamPredictor

__all__ = [
    "PRESETS",
    "AutomaticMaskGenerator",
    "Embedding",
    "ImageEncoder",
    "ImageEncoderConfig",
    "Prediction",
    "Sam",
    "SamConfig",
    "SamPredictor",
    "Sparsity",
]

# Imported when first asked for: jax and flax take seconds, and `sparsesam --help` needs neither.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoints.pretrained": ["Sam"],
        "model.image_encoder": ["ImageEncoder"],
        "model.sam": ["Prediction"],
        "predict.automatic_masks": ["AutomaticMaskGenerator"],
        "predict.embedding": ["Embedding"],
        "predict.predictor": ["SamPredictor"],
    },
)
