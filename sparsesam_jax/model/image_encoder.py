"""SAM's image encoder, dense or with SparseSAM's Stripe-Sort attention and routed MLP."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.implementation import Implementation
from sparsesam_jax.choices import Products, check_choice
from sparsesam_jax.config import Grid, ImageEncoderConfig, Sparsity
from sparsesam_jax.model.blocks import LAYER_NORM_EPSILON, AttentionTables, Block, run_block
from sparsesam_jax.model.float8_scales import has_float8, quantise_blocks
from sparsesam_jax.model.layers import FLOAT32, DTypes, conv, convolve_patches, norm, zeros
from sparsesam_jax.sparsity.plan import Rankings, check_sparsity, encoder_plan


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
        remat: Whether a gradient computes each block again instead of keeping what is inside.
        products: `"dtype"`, the compute dtype, or `"float8"`, see `model.float8`.
        float8_layers: Which layers are in float8, see `float8.chosen_layers`; None is all.
        rngs: Source of the initial parameters.

    Raises:
        ValueError: The sparsity has per-block densities for another depth, or routes an MLP
            before the first global block has ranked the tokens; or `products` or `float8_layers`
            is none of its choices.
    """

    def __init__(
        self,
        config: ImageEncoderConfig,
        *,
        sparsity: Sparsity | None = None,
        dtypes: DTypes = FLOAT32,
        implementation: Implementation = "auto",
        remat: bool = False,
        products: Products = "dtype",
        float8_layers: Sequence[str] | None = None,
        rngs: nnx.Rngs,
    ):
        d, grid = config.embed_dim, config.grid_size
        self.config = config
        self.dtypes = dtypes
        self.implementation: Implementation = implementation
        self.remat = remat
        self.patch_embed = PatchEmbed(config, dtypes=dtypes, rngs=rngs)
        self.pos_embed = zeros(1, grid, grid, d, dtypes=dtypes)
        self.blocks = nnx.List(Block(block, dtypes=dtypes, rngs=rngs) for block in config.blocks)
        self.neck = nnx.List(
            [
                conv(d, config.out_chans, 1, use_bias=False, dtypes=dtypes, rngs=rngs),
                norm(config.out_chans, LAYER_NORM_EPSILON, dtypes=dtypes, rngs=rngs),
                conv(
                    config.out_chans,
                    config.out_chans,
                    3,
                    use_bias=False,
                    dtypes=dtypes,
                    rngs=rngs,
                ),
                norm(config.out_chans, LAYER_NORM_EPSILON, dtypes=dtypes, rngs=rngs),
            ]
        )
        self.set_sparsity(sparsity)
        check_choice("products", products, Products)
        if products == "float8":
            self.quantise(float8_layers)
        elif float8_layers is not None:
            raise ValueError(f'float8_layers needs products="float8", got {products!r}')

    def quantise(self, float8_layers: Sequence[str] | None = None) -> None:
        """Put the blocks' linear layers, as they are now, into float8; there is no way back.

        Args:
            float8_layers: As for the encoder.

        Raises:
            ValueError: The patterns choose no layer, or one of a block with layers that are not
                SAM's own any more.
        """
        quantise_blocks(self.blocks, float8_layers)

    @property
    def products(self) -> Products:
        """`"float8"` where any layer of the blocks is."""
        return "float8" if has_float8(self.blocks) else "dtype"

    def set_sparsity(self, sparsity: Sparsity | None) -> None:
        """Change what is kept; the parameters stay. None is the dense encoder."""
        if sparsity is not None:
            check_sparsity(sparsity, self.config)
        self.sparsity = sparsity

    def __call__(
        self,
        pixels: Float[Array, "B height width 3"],
        tables: Sequence[AttentionTables | None] = (),
        frame: Grid | None = None,
    ) -> Float[Array, "B Gh Gw out_chans"]:
        """Encode normalised, padded images.

        Args:
            pixels: Normalised RGB images; sides are multiples of the patch size.
            tables: What `tables` returned for these weights, this grid and frame; without it every
                call makes them, which is 24 small kernels and more for a ViT-L.
            frame: Rows and columns of the token grid that the pixels are the top left part of;
                None is their own. Positions are those of the frame, interpolated where it is not
                the configuration's grid.

        Returns:
            Features in the compute dtype, one a patch.

        Raises:
            ValueError: `pixels` is not [B, height, width, 3] with such sides, or `tables` is of
                another encoder or grid.
        """
        return self.neck_features(self.block_outputs(pixels, tables, frame)[-1])

    def tables(
        self, grid: Grid | None = None, frame: Grid | None = None
    ) -> tuple[AttentionTables, ...]:
        """What all blocks derive from the weights alone: make it once, and anew for new weights.

        Args:
            grid: Rows and columns of tokens; None is the configuration's.
            frame: As for `__call__`.
        """
        grid = grid or (self.config.grid_size, self.config.grid_size)
        return tuple(block.attn.tables(grid, frame or grid) for block in self.blocks)

    def block_outputs(
        self,
        pixels: Float[Array, "B height width 3"],
        tables: Sequence[AttentionTables | None] = (),
        frame: Grid | None = None,
    ) -> list[Array]:
        """The residual stream after every block, each [B, Gh, Gw, d]; arguments as `__call__`."""
        if tables and len(tables) != len(self.blocks):
            expected = f"one entry a block ({len(self.blocks)})"
            raise ValueError(f"tables must have {expected} or none, got {len(tables)}")
        x = self.embed(pixels, frame)
        grid = (x.shape[1], x.shape[2])
        plans = encoder_plan(self.config, self.sparsity, grid, self.implementation, frame)
        rankings, outputs = Rankings(), []
        for block, plan, table in zip(
            self.blocks, plans, tables or [None] * len(plans), strict=True
        ):
            x, rankings = run_block(block, x, plan, rankings, table, remat=self.remat)
            outputs.append(x)
        return outputs

    def embed(
        self, pixels: Float[Array, "B height width 3"], frame: Grid | None = None
    ) -> Float[Array, "B Gh Gw d"]:
        """Patch embedding plus absolute position, in the residual stream's dtype."""
        patch = self.config.patch_size
        if pixels.ndim != 4 or pixels.shape[3] != 3 or any(s % patch for s in pixels.shape[1:3]):
            raise ValueError(
                f"pixels must be [B, height, width, 3] with sides divisible by {patch}, "
                f"got {pixels.shape}"
            )
        x = self.patch_embed(pixels.astype(self.dtypes.compute))
        grid = (x.shape[1], x.shape[2])
        position, frame = self.pos_embed[...], frame or grid
        check_frame(frame, grid)
        if position.shape[1:3] != frame:
            shape = (1, *frame, position.shape[3])
            position = jax.image.resize(position, shape, "linear", antialias=False)
        position = position[:, : grid[0], : grid[1]]
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
        return convolve_patches(self.proj, pixels)


def check_frame(frame: Grid, grid: Grid) -> None:
    """Raise ValueError unless the grid is a part of the frame."""
    if frame[0] < grid[0] or frame[1] < grid[1]:
        raise ValueError(f"frame must hold the grid of {grid} tokens, got {frame}")
