"""The whole model: from pixels and prompts to masks, in one pure function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.implementation import Implementation
from sparsesam_jax.choices import Padding, Products, check_choice
from sparsesam_jax.config import Grid, SamConfig, Sparsity
from sparsesam_jax.model.blocks import AttentionTables
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.layers import DTypes
from sparsesam_jax.model.mask_decoder import MaskDecoder
from sparsesam_jax.model.prompt_encoder import ABSENT, BOX_TOP_LEFT, NOT_A_POINT, PromptEncoder
from sparsesam_jax.model.transforms import (
    MASK_THRESHOLD,
    crop_shape,
    mask_resize_matrices,
    preprocess,
    resized_shape,
)

Model = TypeVar("Model", bound="SamModel")
Labels = Num[Array, "B P T"] | Bool[Array, "B P T"]  # of any dtype: they are made int32


class ImageEmbedding(NamedTuple):
    """What the decoder needs of a batch of images.

    Attributes:
        features: The image encoder's output, [B, Gh, Gw, C].
        early_features: Output of the first global block, [B, Gh, Gw, d]; SAM-HQ only, else None.
    """

    features: Array
    early_features: Array | None


class Prediction(NamedTuple):
    """Masks for every prompt of every image.

    Attributes:
        masks: Masks (or logits) at the image's size, [B, P, K, height, width].
        iou_predictions: The model's own estimate of each mask's IoU, [B, P, K].
        low_res_logits: Logits that a later prompt can take as mask input, [B, P, K, 4 Gh, 4 Gw].
    """

    masks: Array
    iou_predictions: Array
    low_res_logits: Array


class SamModel(nnx.Module):
    """Segment Anything: image encoder, prompt encoder and mask decoder.

    `sparsesam_jax.Sam` is this model and its weights files.

    Args:
        config: Shape of the model; `sparsesam_jax.PRESETS` holds the published ones.
        sparsity: What the image encoder keeps; None is dense, SAM exactly.
        dtype: Compute dtype: float32, bfloat16 or float16.
        param_dtype: Dtype of the parameters; None is float32.
        residual_dtype: Dtype of the image encoder's residual stream; None is float16 where
            bfloat16 is computed in, else the compute dtype. See `layers.DTypes`.
        implementation: `"xla"`, `"mosaic_gpu"` or `"auto"`, see `pallas_kernels.implementation`.
        remat: Whether a gradient computes each block of the image encoder again instead of keeping
            what is inside of it.
        products: In what the image encoder's blocks multiply: `"dtype"`, the compute dtype, or
            `"float8"`, which has no gradient, see `model.float8`.
        float8_layers: Patterns of the layers in float8, `("*", "!0.*", "!*.lin2")` for all but
            those of the first block and the second of every MLP; None is all.
        rngs: Source of the initial parameters.
    """

    def __init__(
        self,
        config: SamConfig,
        *,
        sparsity: Sparsity | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        residual_dtype: DTypeLike | None = None,
        implementation: Implementation = "auto",
        remat: bool = False,
        products: Products = "dtype",
        float8_layers: Sequence[str] | None = None,
        rngs: nnx.Rngs,
    ):
        param = jnp.float32 if param_dtype is None else param_dtype
        dtypes = DTypes(dtype, param, residual_dtype)
        self.config = config
        self.image_encoder = ImageEncoder(
            config.image_encoder,
            sparsity=sparsity,
            dtypes=dtypes,
            implementation=implementation,
            remat=remat,
            products=products,
            float8_layers=float8_layers,
            rngs=rngs,
        )
        self.prompt_encoder = PromptEncoder(config, dtypes=dtypes, rngs=rngs)
        self.mask_decoder = MaskDecoder(config, dtypes=dtypes, rngs=rngs)

    @classmethod
    def abstract(cls: type[Model], config: SamConfig, **options: Any) -> Model:
        """The model with shapes for parameters: nothing is allocated. Options as for `Sam`."""
        return nnx.eval_shape(lambda: cls(config, rngs=_OneKey(), **options))

    def with_sparsity(self: Model, sparsity: Sparsity | None) -> Model:
        """The same model, sharing its parameters, with another sparsity; None is dense."""
        model = nnx.merge(*nnx.split(self))
        model.image_encoder.set_sparsity(sparsity)
        return model

    def encode(
        self,
        pixels: Float[Array, "B height width 3"],
        tables: Sequence[AttentionTables | None] = (),
        frame: Grid | None = None,
    ) -> ImageEmbedding:
        """Encode normalised, padded images; arguments as `ImageEncoder.__call__`."""
        outputs = self.image_encoder.block_outputs(pixels, tables, frame)
        features = self.image_encoder.neck_features(outputs[-1])
        first = min(self.config.image_encoder.global_attn_indexes, default=0)
        early = outputs[first].astype(features.dtype) if self.config.hq else None
        return ImageEmbedding(features, early)

    def decode(
        self,
        embedding: ImageEmbedding,
        points: Float[Array, "B P T 2"],
        labels: Labels,
        mask_input: Float[Array, "B P h w"] | None = None,
        *,
        multimask_output: bool = True,
        hq_token_only: bool = False,
        frame: Grid | None = None,
    ) -> tuple[Float[Array, "B P K h w"], Float[Array, "B P K"]]:
        """Masks for prompts in the padded input's frame.

        Args:
            embedding: What `encode` returned.
            points: (x, y) in pixels of the padded input.
            labels: 1 foreground, 0 background, 2 and 3 a box's top-left and bottom-right corner,
                -1 the point that SAM adds to points without a box, -2 absent, -10 transformers'
                padding (a token of zeros, as there).
            mask_input: Mask logits of an earlier prediction.
            multimask_output: Whether to return the proposals instead of the single-mask output.
            hq_token_only: SAM-HQ: its own mask alone instead of the sum with SAM's.
            frame: The one that `encode` was given.

        Returns:
            Mask logits at four times the features' resolution and predicted IoU, float32.
        """
        labels = labels.astype(jnp.int32)
        rows, cols = embedding.features.shape[1:3]
        grid, patch = (rows, cols), self.config.image_encoder.patch_size
        batch, prompts, _ = labels.shape
        if not batch * prompts:
            masks = self.config.masks_per_prompt(multimask_output)
            return jnp.zeros((batch, prompts, masks, 4 * rows, 4 * cols)), jnp.zeros(
                (batch, prompts, masks)
            )
        frame = frame or grid
        tokens, dense = self.prompt_encoder(
            points,
            labels,
            mask_input,
            image_size=(frame[0] * patch, frame[1] * patch),
            grid=grid,
        )
        return self.mask_decoder(
            embedding.features,
            self.prompt_encoder.dense_position(frame)[:rows, :cols],
            tokens,
            labels != ABSENT,
            dense,
            multimask_output=multimask_output,
            early_features=embedding.early_features,
            hq_token_only=hq_token_only,
        )

    def __call__(
        self,
        images: Num[Array, "B height width 3"],
        points: Float[Array, "B P T 2"],
        labels: Labels,
        mask_input: Float[Array, "B P h w"] | None = None,
        *,
        image_size: int | None = None,
        padding: Padding = "square",
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Prediction:
        """Segment images: one pure function, pre- and postprocessing included, for `jax.jit`.

        Args:
            images: RGB, 0 to 255, any size.
            points: (x, y) in pixels of the images; box corners are points too.
            labels: As for `decode`; prompts of a batch are filled up to a common length with -2.
                Points without a box get the point that SAM adds by themselves.
            mask_input: Low-resolution logits of an earlier prediction.
            image_size: Side of the padded input; None is the configuration's.
            padding: `square` as SAM pads, or `crop`, which leaves out whole rows or columns of
                blocks of 8 tokens that would hold padding alone.
            multimask_output: Whether to return the proposals instead of the single-mask output.
            return_logits: Whether `masks` holds logits instead of booleans.
        """
        image_size = image_size or self.config.image_encoder.image_size
        height, width = images.shape[1:3]
        original, size = (height, width), resized_shape(height, width, image_size)
        pixels, frame = preprocess(images, image_size), None
        check_choice("padding", padding, Padding)
        if padding == "crop":
            patch = self.config.image_encoder.patch_size
            frame = (image_size // patch, image_size // patch)
            crop = crop_shape(size, image_size, patch)
            pixels = pixels[:, : crop[0], : crop[1]]
        embedding = self.encode(pixels, frame=frame)
        points, labels = add_padding_point(scale_points(points, original, size), labels)
        low_res, iou = self.decode(
            embedding, points, labels, mask_input, multimask_output=multimask_output, frame=frame
        )
        low_height, low_width = low_res.shape[-2:]
        rows, cols = mask_resize_matrices(
            (low_height, low_width), (pixels.shape[1], pixels.shape[2]), size, original
        )
        precision = jax.lax.Precision.HIGHEST
        masks = jnp.einsum("yh,bpkhw,xw->bpkyx", rows, low_res, cols, precision=precision)
        masks = masks if return_logits else masks > MASK_THRESHOLD
        return Prediction(masks, iou, low_res)


class _OneKey(nnx.Rngs):
    """The same key for every parameter, for models of which only the shapes are wanted.

    `nnx.Rngs` counts the keys it gives, and tracing the counters makes the construction of an
    abstract model several times slower.
    """

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> Array:
        return self.key


def scale_points(
    points: Num[Array, "*batch 2"], original: Sequence[int], resized: Sequence[int]
) -> Float[Array, "*batch 2"]:
    """Points (x, y) of an image in the frame of its resized version; sizes are (height, width)."""
    scale = jnp.array([resized[1] / original[1], resized[0] / original[0]], jnp.float32)
    return points * scale


def add_padding_point(
    points: Float[Array, "*batch T 2"], labels: Num[Array, "*batch T"] | Bool[Array, "*batch T"]
) -> tuple[Float[Array, "*batch T+1 2"], Int[Array, "*batch T+1"]]:
    """Give every prompt that has points but no box the extra point that SAM adds to those."""
    labels = labels.astype(jnp.int32)  # in a bool or an unsigned integer, -1 is another label
    has_points = ((labels < BOX_TOP_LEFT) & (labels != ABSENT)).any(-1, keepdims=True)
    has_box = (labels >= BOX_TOP_LEFT).any(-1, keepdims=True)
    extra = jnp.where(has_points & ~has_box, NOT_A_POINT, ABSENT)
    extra_point = jnp.zeros((*points.shape[:-2], 1, 2), points.dtype)
    points = jnp.concatenate([points, extra_point], axis=-2)
    return points, jnp.concatenate([labels, extra], axis=-1)
