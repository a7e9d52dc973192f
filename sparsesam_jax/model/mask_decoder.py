"""SAM's mask decoder: a two-way transformer, hypernetworks and the IoU head; SAM-HQ's additions.

A prompt has some ten tokens, an image thousands. So nothing of the image is projected for
attention: the tokens' side is passed through the projections of both sides instead, which is the
same product in another order. And until tokens are first written into the image, all prompts share
it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sparsesam_jax.config import Grid, SamConfig
from sparsesam_jax.model.blocks import replaced
from sparsesam_jax.model.layers import (
    MLP,
    ConvTranspose2x2,
    DTypes,
    MLPBlock,
    conv,
    embedding,
    gelu,
    linear,
    norm,
    relu,
)

# Meta's transformer takes torch's default epsilon, its LayerNorm2d 1e-6.
_TRANSFORMER_EPSILON = 1e-5
_LAYER_NORM_2D_EPSILON = 1e-6
_ATTENTION_DOWNSAMPLE = 2


class MaskDecoder(nnx.Module):
    """Predicts masks and their quality from image features and embedded prompts."""

    def __init__(self, config: SamConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        channels = config.image_encoder.out_chans
        num_masks = config.num_multimask_outputs + 1
        options = {"dtypes": dtypes, "rngs": rngs}
        self.num_masks = num_masks
        self.hq = config.hq
        self.dtypes = dtypes
        self.transformer = TwoWayTransformer(config, **options)
        self.iou_token = embedding(1, channels, **options)
        self.mask_tokens = embedding(num_masks, channels, **options)
        self.output_upscaling = nnx.List(
            [*_upscaling(channels, channels // 4, channels // 8, **options), gelu]
        )
        self.output_hypernetworks_mlps = nnx.List(
            MLP(channels, channels, channels // 8, 3, **options) for _ in range(num_masks)
        )
        self.iou_prediction_head = MLP(
            channels, config.iou_head_hidden_dim, num_masks, config.iou_head_depth, **options
        )
        if config.hq:
            vit_dim = config.image_encoder.embed_dim
            self.hf_token = embedding(1, channels, **options)
            self.hf_mlp = MLP(channels, channels, channels // 8, 3, **options)
            self.compress_vit_feat = nnx.List(
                _upscaling(vit_dim, channels, channels // 8, **options)
            )
            self.embedding_encoder = nnx.List(
                _upscaling(channels, channels // 4, channels // 8, **options)
            )
            self.embedding_maskfeature = nnx.List(
                [
                    conv(channels // 8, channels // 4, 3, **options),
                    norm(channels // 4, _LAYER_NORM_2D_EPSILON, **options),
                    gelu,
                    conv(channels // 4, channels // 8, 3, **options),
                ]
            )

    def __call__(
        self,
        features: Float[Array, "B Gh Gw C"],
        position: Float[Array, "Gh Gw C"],
        tokens: Float[Array, "B P T C"],
        present: Bool[Array, "B P T"],
        dense: Float[Array, "B _ Gh Gw C"],
        *,
        multimask_output: bool | None,
        early_features: Float[Array, "B Gh Gw d"] | None = None,
        hq_token_only: bool = False,
    ) -> tuple[Float[Array, "B P K 4*Gh 4*Gw"], Float[Array, "B P K"]]:
        """Predict masks for every prompt of every image.

        Args:
            features: The image encoder's output.
            position: Position embedding of the features.
            tokens: Embedded points and boxes.
            present: Which tokens are there; the others are masked out of every attention.
            dense: Embedded mask prompts; one for all prompts where they have no mask.
            multimask_output: Whether to return the proposals instead of the single-mask output;
                None returns both, the single mask first. SAM-HQ returns one mask either way: it
                refines the best proposal, or the single.
            early_features: Output of the first global block, which SAM-HQ's masks also use.
            hq_token_only: SAM-HQ: its own mask alone instead of the sum with SAM's.

        Returns:
            Mask logits at four times the features' resolution and predicted IoU, float32.
        """
        batch, prompts = tokens.shape[:2]
        grid, channels = (features.shape[1], features.shape[2]), features.shape[3]
        outputs = [self.iou_token.embedding[...], self.mask_tokens.embedding[...]]
        if self.hq:
            outputs.append(self.hf_token.embedding[...])
        learned = jnp.concatenate(outputs).astype(tokens.dtype)
        learned = jnp.broadcast_to(learned, (batch, prompts, *learned.shape))
        queries = jnp.concatenate([learned, tokens], axis=2)
        queries = queries.reshape(batch * prompts, -1, channels)
        present = jnp.pad(
            present, ((0, 0), (0, 0), (learned.shape[2], 0)), constant_values=True
        ).reshape(batch * prompts, -1)
        image = (features[:, None] + dense).reshape(-1, grid[0] * grid[1], channels)
        queries, image = self.transformer(queries, image, position.reshape(-1, channels), present)

        upscaled = _upscaled(self.output_upscaling, image)
        mask_tokens = queries[:, 1 : 1 + self.num_masks]
        weights = jnp.stack(
            [mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1
        )
        chosen = {None: slice(None), True: slice(1, None), False: slice(0, 1)}[multimask_output]
        masks = _products(weights[:, chosen], upscaled, self.dtypes.precision)
        masks = jax.vmap(lambda mask: _raster(mask[..., None], grid)[..., 0], 1, 1)(masks)
        iou = self.iou_prediction_head(queries[:, 0]).astype(jnp.float32)[:, chosen]
        if self.hq:
            if early_features is None:
                raise ValueError("early_features must be given to a SAM-HQ decoder, got None")
            best = iou.argmax(1)[:, None]
            iou = jnp.take_along_axis(iou, best, 1)
            masks = jnp.take_along_axis(masks, best[..., None, None], 1)
            hq_features = _apply(self.embedding_encoder, features)
            hq_features = hq_features + _apply(self.compress_vit_feat, early_features)
            hq_upscaled = _apply(self.embedding_maskfeature, _raster(upscaled, grid))
            hq_upscaled = hq_upscaled + jnp.repeat(hq_features, prompts, axis=0)
            hq_weights = self.hf_mlp(queries[:, 1 + self.num_masks])[:, None]
            hq = _products(hq_weights, hq_upscaled, self.dtypes.precision)
            masks = hq if hq_token_only else masks + hq
        return (
            masks.reshape(batch, prompts, *masks.shape[1:]),
            iou.reshape(batch, prompts, -1),
        )


class TwoWayTransformer(nnx.Module):
    """Tokens and image attend to themselves and to each other."""

    def __init__(self, config: SamConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        channels = config.image_encoder.out_chans
        self.layers = nnx.List(
            TwoWayAttentionBlock(config, first=index == 0, dtypes=dtypes, rngs=rngs)
            for index in range(config.decoder_depth)
        )
        self.final_attn_token_to_image = DecoderAttention(
            channels,
            channels // _ATTENTION_DOWNSAMPLE,
            config.decoder_num_heads,
            dtypes=dtypes,
            rngs=rngs,
        )
        self.norm_final_attn = norm(channels, _TRANSFORMER_EPSILON, dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "B T C"],
        image: Float[Array, "G N C"],
        position: Float[Array, "N C"],
        present: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B N C"]]:
        """Transform tokens and image; `present` masks tokens out as keys.

        B / G prompts after one another share an image, which comes out once a prompt.
        """
        queries = tokens
        for layer in self.layers:
            queries, image = layer(queries, image, tokens, position, present)
        attended = self.final_attn_token_to_image.from_image(
            queries + tokens, image + position, image
        )
        return self.norm_final_attn(queries + attended), image


class TwoWayAttentionBlock(nnx.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens."""

    def __init__(self, config: SamConfig, *, first: bool, dtypes: DTypes, rngs: nnx.Rngs):
        channels, heads = config.image_encoder.out_chans, config.decoder_num_heads
        options = {"dtypes": dtypes, "rngs": rngs}
        self.first = first
        inner = channels // _ATTENTION_DOWNSAMPLE
        self.self_attn = DecoderAttention(channels, channels, heads, **options)
        self.cross_attn_token_to_image = DecoderAttention(channels, inner, heads, **options)
        self.cross_attn_image_to_token = DecoderAttention(channels, inner, heads, **options)
        self.mlp = MLPBlock(
            channels, config.decoder_mlp_dim, activation=relu, dtypes=dtypes, rngs=rngs
        )
        self.norm1 = norm(channels, _TRANSFORMER_EPSILON, **options)
        self.norm2 = norm(channels, _TRANSFORMER_EPSILON, **options)
        self.norm3 = norm(channels, _TRANSFORMER_EPSILON, **options)
        self.norm4 = norm(channels, _TRANSFORMER_EPSILON, **options)

    def __call__(
        self,
        queries: Float[Array, "B T C"],
        image: Float[Array, "G N C"],
        tokens: Float[Array, "B T C"],
        position: Float[Array, "N C"],
        present: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B N C"]]:
        """One layer; `tokens`, the transformer's input, serve as the queries' position."""
        if self.first:  # the queries still are the tokens: SAM adds neither position nor residual
            queries = self.self_attn(queries, queries, queries, present)
        else:
            q = queries + tokens
            queries = queries + self.self_attn(q, q, queries, present)
        queries = self.norm1(queries)
        keys = image + position
        attended = self.cross_attn_token_to_image.from_image(queries + tokens, keys, image)
        queries = self.norm2(queries + attended)
        queries = self.norm3(queries + self.mlp(queries))
        attended = self.cross_attn_image_to_token.to_image(keys, queries + tokens, queries, present)
        image = image[:, None] + attended.reshape(image.shape[0], -1, *image.shape[1:])
        return queries, self.norm4(image.reshape(attended.shape))


class DecoderAttention(nnx.Module):
    """Multi-head attention, its inner width possibly smaller than its outer one."""

    def __init__(
        self, channels: int, inner: int, num_heads: int, *, dtypes: DTypes, rngs: nnx.Rngs
    ):
        if inner % num_heads:
            raise ValueError(
                f"decoder_num_heads must divide the attention width {inner}, got {num_heads}"
            )
        self.num_heads = num_heads
        self.dtypes = dtypes
        self.q_proj = linear(channels, inner, dtypes=dtypes, rngs=rngs)
        self.k_proj = linear(channels, inner, dtypes=dtypes, rngs=rngs)
        self.v_proj = linear(channels, inner, dtypes=dtypes, rngs=rngs)
        self.out_proj = linear(inner, channels, dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        q: Float[Array, "B Q C"],
        k: Float[Array, "B K C"],
        v: Float[Array, "B K C"],
        present: Bool[Array, "B K"] | None = None,
    ) -> Float[Array, "B Q C"]:
        """Attend from q to the keys that are present (None: all)."""
        q, k, v = self._heads("q_proj", q), self._heads("k_proj", k), self._heads("v_proj", v)
        logits = self._einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        if present is not None:
            logits = jnp.where(present[:, None, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = self._einsum("bhqk,bkhd->bqhd", weights, v).astype(v.dtype)
        return self.out_proj(out.reshape(*out.shape[:2], -1))

    def from_image(
        self,
        tokens: Float[Array, "B T C"],
        keys: Float[Array, "G N C"],
        image: Float[Array, "G N C"],
    ) -> Float[Array, "B T C"]:
        """Attend from tokens to an image that B / G prompts after one another share.

        `q . (W_k x + b_k) = (W_k' q) . x + const(q)`, and the constant cancels in the softmax. The
        weights sum to one, so that `sum w (W_v x + b_v) = W_v (sum w x) + b_v`.

        Args:
            tokens: What the queries are made of.
            keys: What the keys are made of.
            image: What the values are made of.
        """
        shape = tokens.shape
        tokens = tokens.reshape(image.shape[0], -1, shape[-1])
        if self._replaced:
            return self(tokens, keys, image).reshape(shape)
        q = self._heads("q_proj", tokens)
        q = self._einsum("gqhd,chd->gqhc", q, self._kernel("k_proj")) * q.shape[-1] ** -0.5
        logits = self._einsum("gqhc,gnc->gqhn", q.astype(keys.dtype), keys)
        weights = jax.nn.softmax(logits, axis=-1).astype(image.dtype)
        mixed = self._einsum("gqhn,gnc->gqhc", weights, image).astype(image.dtype)
        out = self._einsum("gqhc,chd->gqhd", mixed, self._kernel("v_proj"))
        out = out.reshape(*out.shape[:2], -1) + self._bias("v_proj")
        return self.out_proj(out.astype(image.dtype)).reshape(shape)

    def to_image(
        self,
        image: Float[Array, "G N C"],
        keys: Float[Array, "B T C"],
        values: Float[Array, "B T C"],
        present: Bool[Array, "B T"],
    ) -> Float[Array, "B N C"]:
        """Attend from an image, which B / G prompts after one another share, to their tokens.

        As `from_image`: the tokens' keys pass through the queries' projection, their values through
        the output's.

        Args:
            image: What the queries are made of.
            keys: What the keys are made of.
            values: What the values are made of.
            present: Which tokens are there.
        """
        groups, (batch, length) = image.shape[0], present.shape
        if self._replaced:
            image = jnp.repeat(image, batch // groups, axis=0)
            return self(image, keys, values, present)
        k, v = (
            x.reshape(groups, -1, *x.shape[1:])
            for x in (self._heads("k_proj", keys), self._heads("v_proj", values))
        )
        k = k * k.shape[-1] ** -0.5
        bias = self._bias("q_proj").reshape(self.num_heads, -1)
        bias = self._einsum("gpthd,hd->gpht", k, bias.astype(k.dtype))
        bias = jnp.where(present.reshape(groups, -1, 1, length), bias, -jnp.inf)
        k = self._einsum("gpthd,chd->gphtc", k, self._kernel("q_proj")).astype(image.dtype)
        # The few tokens are no good last axis: the image's thousands are.
        logits = self._einsum("gphtc,gnc->gphtn", k, image) + bias[..., None]
        weights = jax.nn.softmax(logits, axis=-2).astype(v.dtype)
        v = self._einsum("gpthd,chd->gphtc", v, self._kernel("out_proj")).astype(v.dtype)
        # In float32 this would be the largest array of the decoder.
        out = self._einsum("gphtn,gphtc->gpnc", weights, v, v.dtype)
        out = out + self._bias("out_proj").astype(v.dtype)
        return out.reshape(batch, *image.shape[1:])

    @property
    def _replaced(self) -> bool:
        """Whether a projection is no plain product any more, so that it has to be called."""
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        return any(replaced(name, getattr(self, name)) for name in names)

    def _heads(self, name: str, x: Array) -> Array:
        """A projection by heads, [..., heads, D]."""
        return getattr(self, name)(x).reshape(*x.shape[:-1], self.num_heads, -1)

    def _kernel(self, name: str) -> Array:
        """A projection's kernel by heads, [C, heads, D]; of the output's the outputs are C."""
        kernel = getattr(self, name).kernel[...].astype(self.dtypes.compute)
        kernel = kernel.T if name == "out_proj" else kernel
        return kernel.reshape(len(kernel), self.num_heads, -1)

    def _bias(self, name: str) -> Array:
        return getattr(self, name).bias[...]

    def _einsum(self, subscripts: str, a: Array, b: Array, dtype: DTypeLike = jnp.float32) -> Array:
        """A product that is accumulated in float32."""
        options = {"precision": self.dtypes.precision, "preferred_element_type": dtype}
        return jnp.einsum(subscripts, a, b, **options)


def _upscaling(
    inputs: int, hidden: int, outputs: int, *, dtypes: DTypes, rngs: nnx.Rngs
) -> list[Callable[[Array], Array]]:
    """Two transposed convolutions, four times the resolution."""
    return [
        ConvTranspose2x2(inputs, hidden, dtypes=dtypes, rngs=rngs),
        norm(hidden, _LAYER_NORM_2D_EPSILON, dtypes=dtypes, rngs=rngs),
        gelu,
        ConvTranspose2x2(hidden, outputs, dtypes=dtypes, rngs=rngs),
    ]


def _apply(layers: nnx.List, x: Array) -> Array:
    for layer in layers:
        x = layer(x)
    return x


def _upscaled(layers: nnx.List, image: Float[Array, "B N C"]) -> Float[Array, "B N 2 2 2 2 c"]:
    """The layers of `_upscaling`, every token's square of pixels by itself: nothing is moved."""
    for layer in layers:
        image = layer.squares(image) if isinstance(layer, ConvTranspose2x2) else layer(image)
    return image


def _products(
    weights: Float[Array, "B K c"],
    upscaled: Float[Array, "B *pixels c"],
    precision: jax.lax.Precision | None,
) -> Float[Array, "B K *pixels"]:
    """Each mask's weights times the upscaled features, in float32."""
    flat = upscaled.reshape(upscaled.shape[0], -1, upscaled.shape[-1])
    options = {"precision": precision, "preferred_element_type": jnp.float32}
    found = jnp.einsum("bkc,bpc->bkp", weights, flat, **options)
    return found.reshape(*found.shape[:2], *upscaled.shape[1:-1])


def _raster(x: Float[Array, "B N 2 2 2 2 c"], grid: Grid) -> Float[Array, "B height width c"]:
    """Squares of pixels, of squares of pixels, put in their places."""
    batch, channels = x.shape[0], x.shape[-1]
    x = x.reshape(batch, *grid, 2, 2, 2, 2, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, 4 * grid[0], 4 * grid[1], channels)
