"""The names of Meta's package `segment_anything`, over this project's model and predictor.

`from sparsesam_jax.segment_anything import SamPredictor, sam_model_registry` in place of
`from segment_anything import ...` is all that a client changes. Where Meta's package takes and
returns tensors of PyTorch, this does, on the device that `Sam.to` names; the model itself computes
where JAX does. Registry entries take Meta's `.pth`, and keywords for sparsity and dtype.
"""

from sparsesam_jax.segment_anything.automatic_mask_generator import SamAutomaticMaskGenerator
from sparsesam_jax.segment_anything.build_sam import (
    build_sam,
    build_sam_vit_b,
    build_sam_vit_h,
    build_sam_vit_l,
    build_sam_vit_t,
    sam_model_registry,
)
from sparsesam_jax.segment_anything.predictor import SamPredictor

__all__ = [
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "build_sam",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "build_sam_vit_t",
    "sam_model_registry",
]
