"""SAM's prompt encoder: points, boxes and masks to embeddings."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsesam_jax.config import SamConfig
from sparsesam_jax.model import initial
from sparsesam_jax.model.layers import DTypes, conv, convolve_patches, embedding, gelu, norm

# Labels of points. The first three are SAM's; corners are points too, as in SAM's ONNX export.
PADDING = -10  # fills prompts up in transformers: a token of zeros, which is attended to
ABSENT = -2  # fills a prompt up to a common length; masked out of every attention
NOT_A_POINT = -1  # SAM adds one to points that come without a box
BACKGROUND = 0
FOREGROUND = 1
BOX_TOP_LEFT = 2
BOX_BOTTOM_RIGHT = 3

_LAYER_NORM_EPSILON = 1e-6


class Buffer(nnx.Variable):
    """A constant that a checkpoint carries but no optimiser touches."""


class PromptEncoder(nnx.Module):
    """Embeds prompts: points and box corners as tokens, a mask as a feature map."""

    def __init__(self, config: SamConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        channels, hidden = config.image_encoder.out_chans, config.mask_in_chans
        options = {"dtypes": dtypes, "rngs": rngs}
        self.dtypes = dtypes
        self.pe_layer = PositionEmbeddingRandom(channels // 2, dtypes=dtypes, rngs=rngs)
        self.point_embeddings = nnx.List(embedding(1, channels, **options) for _ in range(4))
        self.not_a_point_embed = embedding(1, channels, **options)
        self.no_mask_embed = embedding(1, channels, **options)
        self.mask_downscaling = nnx.List(
            [
                conv(1, hidden // 4, 2, stride=2, **options),
                norm(hidden // 4, _LAYER_NORM_EPSILON, **options),
                gelu,
                conv(hidden // 4, hidden, 2, stride=2, **options),
                norm(hidden, _LAYER_NORM_EPSILON, **options),
                gelu,
                conv(hidden, channels, 1, **options),
            ]
        )

    def __call__(
        self,
        points: Float[Array, "B P T 2"],
        labels: Int[Array, "B P T"],
        mask_input: Float[Array, "B P h w"] | None,
        *,
        image_size: tuple[int, int],
        grid: tuple[int, int],
    ) -> tuple[Float[Array, "B P T C"], Float[Array, "B _ Gh Gw C"]]:
        """Embed the prompts of a batch of images.

        Args:
            points: (x, y) in pixels of the padded input image.
            labels: One of the labels of this module a point.
            mask_input: Mask logits of an earlier prediction, at four times the features'
                resolution; None where there is none.
            image_size: Height and width of the padded input image.
            grid: Rows and columns of the image's features.

        Returns:
            Token embeddings (meaningless where the label is `ABSENT`) and the map to be added to
            the image's features: one for all prompts where none has a mask.
        """
        height, width = image_size
        position = self.pe_layer((points + 0.5) / jnp.array([width, height], jnp.float32))
        kinds = jnp.concatenate([table.embedding[...] for table in self.point_embeddings])
        kind = kinds[jnp.clip(labels, 0)]
        is_point = (labels >= 0)[..., None]
        tokens = jnp.where(is_point, position + kind, self.not_a_point_embed.embedding[0])
        tokens = jnp.where((labels == PADDING)[..., None], 0, tokens)
        if mask_input is None:
            shape = (len(labels), 1, *grid, kinds.shape[-1])
            dense = jnp.broadcast_to(self.no_mask_embed.embedding[0], shape)
        else:
            dense = mask_input.reshape(-1, *mask_input.shape[2:], 1).astype(self.dtypes.compute)
            for layer in self.mask_downscaling:
                dense = convolve_patches(layer, dense)
            dense = dense.reshape(*mask_input.shape[:2], *dense.shape[1:])
        return tokens.astype(self.dtypes.compute), dense.astype(self.dtypes.compute)

    def dense_position(self, grid: tuple[int, int]) -> Float[Array, "Gh Gw C"]:
        """Position embedding of the centre of every feature."""
        rows, cols = np.indices(grid, np.float32)
        centres = np.stack([(cols + 0.5) / grid[1], (rows + 0.5) / grid[0]], -1)
        return self.pe_layer(jnp.asarray(centres)).astype(self.dtypes.compute)


class PositionEmbeddingRandom(nnx.Module):
    """Random Fourier features: `[sin, cos](2 pi (2 x - 1) G)` of x in [0, 1]^2."""

    def __init__(self, features: int, *, dtypes: DTypes, rngs: nnx.Rngs):
        matrix = initial.normal(1.0)(rngs.params(), (2, features), dtypes.param)
        self.positional_encoding_gaussian_matrix = Buffer(matrix)

    def __call__(self, coordinates: Float[Array, "*batch 2"]) -> Float[Array, "*batch C"]:
        """Encode (x, y) in [0, 1], in float32."""
        matrix = self.positional_encoding_gaussian_matrix[...].astype(jnp.float32)
        # Two products a feature, written out: a matrix unit's rounding would move the phase.
        x, y = (2 * coordinates[..., i, None].astype(jnp.float32) - 1 for i in range(2))
        phase = 2 * jnp.pi * (x * matrix[0] + y * matrix[1])
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
