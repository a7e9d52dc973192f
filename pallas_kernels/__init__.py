"""Attention and MLP of SAM's image encoder, dense and block-sparse, for JAX.

Letters used in shapes throughout the project:

    B  images of a batch        N  tokens of a sequence     H  attention heads
    D  width of a head          d  width of a token (H D)   S  side of an attention grid
    Gh, Gw  rows and columns of the token grid              w  side of an attention window
    W  windows of an image      G  groups of a sequence     M  routed tokens

Arrays are `B N H D` in attention and `B H W C` for images and features.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from pallas_kernels.block_layout import BlockLayout

__all__ = ["BlockLayout"]

# Imported when first asked for: the names of choices need no numpy.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__, submod_attrs={"block_layout": ["BlockLayout"]}
)
