"""SAM's image encoder, dense or with SparseSAM's Stripe-Sort attention and routed MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.implementation import Implementation
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.projection import projection
from pallas_kernels.reference import matmul_precision
from pallas_kernels.routed_mlp import mlp, routed_mlp
from pallas_kernels.stripe_attention import stripe_attention
from pallas_kernels.window_attention import window_attention
from pallas_kernels.window_kernel import REL
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.model.layers import FLOAT32, DTypes, MLPBlock, conv, gelu, linear, norm
from sparsesam_jax.sparsity.plan import AttentionTables, Plan, check_sparsity

_LAYER_NORM_EPSILON = 1e-6


class ImageEncoder(nnx.Module):
    """Plain ViT with windowed and global attention blocks and a convolutional neck.

    With a `Sparsity`, attention runs on the key blocks of a static `BlockLayout` (SparseSAM,
    Stripe-Sort attention), and the MLP of windowed blocks after the first global one runs on the
    most important tokens only (Residual-Consistency MLP): those get `x + MLP(LN(x))`, the others
    keep x. What is important is ranked once a forward and kind of block, at the first of it.

    Args:
        config: Shape of the encoder.
        sparsity: What to keep; None is the dense encoder, which is SAM exactly.
        dtypes: Of computation, parameters and the residual stream.
        implementation: `"xla"`, `"mosaic_gpu"` or `"auto"`, see `pallas_kernels.implementation`.
        rngs: Source of the initial parameters.

    Raises:
        ValueError: The sparsity has per-block densities for another depth, or routes an MLP
            before the first global block has ranked the tokens.
    """

    def __init__(
        self,
        config: ImageEncoderConfig,
        *,
        sparsity: Sparsity | None = None,
        dtypes: DTypes = FLOAT32,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
    ):
        d, grid = config.embed_dim, config.grid_size
        self.config = config
        self.dtypes = dtypes
        self.implementation: Implementation = implementation
        self.patch_embed = PatchEmbed(config, dtypes=dtypes, rngs=rngs)
        self.pos_embed = nnx.Param(jnp.zeros((1, grid, grid, d), dtypes.param))
        self.blocks = nnx.List(
            Block(config, index, dtypes=dtypes, rngs=rngs) for index in range(config.depth)
        )
        self.neck = nnx.List(
            [
                conv(d, config.out_chans, 1, use_bias=False, dtypes=dtypes, rngs=rngs),
                norm(config.out_chans, _LAYER_NORM_EPSILON, dtypes=dtypes, rngs=rngs),
                conv(
                    config.out_chans,
                    config.out_chans,
                    3,
                    use_bias=False,
                    dtypes=dtypes,
                    rngs=rngs,
                ),
                norm(config.out_chans, _LAYER_NORM_EPSILON, dtypes=dtypes, rngs=rngs),
            ]
        )
        self.set_sparsity(sparsity)

    def set_sparsity(self, sparsity: Sparsity | None) -> None:
        """Change what is kept; the parameters stay. None is the dense encoder."""
        if sparsity is not None:
            check_sparsity(sparsity, self.config)
        self.sparsity = sparsity

    def __call__(
        self, pixels: Float[Array, "B height width 3"], tables: Sequence[AttentionTables] = ()
    ) -> Float[Array, "B Gh Gw out_chans"]:
        """Encode normalised, padded images.

        Args:
            pixels: Normalised RGB images; sides are multiples of the patch size. Position tables
                are interpolated for another size than `config.image_size`.
            tables: What `tables` returned for these weights and this grid; without it every call
                makes them, which is 24 small kernels and more for a ViT-L.

        Returns:
            Features in the compute dtype, one a patch.

        Raises:
            ValueError: `pixels` is not [B, height, width, 3] with such sides, or `tables` is of
                another encoder or grid.
        """
        return self.neck_features(self.block_outputs(pixels, tables)[-1])

    def tables(self, grid: tuple[int, int] | None = None) -> tuple[AttentionTables, ...]:
        """What all blocks derive from the weights alone: make it once, and anew for new weights.

        Args:
            grid: Rows and columns of tokens; None is the configuration's.
        """
        grid = grid or (self.config.grid_size, self.config.grid_size)
        return tuple(block.attn.tables(grid) for block in self.blocks)

    def block_outputs(
        self, pixels: Float[Array, "B height width 3"], tables: Sequence[AttentionTables] = ()
    ) -> list[Array]:
        """The residual stream after every block, each [B, Gh, Gw, d]; arguments as `__call__`."""
        if tables and len(tables) != len(self.blocks):
            expected = f"one entry a block ({len(self.blocks)})"
            raise ValueError(f"tables must have {expected} or none, got {len(tables)}")
        x = self.embed(pixels)
        grid = (x.shape[1], x.shape[2])
        plan = Plan(self.config, self.sparsity, grid, self.implementation, tables)
        outputs = []
        for block in self.blocks:
            x = block(x, plan)
            outputs.append(x)
        return outputs

    def embed(self, pixels: Float[Array, "B height width 3"]) -> Float[Array, "B Gh Gw d"]:
        """Patch embedding plus absolute position, in the residual stream's dtype."""
        patch = self.config.patch_size
        if pixels.ndim != 4 or pixels.shape[3] != 3 or any(s % patch for s in pixels.shape[1:3]):
            raise ValueError(
                f"pixels must be [B, height, width, 3] with sides divisible by {patch}, "
                f"got {pixels.shape}"
            )
        x = self.patch_embed(pixels.astype(self.dtypes.compute))
        position = self.pos_embed[...]
        if position.shape[1:3] != x.shape[1:3]:
            shape = (1, *x.shape[1:3], position.shape[3])
            position = jax.image.resize(position, shape, "linear", antialias=False)
        return x.astype(self.dtypes.residual) + position.astype(self.dtypes.residual)

    def neck_features(self, x: Float[Array, "B Gh Gw d"]) -> Float[Array, "B Gh Gw out_chans"]:
        """The neck: tokens of the last block to features, in the compute dtype."""
        for layer in self.neck:
            x = layer(x)
        return x


