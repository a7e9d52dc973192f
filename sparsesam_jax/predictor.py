"""`SamPredictor`: the interface SAM's users know, over jitted encode and decode functions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from sparsesam_jax.prompt_encoder import (
    ABSENT,
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    NOT_A_POINT,
)
from sparsesam_jax.sam import ImageEmbedding, Sam
from sparsesam_jax.transforms import (
    MASK_THRESHOLD,
    mask_resize_matrices,
    normalise,
    resize_and_pad,
)

Masks = tuple[np.ndarray, np.ndarray, np.ndarray]
_MIN_POINTS = 4  # one point, one box, or both: the common prompts share one compilation


class SamPredictor:
    """Embeds an image once and predicts masks for any number of prompts.

    Everything traced has static shapes: images are padded to `image_size`, prompts to a power of
    two. Whatever the photos' sizes, the encoder compiles once per batch size.

    Args:
        sam: The model; its parameters are read once, here.
        image_size: Side of the padded input; None is the model's own.

    Raises:
        ValueError: `image_size` is no multiple of the patch size.
    """

    def __init__(self, sam: Sam, image_size: int | None = None):
        encoder = sam.config.image_encoder
        image_size = image_size or encoder.image_size
        if image_size < 1 or image_size % encoder.patch_size:
            raise ValueError(
                f"image_size must be a multiple of {encoder.patch_size}, got {image_size}"
            )
        self.sam = sam
        self.image_size = image_size
        # The decoder alone, so that models that differ in the encoder's sparsity share its
        # compilation.
        decoder = nnx.merge(*nnx.split(sam))
        del decoder.image_encoder
        self._encoder, self._decoder = _Program.of(sam), _Program.of(decoder)
        self.reset_image()

    def reset_image(self) -> None:
        """Forget the image."""
        self._embedding: ImageEmbedding | None = None
        self._sizes: list[_Sizes] = []

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
        padded, sizes = [], []
        for image in images:
            check_image(image)
            rgb = image if image_format == "RGB" else image[..., ::-1]
            pixels, resized = resize_and_pad(np.ascontiguousarray(rgb), self.image_size)
            padded.append(pixels)
            sizes.append(_Sizes(image.shape[:2], resized))
        self._embedding = _encode(
            self._encoder.graph,
            self._encoder.state,
            np.stack(padded),
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
            prompts, each has a leading axis of P.

        Raises:
            RuntimeError: No image is set, or a batch is.
            ValueError: A prompt has the wrong shape or labels.
        """
        if len(self._sizes) > 1:
            raise RuntimeError("predict needs one image; after set_image_batch use predict_batch")
        prompt = _Prompt(point_coords, point_labels, box, mask_input)
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
        prompts = [_Prompt(*prompt) for prompt in zip(*columns, strict=True)]
        results = self._predict(prompts, multimask_output, return_logits, hq_token_only)
        masks, iou, low_res = (list(field) for field in zip(*results, strict=True))
        return masks, iou, low_res

    def _require_embedding(self) -> ImageEmbedding:
        if self._embedding is None:
            raise RuntimeError("no image is set: call set_image before")
        return self._embedding

    def _predict(
        self,
        prompts: list[_Prompt],
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
        points, labels, mask_input = _pad_together(arrays)
        low_res, iou = _decode(
            self._decoder.graph,
            self._decoder.state,
            embedding,
            points,
            labels,
            mask_input,
            multimask_output=multimask_output,
            hq_token_only=hq_token_only,
        )
        low_res, iou = np.asarray(low_res), np.asarray(iou)
        results = []
        for index, (prompt, sizes) in enumerate(zip(prompts, self._sizes, strict=True)):
            count = len(arrays[index].labels)
            logits = low_res[index, :count]
            rows, cols = mask_resize_matrices(
                low_res_size, (self.image_size, self.image_size), sizes.resized, sizes.original
            )
            # Prompt by prompt, so that only one prompt's logits exist at the photo's size.
            resized = (rows @ prompt_logits @ cols.T for prompt_logits in logits)
            masks = [x if return_logits else x > MASK_THRESHOLD for x in resized]
            result = (np.stack(masks), iou[index, :count], logits)
            single = not prompt.is_batched
            results.append(tuple(x[0] for x in result) if single else result)
        return results


class _Program(NamedTuple):
    """A model taken apart for a jitted function."""

    graph: _Graph
    state: nnx.State

    @classmethod
    def of(cls, model: nnx.Module) -> _Program:
        graphdef, state = nnx.split(model)
        return cls(_Graph(graphdef), state)


class _Sizes(NamedTuple):
    original: tuple[int, int]
    resized: tuple[int, int]


class _PromptArrays(NamedTuple):
    points: Float[np.ndarray, "P T 2"]
    labels: Int[np.ndarray, "P T"]
    mask_input: Float[np.ndarray, "P h w"] | None


class _Prompt(NamedTuple):
    """The prompts of one image as `predict` takes them."""

    point_coords: np.ndarray | None
    point_labels: np.ndarray | None
    box: np.ndarray | None
    mask_input: np.ndarray | None

    @property
    def is_batched(self) -> bool:
        """Whether the prompts came with a leading axis."""
        ranks = ((self.point_coords, 3), (self.box, 2), (self.mask_input, 4))
        return any(x is not None and np.ndim(x) == rank for x, rank in ranks)

    def arrays(self, sizes: _Sizes, low_res_size: tuple[int, int]) -> _PromptArrays:
        """Points (box corners included), labels and mask input, checked, in the input's frame."""
        points, labels = self._points()
        if self.box is not None:
            corners = np.asarray(self.box, np.float64)
            if corners.shape[-1:] != (4,) or corners.ndim > 2:
                raise ValueError(f"box must be [4] or [P, 4], got shape {corners.shape}")
            corners = corners.reshape(-1, 2, 2)
            count = max(len(points), len(corners))
            if not {len(points), len(corners)} <= {1, count}:
                raise ValueError(
                    f"point_coords and box must be for as many prompts, "
                    f"got {len(points)} and {len(corners)}"
                )
            points, labels, corners = (
                np.broadcast_to(x, (count, *x.shape[1:])) for x in (points, labels, corners)
            )
            corner_labels = np.broadcast_to([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], (count, 2))
            points = np.concatenate([points, corners], 1)
            labels = np.concatenate([labels, corner_labels], 1)
        elif labels.shape[1]:  # SAM gives points that come without a box one more
            points = np.pad(points, ((0, 0), (0, 1), (0, 0)))
            labels = np.pad(labels, ((0, 0), (0, 1)), constant_values=NOT_A_POINT)
        scale = np.divide(sizes.resized[::-1], sizes.original[::-1])
        return _PromptArrays(
            (points * scale).astype(np.float32),
            labels.astype(np.int32),
            self._mask_input(len(points), low_res_size),
        )

    def _points(self) -> tuple[np.ndarray, np.ndarray]:
        if self.point_coords is None or np.size(self.point_coords) == 0:
            if np.size(self.point_labels if self.point_labels is not None else ()):
                raise ValueError("point_labels must come with point_coords, got labels alone")
            return np.zeros((1, 0, 2)), np.zeros((1, 0), np.int32)
        points = np.asarray(self.point_coords, np.float64)
        if points.ndim not in (2, 3) or points.shape[-1] != 2:
            raise ValueError(f"point_coords must be [T, 2] or [P, T, 2], got shape {points.shape}")
        if self.point_labels is None:
            raise ValueError("point_labels must be given with point_coords, got None")
        labels = np.asarray(self.point_labels)
        if labels.shape != points.shape[:-1]:
            raise ValueError(
                f"point_labels must have the shape {points.shape[:-1]}, got {labels.shape}"
            )
        if not np.isin(labels, (NOT_A_POINT, BACKGROUND, FOREGROUND)).all():
            raise ValueError(f"point_labels must be 1 or 0, got {sorted(set(labels.flat))}")
        return points.reshape(-1, *points.shape[-2:]), labels.reshape(-1, labels.shape[-1])

    def _mask_input(self, count: int, low_res_size: tuple[int, int]) -> np.ndarray | None:
        if self.mask_input is None:
            return None
        mask = np.asarray(self.mask_input, np.float32)
        expected = (1, *low_res_size)
        if mask.shape[-3:] != expected or mask.ndim not in (3, 4):
            raise ValueError(
                f"mask_input must be {list(expected)} or [P, {', '.join(map(str, expected))}], "
                f"got shape {mask.shape}"
            )
        mask = mask.reshape(-1, *low_res_size)
        if len(mask) not in (1, count):
            raise ValueError(f"mask_input must be for {count} prompts, got {len(mask)}")
        return np.broadcast_to(mask, (count, *low_res_size))


def _pad_together(arrays: list[_PromptArrays]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The prompts of a batch at one shape: absent points and unused prompts fill up."""
    prompts = _power_of_two(max(len(a.labels) for a in arrays))
    length = max(_MIN_POINTS, _power_of_two(max(a.labels.shape[1] for a in arrays)))
    points = np.zeros((len(arrays), prompts, length, 2), np.float32)
    labels = np.full((len(arrays), prompts, length), ABSENT, np.int32)
    for index, a in enumerate(arrays):
        count, size = a.labels.shape
        points[index, :count, :size] = a.points
        labels[index, :count, :size] = a.labels
    given = [a.mask_input for a in arrays if a.mask_input is not None]
    if not given:
        return points, labels, None
    if len(given) != len(arrays):
        raise ValueError(
            f"mask_input must be given for all images or none, got {len(given)} of {len(arrays)}"
        )
    masks = np.zeros((len(arrays), prompts, *given[0].shape[1:]), np.float32)
    for index, mask in enumerate(given):
        masks[index, : len(mask)] = mask
    return points, labels, masks


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


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
    """A model's graph as a static argument, hashed once: hashing takes milliseconds."""

    def __init__(self, graphdef: nnx.GraphDef):
        self.graphdef = graphdef
        self._hash = hash(graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Graph) and self.graphdef == other.graphdef)


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: _Graph, state: nnx.State, padded: Array, sizes: Array) -> ImageEmbedding:
    return nnx.merge(graph.graphdef, state).encode(normalise(padded, sizes))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("multimask_output", "hq_token_only"))
def _decode(
    graph: _Graph,
    state: nnx.State,
    embedding: ImageEmbedding,
    points: Array,
    labels: Array,
    mask_input: Array | None,
    *,
    multimask_output: bool,
    hq_token_only: bool,
) -> tuple[Array, Array]:
    low_res, iou = nnx.merge(graph.graphdef, state).decode(
        embedding,
        points,
        labels,
        mask_input,
        multimask_output=multimask_output,
        hq_token_only=hq_token_only,
    )
    return low_res.astype(jnp.float32), iou
