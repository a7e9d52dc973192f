"""Building blocks that image encoder, prompt encoder and mask decoder share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.reference import matmul_precision
from sparsesam_jax.model import initial


@dataclasses.dataclass(frozen=True)
class DTypes:
    """What a model computes in and what its parameters are kept in.

    LayerNorm, softmax and accumulation are float32 whatever `compute` is.

    Attributes:
        compute: Of products and of what is between them.
        param: Of parameters.
        residual: Of the image encoder's residual stream, which is rounded twice a block. None is
            float16 where bfloat16 is computed in, else `compute`. A float16 has three more bits
            than a bfloat16, but ends at 65504.
    """

    compute: DTypeLike = jnp.float32
    param: DTypeLike = jnp.float32
    residual: DTypeLike | None = None  # none is left after __init__

    def __post_init__(self) -> None:
        for name in ("compute", "param", "residual"):
            value = getattr(self, name)
            if name == "residual" and value is None:
                value = jnp.float16 if self.compute == jnp.bfloat16 else self.compute
            try:
                dtype = jnp.dtype(value)
            except TypeError:
                dtype = None
            if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
                argument = "residual_dtype" if name == "residual" else "dtype"
                raise ValueError(f"{argument} must be float32, bfloat16 or float16, got {value}")
            object.__setattr__(self, name, dtype)

    @property
    def precision(self) -> jax.lax.Precision | None:
        """Precision of the products: float32 means float32 on a GPU too."""
        return matmul_precision(jnp.dtype(self.compute))


FLOAT32 = DTypes()


def add(x: Array, update: Array) -> Array:
    """`x + update` in x's dtype, which for the residual stream need not be the update's."""
    return (x + update).astype(x.dtype)


def gelu(x: Array) -> Array:
    """The exact GELU, `x Phi(x)`."""
    return jax.nn.gelu(x, approximate=False)


def relu(x: Array) -> Array:
    """`max(x, 0)`; JAX's own is no function that pickles, which models have to."""
    return jax.nn.relu(x)


def linear(
    inputs: int, outputs: int, *, use_bias: bool = True, dtypes: DTypes, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer with SAM's dtypes."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=dtypes.compute,
        param_dtype=dtypes.param,
        precision=dtypes.precision,
        kernel_init=initial.lecun_normal(inputs),
        bias_init=initial.constant(0.0),
        rngs=rngs,
    )


def conv(
    inputs: int,
    outputs: int,
    kernel_size: int,
    *,
    stride: int = 1,
    use_bias: bool = True,
    dtypes: DTypes,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution that keeps the size (stride 1) or cuts into patches."""
    return nnx.Conv(
        inputs,
        outputs,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding="SAME" if stride == 1 else "VALID",
        use_bias=use_bias,
        dtype=dtypes.compute,
        param_dtype=dtypes.param,
        precision=dtypes.precision,
        kernel_init=initial.lecun_normal(kernel_size**2 * inputs),
        bias_init=initial.constant(0.0),
        rngs=rngs,
    )


def convolve_patches(layer: Any, x: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
    """A convolution whose patches do not overlap, as a product.

    GPUs have no fast convolution of few channels, least of all its gradient. A layer of the user's
    is called as it is.
    """
    if type(layer) is not nnx.Conv or layer.bias is None or layer.strides != layer.kernel_size:
        return layer(x)
    kernel = layer.kernel[...].astype(x.dtype)
    down, across = kernel.shape[:2]
    batch, height, width, channels = x.shape
    rows, cols = height // down, width // across
    patches = x.reshape(batch, rows, down, cols, across, channels).swapaxes(2, 3)
    out = jnp.matmul(
        patches.reshape(batch, rows, cols, -1),
        kernel.reshape(down * across * channels, -1),
        precision=matmul_precision(x.dtype),
    )
    return out + layer.bias[...].astype(out.dtype)


def norm(features: int, epsilon: float, *, dtypes: DTypes, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis, float32 inside; on `B H W C` this is SAM's LayerNorm2d."""
    return nnx.LayerNorm(
        features,
        epsilon=epsilon,
        dtype=dtypes.compute,
        param_dtype=dtypes.param,
        use_fast_variance=False,
        scale_init=initial.constant(1.0),
        bias_init=initial.constant(0.0),
        rngs=rngs,
    )


def embedding(rows: int, features: int, *, dtypes: DTypes, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of learned vectors."""
    return nnx.Embed(
        rows,
        features,
        dtype=dtypes.compute,
        param_dtype=dtypes.param,
        embedding_init=initial.normal(features**-0.5),
        rngs=rngs,
    )


def zeros(*shape: int, dtypes: DTypes) -> nnx.Param[Array]:
    """A parameter that begins at zero."""
    return nnx.Param(jnp.asarray(np.zeros(shape, dtypes.param)))


class ConvTranspose2x2(nnx.Module):
    """Transposed convolution with kernel 2 and stride 2: every pixel becomes a 2 x 2 square.

    `out[2y + i, 2x + j] = x[y, x] @ kernel[i, j] + bias`: no two taps overlap.
    """

    def __init__(self, inputs: int, outputs: int, *, dtypes: DTypes, rngs: nnx.Rngs):
        init = initial.lecun_normal(4 * inputs)
        self.kernel = nnx.Param(init(rngs.params(), (2, 2, inputs, outputs), dtypes.param))
        self.bias = zeros(outputs, dtypes=dtypes)
        self.dtypes = dtypes

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W O"]:
        """Upscale a feature map by two."""
        out = self.squares(x).swapaxes(2, 3)
        batch, height, _, width, _, channels = out.shape
        return out.reshape(batch, 2 * height, 2 * width, channels)

    def squares(self, x: Float[Array, "*pixels C"]) -> Float[Array, "*pixels 2 2 O"]:
        """The square that each pixel becomes."""
        kernel, bias = (p[...].astype(self.dtypes.compute) for p in (self.kernel, self.bias))
        return jnp.einsum("...c,ijco->...ijo", x, kernel, precision=self.dtypes.precision) + bias


class MLP(nnx.Module):
    """`depth` linear layers with ReLU between them, as SAM's hypernetworks and heads use."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, depth: int, *, dtypes: DTypes, rngs: nnx.Rngs
    ):
        sizes = [inputs, *[hidden] * (depth - 1), outputs]
        self.layers = nnx.List(
            linear(i, o, dtypes=dtypes, rngs=rngs) for i, o in itertools.pairwise(sizes)
        )

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch O"]:
        """Apply the layers."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class MLPBlock(nnx.Module):
    """`lin2(activation(lin1(x)))`, the transformer's MLP."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: Callable[[Array], Array],
        dtypes: DTypes,
        rngs: nnx.Rngs,
    ):
        self.lin1 = linear(features, hidden, dtypes=dtypes, rngs=rngs)
        self.lin2 = linear(hidden, features, dtypes=dtypes, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """Apply the MLP to each token."""
        return self.lin2(self.activation(self.lin1(x)))