class PatchEmbed(nnx.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, config: ImageEncoderConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        patch = self.patch_size = config.patch_size
        self.proj = conv(3, config.embed_dim, patch, stride=patch, dtypes=dtypes, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B height width 3"]) -> Float[Array, "B Gh Gw d"]:
        """Project each patch."""
        # As a product: GPUs have no fast convolution of three channels.
        patch, kernel = self.patch_size, self.proj.kernel[...].astype(pixels.dtype)
        batch, height, width, channels = pixels.shape
        patches = pixels.reshape(batch, height // patch, patch, width // patch, patch, channels)
        patches = patches.swapaxes(2, 3).reshape(batch, height // patch, width // patch, -1)
        assert self.proj.bias is not None
        out = jnp.matmul(
            patches,
            kernel.reshape(patches.shape[-1], -1),
            precision=matmul_precision(pixels.dtype),
        )
        return out + self.proj.bias[...].astype(out.dtype)


class Block(nnx.Module):
    """Transformer block: windowed or global attention, then the MLP, both residual."""

    def __init__(self, config: ImageEncoderConfig, index: int, *, dtypes: DTypes, rngs: nnx.Rngs):
        d = config.embed_dim
        self.index = index
        self.dtypes = dtypes
        self.norm1 = norm(d, _LAYER_NORM_EPSILON, dtypes=dtypes, rngs=rngs)
        self.attn = Attention(config, index, dtypes=dtypes, rngs=rngs)
        self.norm2 = norm(d, _LAYER_NORM_EPSILON, dtypes=dtypes, rngs=rngs)
        self.mlp = MLPBlock(d, config.mlp_dim, activation=gelu, dtypes=dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "B Gh Gw d"], plan: Plan) -> Array:
        """Apply the block; the first of its kind also ranks the tokens into `plan`."""
        options: dict[str, Any] = {
            "epsilon": _LAYER_NORM_EPSILON,
            "implementation": plan.implementation,
        }
        dtype = self.dtypes.compute
        norm1 = _arrays(dtype, self.norm1.scale, self.norm1.bias)
        normed = layer_norm(x, *norm1, dtype=dtype, **options)
        x = self.attn.project(self.attn.attend(normed, x, plan), plan, residual=x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        routed = plan.routed_tokens(self.index)
        if routed is None:
            tokens = mlp(tokens, self._mlp_weights(), **options)
        else:
            tokens = routed_mlp(tokens, routed, self._mlp_weights(), **options)
        return tokens.reshape(x.shape)

    def _mlp_weights(self) -> MLPWeights:
        norm2, lin1, lin2 = self.norm2, self.mlp.lin1, self.mlp.lin2
        params = (norm2.scale, norm2.bias, lin1.kernel, lin1.bias, lin2.kernel, lin2.bias)
        return MLPWeights(*_arrays(self.dtypes.compute, *params))


def _arrays(dtype: DTypeLike, *params: nnx.Param[Array] | None) -> list[Array]:
    """Parameters that there are, in one dtype."""
    return [param[...].astype(dtype) for param in params if param is not None]


class Attention(nnx.Module):
    """Multi-head attention with decomposed relative position bias.

    `softmax(q k^T / sqrt(D) + BH + BW) v` with `BH[q, k] = q . R_h[row(q) - row(k) + S - 1]` and BW
    likewise for columns. Keys and values are projected without their bias: the key bias adds the
    same to all logits of a query, so it cancels, and the value bias passes through the softmax
    unchanged, so it is added behind it. A padded token of a window is then k = 0, v = 0.
    """

    def __init__(self, config: ImageEncoderConfig, index: int, *, dtypes: DTypes, rngs: nnx.Rngs):
        d, head_dim = config.embed_dim, config.head_dim
        self.index = index
        self.num_heads = config.num_heads
        self.dtypes = dtypes
        self.window_size = None if config.is_global(index) else config.window_size
        side = self.window_size or config.grid_size
        self.qkv = linear(d, 3 * d, dtypes=dtypes, rngs=rngs)
        self.proj = linear(d, d, dtypes=dtypes, rngs=rngs)
        self.rel_pos_h = nnx.Param(jnp.zeros((2 * side - 1, head_dim), dtypes.param))
        self.rel_pos_w = nnx.Param(jnp.zeros((2 * side - 1, head_dim), dtypes.param))

    def __call__(
        self, x: Float[Array, "B Gh Gw d"], block_input: Float[Array, "B Gh Gw d"], plan: Plan
    ) -> Float[Array, "B Gh Gw d"]:
        """Attend and project; arguments as `attend`."""
        return self.project(self.attend(x, block_input, plan), plan)

    def attend(
        self, x: Float[Array, "B Gh Gw d"], block_input: Float[Array, "B Gh Gw d"], plan: Plan
    ) -> Float[Array, "B Gh Gw d"]:
        """Attend over the grid or in windows, without the value bias and the projection.

        Args:
            x: The tokens after LayerNorm.
            block_input: The tokens before it, which a ranking may look at.
            plan: Layouts and rankings of this forward.
        """
        batch, height, width, d = x.shape
        tables = self._tables(plan)
        assert self.qkv.bias is not None
        kernel, bias = (p[...].astype(x.dtype) for p in (self.qkv.kernel, self.qkv.bias))
        qkv = projection(x, kernel, tables.qkv_bias, implementation=plan.implementation)
        qkv = qkv.reshape(batch, height, width, 3, self.num_heads, -1)
        key_bias = bias[d : 2 * d].reshape(self.num_heads, -1)
        arrays = (qkv, tables.rel_pos_h, tables.rel_pos_w)
        if self.window_size:
            plan.rank_windows(qkv[:, :, :, 1], key_bias, block_input)
            layout, order = plan.window_layout(self.index)
            out = window_attention(
                *arrays,
                window_size=self.window_size,
                layout=layout,
                order=order,
                implementation=plan.implementation,
            )
        else:
            plan.rank_grid(qkv[:, :, :, 1], key_bias, block_input)
            layout, sequence, block_order = plan.grid_layout(self.index)
            out = stripe_attention(
                *arrays,
                sequence,
                layout=layout,
                block_order=block_order,
                implementation=plan.implementation,
            )
        return out.reshape(x.shape)

    def project(
        self,
        attended: Float[Array, "B Gh Gw d"],
        plan: Plan,
        residual: Float[Array, "B Gh Gw d"] | None = None,
    ) -> Float[Array, "B Gh Gw d"]:
        """The output projection of what `attend` returned, added to `residual` if there is one."""
        kernel = self.proj.kernel[...].astype(attended.dtype)
        bias, implementation = self._tables(plan).proj_bias, plan.implementation
        return projection(attended, kernel, bias, residual=residual, implementation=implementation)

    def tables(self, grid: tuple[int, int]) -> AttentionTables:
        """What `ImageEncoder.tables` holds for this block."""
        dtype, d = self.dtypes.compute, self.proj.kernel.shape[0]
        assert self.qkv.bias is not None and self.proj.bias is not None
        qkv_bias, kernel, proj_bias = (
            p[...].astype(dtype) for p in (self.qkv.bias, self.proj.kernel, self.proj.bias)
        )
        options = {"precision": self.dtypes.precision, "preferred_element_type": jnp.float32}
        return AttentionTables(
            jnp.where(np.arange(3 * d) < d, qkv_bias, 0),
            proj_bias + jnp.matmul(qkv_bias[2 * d :], kernel, **options),
            *(
                self._padded_table(table[...], side).astype(dtype)
                for table, side in zip((self.rel_pos_h, self.rel_pos_w), grid, strict=True)
            ),
        )

    def _padded_table(self, rel_pos: Array, side: int) -> Array:
        table = relative_table(rel_pos, side, self.window_size)
        if self.window_size is None:
            return table
        return jnp.pad(table, ((0, 0), (0, max(0, REL - self.window_size)), (0, 0)))

    def _tables(self, plan: Plan) -> AttentionTables:
        return plan.tables[self.index] if plan.tables else self.tables(plan.grid)


def relative_table(
    rel_pos: Float[Array, "length D"], grid: int, window_size: int | None
) -> Float[Array, "grid side D"]:
    """Rows `rel_pos[q - k + side - 1]` for every query and key coordinate along one axis.

    A table for another grid is interpolated linearly, as SAM does. In windows, q and k are
    coordinates inside a window, and only k's run over `side = window_size`.
    """
    side = window_size or grid
    length = 2 * side - 1
    if rel_pos.shape[0] != length:
        rel_pos = jax.image.resize(rel_pos, (length, rel_pos.shape[1]), "linear", antialias=False)
    query = np.arange(grid) % side
    return rel_pos[query[:, None] - np.arange(side)[None] + side - 1]
