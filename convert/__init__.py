"""Checkpoint conversion between Meta's, SAM-HQ's, Hugging Face's and this project's format."""

from convert.conversion import Dtype, convert_checkpoint
from convert.errors import ConversionError
from convert.formats import Format

__all__ = ["ConversionError", "Dtype", "Format", "convert_checkpoint"]
