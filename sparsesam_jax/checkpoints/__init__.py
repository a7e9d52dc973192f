"""Checkpoints: this project's format, Meta's, SAM-HQ's and Hugging Face's, and the way between."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from sparsesam_jax.checkpoints.conversion import Dtype, convert_checkpoint
    from sparsesam_jax.checkpoints.errors import ConversionError
    from sparsesam_jax.checkpoints.formats import Format

__all__ = ["ConversionError", "Dtype", "Format", "convert_checkpoint"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conversion": ["Dtype", "convert_checkpoint"],
        "errors": ["ConversionError"],
        "formats": ["Format"],
    },
)
