"""The arrays of one MLP block."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from pallas_kernels.float8 import Float8Weight


class MLPWeights(NamedTuple):
    """LayerNorm and the two linear layers of an MLP, kernels as (in, out).

    A product of 8-bit floats is one whose kernel is: its other operand is quantised where it comes
    from, LayerNorm's rows with a scale each and GELU's output with `hidden_scale`.

    Attributes:
        norm_scale: LayerNorm's scale.
        norm_bias: LayerNorm's bias.
        kernel1: First linear layer.
        bias1: Its bias.
        kernel2: Second linear layer.
        bias2: Its bias.
        hidden_scale: Of GELU's output, with a `kernel2` in 8 bits only.
    """

    norm_scale: Float[Array, " d"]
    norm_bias: Float[Array, " d"]
    kernel1: Float[Array, "d h"] | Float8Weight
    bias1: Float[Array, " h"]
    kernel2: Float[Array, "h d"] | Float8Weight
    bias2: Float[Array, " d"]
    hidden_scale: Float[Array, ""] | None = None
