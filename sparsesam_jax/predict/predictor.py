"""`SamPredictor`: the interface SAM's users know, over jitted encode and decode functions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.model import transforms as host_transforms
from sparsesam_jax.model.image_encoder import AttentionTables
from sparsesam_jax.model.sam import ImageEmbedding
from sparsesam_jax.model.transforms import normalise
from sparsesam_jax.predict import device_transforms
from sparsesam_jax.predict.prompt_arrays import ImagePrompt, ImageSizes, pad_together

Masks = tuple[np.ndarray, np.ndarray, np.ndarray]
Transforms = Literal["auto", "host", "device"]


class SamPredictor:
    """Embeds an image once and predicts masks for any number of prompts.

    Everything traced has static shapes: images are padded to `image_size`, prompts to a power of
    two. Whatever the photos' sizes, the encoder compiles once per batch size.

    Args:
        sam: The model; its parameters are read once, here.
        image_size: Side of the padded input; None is the model's own.
        transforms: Where photos are resized, to the same pixels, and masks to the photo's size:
            on the `host`, on the `device`, or `auto`, on the device where that is no CPU. Those
            of the device are read-only in pinned memory: copy what you keep for long.

    Raises:
        ValueError: `image_size` is no multiple of the patch size, or `transforms` is unknown.
    """

    def __init__(self, sam: Sam, image_size: int | None = None, *, transforms: Transforms = "auto"):
        if transforms not in get_args(Transforms):
            expected = ", ".join(get_args(Transforms))
            raise ValueError(f"transforms must be one of {expected}; got {transforms!r}")
        encoder = sam.config.image_encoder
        image_size = image_size or encoder.image_size
        if image_size < 1 or image_size % encoder.patch_size:
            raise ValueError(
                f"image_size must be a multiple of {encoder.patch_size}, got {image_size}"
            )
        self.sam = sam
        self.image_size = image_size
        host = transforms == "host" or (transforms == "auto" and jax.default_backend() == "cpu")
        self.transforms = host_transforms if host else device_transforms
        # The decoder alone, so that models that differ in the encoder's sparsity share its
        # compilation.
        decoder = nnx.merge(*nnx.split(sam))
        del decoder.image_encoder
        self._encoder, self._decoder = _Program.of(sam), _Program.of(decoder)
        side = image_size // encoder.patch_size
        self._tables = sam.image_encoder.tables((side, side))
        self.reset_image()

    def reset_image(self) -> None:
        """Forget the image."""
        self._embedding: ImageEmbedding | None = None
        self._sizes: list[ImageSizes] = []

    @property
    def is_image_set(self) -> bool:
        """Whether an image (or a batch) has been embedded."""
        return self._embedding is not None

    def set_image(
        self,
        image: UInt8[np.ndarray, "height width 3"],
        image_format: Literal["RGB", "BGR"] = "RGB",
    ) -> None:
        """Embed an image for `predict`.

        Args:
            image: Pixels 0 to 255, any size.
            image_format: Order of the colours.

        Raises:
            ValueError: The image is no uint8 [height, width, 3] array, or the format is unknown.
        """
        self.set_image_batch([image], image_format)

    def set_image_batch(
        self,
        images: Sequence[UInt8[np.ndarray, "height width 3"]],
        image_format: Literal["RGB", "BGR"] = "RGB",
    ) -> None:
        """Embed several images, of any sizes, at once for `predict_batch`.

        Raises:
            ValueError: As `set_image`, or there is no image.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        if not images:
            raise ValueError("images must hold at least one image, got none")
        self.reset_image()
        resize = self.transforms.resize_and_pad
        padded, sizes = [], []
        for image in images:
            check_image(image)
            rgb = image if image_format == "RGB" else image[..., ::-1]
            pixels, resized = resize(np.ascontiguousarray(rgb), self.image_size)
            padded.append(pixels)
            sizes.append(ImageSizes(image.shape[:2], resized))
        self._embedding = _encode(
            self._encoder.graph,
            self._encoder.leaves,
            self._tables,
            padded,
            np.array([s.resized for s in sizes], np.int32),
        )
        self._sizes = sizes

    def get_image_embedding(self) -> Float[Array, "B Gh Gw C"]:
        """The features of the image (or batch) that is set.

        Raises:
            RuntimeError: No image is set.
        """
        return self._require_embedding().features

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> Masks:
        """Predict masks for the image that is set.

        Args:
            point_coords: (x, y) in pixels of the image, [T, 2]; or [P, T, 2] for P prompts.
            point_labels: 1 foreground, 0 background, [T] or [P, T].
            box: (x0, y0, x1, y1) in pixels of the image, [4] or [P, 4].
            mask_input: Low-resolution logits of an earlier prediction, [1, h, w] or [P, 1, h, w].
            multimask_output: Whether to return the proposals for an ambiguous prompt instead of
                one mask.
            return_logits: Whether to return logits instead of boolean masks.
            hq_token_only: SAM-HQ: its own mask alone instead of the sum with SAM's.

        Returns:
            Masks [K, height, width], predicted IoU [K] and low-resolution logits [K, h, w]; with P
            prompts, each has a leading axis of P. Read-only where they come from the device.

        Raises:
            RuntimeError: No image is set, or a batch is.
            ValueError: A prompt has the wrong shape or labels.
        """
        if len(self._sizes) > 1:
            raise RuntimeError("predict needs one image; after set_image_batch use predict_batch")
        prompt = ImagePrompt(point_coords, point_labels, box, mask_input)
        return self._predict([prompt], multimask_output, return_logits, hq_token_only)[0]

    def predict_batch(
        self,
        point_coords_batch: Sequence[np.ndarray | None] | None = None,
        point_labels_batch: Sequence[np.ndarray | None] | None = None,
        box_batch: Sequence[np.ndarray | None] | None = None,
        mask_input_batch: Sequence[np.ndarray | None] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Predict masks for every image that `set_image_batch` set, in one decoder call.

        Args:
            point_coords_batch: For each image what `predict` takes as `point_coords`; likewise
                the next three.
            point_labels_batch: See `predict`.
            box_batch: See `predict`.
            mask_input_batch: See `predict`; given for all images or for none.
            multimask_output: See `predict`.
            return_logits: See `predict`.
            hq_token_only: See `predict`.

        Returns:
            Lists over the images of what `predict` returns.

        Raises:
            RuntimeError: No image is set.
            ValueError: As `predict`, or a list has another length than the batch.
        """
        self._require_embedding()
        count = len(self._sizes)
        columns = []
        for name, values in (
            ("point_coords_batch", point_coords_batch),
            ("point_labels_batch", point_labels_batch),
            ("box_batch", box_batch),
            ("mask_input_batch", mask_input_batch),
        ):
            if values is not None and len(values) != count:
                raise ValueError(
                    f"{name} must have one entry an image ({count}), got {len(values)}"
                )
            columns.append([None] * count if values is None else values)
        prompts = [ImagePrompt(*prompt) for prompt in zip(*columns, strict=True)]
        results = self._predict(prompts, multimask_output, return_logits, hq_token_only)
        masks, iou, low_res = (list(field) for field in zip(*results, strict=True))
        return masks, iou, low_res

    def _require_embedding(self) -> ImageEmbedding:
        if self._embedding is None:
            raise RuntimeError("no image is set: call set_image before")
        return self._embedding

    def _predict(
        self,
        prompts: list[ImagePrompt],
        multimask_output: bool,
        return_logits: bool,
        hq_token_only: bool,
    ) -> list[Masks]:
        embedding = self._require_embedding()
        _, rows, cols, _ = embedding.features.shape
        low_res_size = (4 * rows, 4 * cols)
        arrays = [
            prompt.arrays(sizes, low_res_size)
            for prompt, sizes in zip(prompts, self._sizes, strict=True)
        ]
        points, labels, mask_input = pad_together(arrays)
        low_res, iou = _decode(
            self._decoder.graph,
            self._decoder.leaves,
            embedding,
            points,
            labels,
            mask_input,
            multimask_output=multimask_output,
            hq_token_only=hq_token_only,
        )
        resize = self.transforms.resize_masks
        counts = [len(a.labels) for a in arrays]
        side = (self.image_size, self.image_size)
        masks = [
            resize(x, count, side, *sizes[::-1], return_logits=return_logits)
            for x, count, sizes in zip(low_res, counts, self._sizes, strict=True)
        ]
        if self.transforms is device_transforms:
            low_res = device_transforms.pinned(low_res)
        low_res, iou = np.asarray(low_res), np.asarray(iou)
        results = []
        for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            result = (masks[index], iou[index, :count], low_res[index, :count])
            single = not prompt.is_batched
            results.append(tuple(x[0] for x in result) if single else result)
        return results


class _Program(NamedTuple):
    """A model taken apart for a jitted function; a flat list is what JAX takes fastest."""

    graph: _Graph
    leaves: list[Array]

    @classmethod
    def of(cls, model: nnx.Module) -> _Program:
        graphdef, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)
        return cls(_Graph(graphdef, tree), leaves)


def check_image(image: object) -> None:
    """Raise ValueError unless this is an RGB image as `set_image` takes it."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image must be a uint8 array, got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {image.shape}"
        raise ValueError(f"image must be a uint8 array [height, width, 3], got {got}")
    if not image.size:
        raise ValueError(f"image must have pixels, got shape {image.shape}")


class _Graph:
    """A model's structure as a static argument, hashed once: hashing takes milliseconds."""

    def __init__(self, graphdef: nnx.GraphDef, tree: Any):
        self._parts = (graphdef, tree)
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Graph) and self._parts == other._parts)

    def merge(self, leaves: list[Array]) -> Any:
        """The model with these parameters."""
        graphdef, tree = self._parts
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


@functools.partial(jax.jit, static_argnums=0)
def _encode(
    graph: _Graph,
    leaves: list[Array],
    tables: tuple[AttentionTables, ...],
    padded: list[Array],
    sizes: Array,
) -> ImageEmbedding:
    return graph.merge(leaves).encode(normalise(jnp.stack(padded), sizes), tables)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("multimask_output", "hq_token_only"))
def _decode(
    graph: _Graph,
    leaves: list[Array],
    embedding: ImageEmbedding,
    points: Array,
    labels: Array,
    mask_input: Array | None,
    *,
    multimask_output: bool,
    hq_token_only: bool,
) -> tuple[Array, Array]:
    low_res, iou = graph.merge(leaves).decode(
        embedding,
        points,
        labels,
        mask_input,
        multimask_output=multimask_output,
        hq_token_only=hq_token_only,
    )
    return low_res.astype(jnp.float32), iou
