"""Linear layers of the encoder's blocks in 8-bit floats: `products="float8"`.

Weights are e4m3 with a scale an output channel, made once of parameters of any dtype, which are not
kept. What comes in is quantised too: LayerNorm's output with a scale a row; attention's and GELU's
with one power of two a layer, which is known beforehand (`float8_scales`). Sums, biases, GELU,
softmax and the residual stream are those of an encoder without float8.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.choices import Implementation
from pallas_kernels.float8 import (
    Float8Rows,
    Float8Weight,
    dequantize,
    quantize_rows,
    quantize_static,
    quantize_weight,
)
from pallas_kernels.projection import projection

# The layers that can be in float8, and the part of a block that each is of.
PARTS = {"qkv": "attn", "proj": "attn", "lin1": "mlp", "lin2": "mlp"}
STATIC = ("proj", "lin2")  # whose input is attention's or GELU's output


class Float8Kernel(nnx.Variable[Float8Weight]):
    """A quantised kernel; no `nnx.Param`, for nothing trains it."""


class Float8Scale(nnx.Variable[Array]):
    """What a layer's input is divided by before it is rounded: float32, a power of two."""


class Float8Linear(nnx.Module):
    """`x kernel + bias` with x and kernel in e4m3, in the place of an `nnx.Linear`.

    Args:
        linear: The layer, whose bias is shared.
        static: Whether the input has one scale that is known beforehand, at first 1, and not a
            scale a row.

    Attributes:
        kernel: The weight, [n, d] and a scale an output channel.
        bias: As in `nnx.Linear`.
        input_scale: The input's scale; None is a scale a row.
        dtype: Of the result.
    """

    def __init__(self, linear: nnx.Linear, *, static: bool):
        assert linear.dtype is not None, "SAM's layers have a dtype"
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = jnp.dtype(linear.dtype)
        self.kernel = Float8Kernel(quantize_weight(linear.kernel[...]))
        self.bias = linear.bias
        self.input_scale = Float8Scale(jnp.ones((), jnp.float32)) if static else None

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch n"]:
        """Apply the layer to numbers that no kernel has quantised, in plain XLA."""
        assert self.bias is not None
        return product(self, x, self.bias[...].astype(self.dtype), implementation="xla")

    @property
    def weight(self) -> Float8Weight:
        """The kernel as the products take it."""
        return without_gradient(self.kernel.get_value())

    def quantized(self, x: Float[Array, "*batch d"]) -> Float8Rows:
        """The layer's input in e4m3."""
        scale = self.input_scale
        return quantize_rows(x) if scale is None else quantize_static(x, scale[...])


def product(
    layer: nnx.Linear | Float8Linear,
    x: Float[Array, "*batch d"] | Float8Rows,
    bias: Float[Array, " n"],
    *,
    residual: Float[Array, "*batch n"] | None = None,
    implementation: Implementation,
) -> Float[Array, "*batch n"]:
    """A layer's product with another bias, added to `residual` if there is one.

    Args:
        layer: Whose kernel it is.
        x: For a `Float8Linear` quantised or not, else in the compute dtype.
        bias: In the place of the layer's own.
        residual: What the product is added to.
        implementation: As for `pallas_kernels.projection`.
    """
    options: dict[str, Any] = {"residual": residual, "implementation": implementation}
    if isinstance(layer, Float8Linear):
        rows = x if isinstance(x, Float8Rows) else layer.quantized(x)
        x, bias = without_gradient((rows, bias))
        dtype = layer.dtype if residual is None else None
        return projection(x, layer.weight, bias, dtype=dtype, **options)
    assert not isinstance(x, Float8Rows), "rows are quantised for layers in float8"
    return projection(x, layer.kernel[...].astype(x.dtype), bias, **options)


def static_scale(layer: nnx.Module) -> Float[Array, ""] | None:
    """What a layer in float8 divides its input by; None where it has no scale of its own."""
    if type(layer) is not Float8Linear or layer.input_scale is None:
        return None
    return layer.input_scale[...]


def kernel_of(layer: nnx.Linear | Float8Linear, dtype: DTypeLike) -> Float[Array, "d n"]:
    """A layer's kernel in a dtype, of float8 what its products multiply with."""
    if isinstance(layer, Float8Linear):
        return dequantize(layer.weight, dtype)
    return layer.kernel[...].astype(dtype)


def chosen_layers(patterns: Sequence[str] | None, depth: int) -> list[tuple[int, str]]:
    """The blocks and layers that patterns choose, in the model's order.

    Args:
        patterns: Of names such as `3.qkv`: `*.qkv` adds layers, `!0.*` takes some away again, in
            this order; where the first takes away, all are there at first. None is all.
        depth: Blocks of the encoder.

    Raises:
        ValueError: A pattern is of no layer, or none is left.
    """
    names = [f"{block}.{layer}" for block in range(depth) for layer in PARTS]
    patterns = ["*"] if patterns is None else list(patterns)
    chosen = set(names) if patterns and patterns[0].startswith("!") else set[str]()
    for pattern in patterns:
        found = set(fnmatch.filter(names, pattern.removeprefix("!")))
        if not found:
            raise ValueError(
                f"float8_layers must be patterns of {names[0]} to {names[-1]}, got {pattern!r}"
            )
        chosen = chosen - found if pattern.startswith("!") else chosen | found
    if not chosen:
        raise ValueError(f"float8_layers must leave a layer in float8, got {patterns}")
    return [(int(n.split(".")[0]), n.split(".")[1]) for n in names if n in chosen]


@jax.custom_jvp
def without_gradient(operands: Any) -> Any:
    """The operands of a product in float8, with an error in the place of a gradient.

    Raises:
        NotImplementedError: When it is differentiated.
    """
    return operands


@without_gradient.defjvp
def _no_gradient(*_: Any) -> Any:
    raise NotImplementedError(
        'products="float8" has no gradient; load the model with products="dtype" to train it'
    )
