"""Checkpoints: this project's format, Meta's, SAM-HQ's and Hugging Face's, and the way between."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from sparsesam_jax.checkpoints.conversion import convert_checkpoint, write_checkpoint
    from sparsesam_jax.checkpoints.errors import ConversionError
    from sparsesam_jax.checkpoints.reading import Checkpoint, open_checkpoint
    from sparsesam_jax.checkpoints.sources import locate, size_in_bytes

__all__ = [
    "Checkpoint",
    "ConversionError",
    "convert_checkpoint",
    "locate",
    "open_checkpoint",
    "size_in_bytes",
    "write_checkpoint",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conversion": ["convert_checkpoint", "write_checkpoint"],
        "errors": ["ConversionError"],
        "reading": ["Checkpoint", "open_checkpoint"],
        "sources": ["locate", "size_in_bytes"],
    },
)
