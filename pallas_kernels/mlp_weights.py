"""The arrays of one MLP block."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float


class MLPWeights(NamedTuple):
    """LayerNorm and the two linear layers of an MLP, kernels as (in, out).

    Scales of quantised kernels, one an output channel, will be two more fields that are None by
    default: they are arrays of the block like its biases, and reach the products' epilogues with
    these.

    Attributes:
        norm_scale: LayerNorm's scale.
        norm_bias: LayerNorm's bias.
        kernel1: First linear layer.
        bias1: Its bias.
        kernel2: Second linear layer.
        bias2: Its bias.
    """

    norm_scale: Float[Array, " d"]
    norm_bias: Float[Array, " d"]
    kernel1: Float[Array, "d h"]
    bias1: Float[Array, " h"]
    kernel2: Float[Array, "h d"]
    bias2: Float[Array, " d"]
