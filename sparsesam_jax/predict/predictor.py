"""`SamPredictor`: the interface SAM's users know, over a compiled encoder and decoder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num, UInt8

from sparsesam_jax.choices import Padding, check_choice
from sparsesam_jax.config import Grid
from sparsesam_jax.model import transforms as host_transforms
from sparsesam_jax.model.compiled import CompiledSam
from sparsesam_jax.model.sam import SamModel
from sparsesam_jax.model.transforms import crop_shape, resized_shape
from sparsesam_jax.predict import device_transforms
from sparsesam_jax.predict.chunks import PROMPTS, PROMPTS_ON_CPU, Call, Masks, Result, calls
from sparsesam_jax.predict.embedding import Embedding, fingerprint
from sparsesam_jax.predict.mask_formats import MaskFormat, check_mask_format
from sparsesam_jax.predict.prompt_arrays import (
    MIN_POINTS,
    ImagePrompt,
    ImageSizes,
    PromptArrays,
    pad_together,
    power_of_two,
)

Transforms = Literal["auto", "host", "device"]


class SetImages(NamedTuple):
    """The images that are set, together with their places in the caller's order.

    Attributes:
        embeddings: One, or with `padding="crop"` one a group of images of one grid.
        places: Of each embedding's images.
    """

    embeddings: tuple[Embedding, ...]
    places: tuple[Sequence[int], ...]

    @property
    def num_images(self) -> int:
        """How many images there are."""
        return sum(map(len, self.places))


class SamPredictor:
    """Embeds an image once and predicts masks for any number of prompts.

    Everything traced has static shapes: images are padded to `image_size`, and prompts are decoded
    in chunks that are filled up to a power of two. Whatever the photos' sizes, the encoder compiles
    once per batch size, or with `padding="crop"` once per batch size and shape of grid.

    The parameters are those that the model has when the predictor is made; `refresh` takes them
    anew. Predictors pickle and deep-copy, and travel to workers that are spawned; a forked process
    cannot use JAX. Threads may share one, for an image is set in one step: a prediction is of the
    image that was set last when it began. A thread that sets images of its own takes
    `copy.copy(predictor)`, which shares parameters and programs.

    Args:
        sam: The model; one without image encoder (`Sam.decoder_from_pretrained`) for embeddings.
        image_size: Side of the padded input; None is the model's own.
        transforms: Where photos are resized, to the same pixels, and masks to the photo's size:
            on the `host`, on the `device`, or `auto`, on the device where that is no CPU. Masks
            and logits of the device are read-only in pinned memory: copy what you keep for long.

        padding: `square`, as SAM pads, or `crop`: what would be padding alone is left out, by
            whole blocks of 8 tokens. Positions stay those of the square. Of a batch, images of one
            grid are encoded and decoded together.

    Raises:
        ValueError: `image_size` is no multiple of the patch size, or `transforms` or `padding` is
            unknown.
    """

    def __init__(
        self,
        sam: SamModel,
        image_size: int | None = None,
        *,
        transforms: Transforms = "auto",
        padding: Padding = "square",
    ):
        check_choice("padding", padding, Padding)
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
        self.padding: Padding = padding
        self.on_device = transforms == "device" or (
            transforms == "auto" and jax.default_backend() != "cpu"
        )
        self.refresh()

    def refresh(self) -> None:
        """Take the model's parameters anew, after they were changed; the image is forgotten."""
        self.compiled = CompiledSam(self.sam)
        self._fingerprint: str | None = None
        self.reset_image()

    def without_encoder(self) -> Self:
        """The same predictor for embeddings alone, to be sent where the encoder is not needed."""
        other = object.__new__(type(self))
        sam = nnx.merge(*nnx.split(self.sam))
        if hasattr(sam, "image_encoder"):
            del sam.image_encoder
        other.__dict__.update(self.__dict__, sam=sam, compiled=self.compiled.without_encoder())
        return other

    def reset_image(self) -> None:
        """Forget the image."""
        self._images: SetImages | None = None

    @property
    def is_image_set(self) -> bool:
        """Whether an image (or a batch) has been embedded."""
        return self._images is not None

    @property
    def fingerprint(self) -> str:
        """Of the prompt encoder and the mask decoder, see `predict.embedding.fingerprint`."""
        if self._fingerprint is None:
            encoder = getattr(self.sam, "image_encoder", None)
            products = "dtype" if encoder is None else encoder.products
            arguments = (self.compiled.config, self.compiled.decoder_leaves, products)
            self._fingerprint = fingerprint(*arguments)
        return self._fingerprint

    @property
    def embedding(self) -> Embedding:
        """The image (or batch) that is set, as a thing to keep, to save and to set again.

        Raises:
            RuntimeError: No image is set, or images of several grids are.
            ValueError: Set to an embedding that another decoder's model has made.
        """
        first, *others = self._require_images().embeddings
        if others:
            raise RuntimeError(
                "images of several grids are set (padding='crop') and have no common embedding: "
                "`embeddings` has one an image"
            )
        return first

    @embedding.setter
    def embedding(self, embedding: Embedding) -> None:
        if not embedding.is_for(self.fingerprint):
            raise ValueError(
                f"embedding must be for this predictor's decoder ({self.fingerprint}), "
                f"got one for {embedding.fingerprint}"
            )
        features, early = (
            None if x is None else jnp.asarray(x, self.compiled.dtype) for x in embedding.arrays
        )
        assert features is not None
        embedding = dataclasses.replace(embedding, features=features, early_features=early)
        self._images = SetImages((embedding,), (range(len(embedding.sizes)),))

    @property
    def embeddings(self) -> list[Embedding]:
        """The embedding of each image that is set, also where they have several grids.

        Raises:
            RuntimeError: No image is set.
        """
        images = self._require_images()
        singles = [
            (place, embedding[index])
            for embedding, places in zip(*images, strict=True)
            for index, place in enumerate(places)
        ]
        return [single for _, single in sorted(singles, key=lambda pair: pair[0])]

    def set_embedding(self, embedding: Embedding) -> None:
        """Set an embedding instead of an image, for instance `EmbeddingStore("store")[0]`.

        Raises:
            ValueError: Another decoder's model has made it.
        """
        self.embedding = embedding

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
            RuntimeError: The predictor has no image encoder.
        """
        self.set_image_batch([image], image_format)

    def set_image_batch(
        self,
        images: Iterable[UInt8[np.ndarray, "height width 3"]],
        image_format: Literal["RGB", "BGR"] = "RGB",
    ) -> None:
        """Embed several images, of any sizes, at once for `predict_batch`.

        Raises:
            ValueError: As `set_image`, or there is no image.
            RuntimeError: As `set_image`.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        if isinstance(images, np.ndarray) and images.ndim == 3:
            raise ValueError(f"images must be several images, got one of shape {images.shape}")
        images = [check_image(image) for image in images]
        if not images:
            raise ValueError("images must hold at least one image, got none")
        padded, sizes = [], []
        for image in images:
            rgb = image if image_format == "RGB" else image[..., ::-1]
            pixels, resized = self.transforms.resize_and_pad(
                np.ascontiguousarray(rgb), self.image_size
            )
            padded.append(pixels)
            sizes.append(ImageSizes((image.shape[0], image.shape[1]), resized))
        groups = self._groups(sizes)
        embeddings = [
            self._embed([padded[i] for i in places], [sizes[i] for i in places])
            for places in groups
        ]
        # One assignment, so that no thread ever sees one image's features with another's size.
        self._images = SetImages(tuple(embeddings), tuple(groups))
        # From here on the images may be written to: until now the device may have read them.
        jax.block_until_ready(padded)

    def grid(self, size: tuple[int, int]) -> Grid:
        """Rows and columns of the features of an image of this height and width."""
        patch, side = self.compiled.config.image_encoder.patch_size, self.image_size
        if self.padding == "square":
            return side // patch, side // patch
        height, width = crop_shape(resized_shape(*size, side), side, patch)
        return height // patch, width // patch

    def embed_resized_images(
        self,
        images: Sequence[Num[np.ndarray, "height width 3"]],
        original_sizes: Sequence[tuple[int, int]],
    ) -> Embedding:
        """The embedding of images that have been resized already; it is not set.

        With `padding="crop"` they share the smallest grid that holds all of them.

        Args:
            images: RGB, 0 to 255 in any dtype; sides are at most `image_size`.
            original_sizes: Heights and widths that the images had before, and masks will have.

        Raises:
            ValueError: An image is larger, or has no pixels.
            RuntimeError: As `set_image`.
        """
        padded, sizes = [], []
        for image, original in zip(images, original_sizes, strict=True):
            height, width = image.shape[:2]
            if not (0 < height <= self.image_size and 0 < width <= self.image_size):
                raise ValueError(
                    f"a resized image must have sides of 1 to {self.image_size}, "
                    f"got shape {image.shape}"
                )
            edges = ((0, self.image_size - height), (0, self.image_size - width), (0, 0))
            padded.append(np.pad(image, edges))
            sizes.append(ImageSizes((int(original[0]), int(original[1])), (height, width)))
        return self._embed(padded, sizes)

    def get_image_embedding(self) -> Float[Array, "B Gh Gw C"]:
        """The features of the image (or batch) that is set.

        Raises:
            RuntimeError: No image is set, or images of several grids are.
        """
        return self.embedding.features  # pyright: ignore

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
        *,
        mask_format: MaskFormat = "binary",
    ) -> Masks:
        """Predict masks for the image that is set.

        Prompts may be arrays, lists, or tensors of PyTorch, of any dtype.

        Args:
            point_coords: (x, y) in pixels of the image, [T, 2]; or [P, T, 2] for P prompts, or
                [1, P, T, 2] as transformers has it.
            point_labels: 1 foreground, 0 background, [T], [P, T] or [1, P, T]; -10 fills prompts
                up as in transformers: a token of zeros, which is not the same as no point.
            box: (x0, y0, x1, y1) in pixels of the image. [4], [1, 4], [1, 1, 4] or [2, 2] is one
                prompt; [P, 4] or [1, P, 4] with P > 1 are P prompts.
            mask_input: Low-resolution logits of an earlier prediction, [1, h, w] or [P, 1, h, w].
            multimask_output: Whether to return the proposals for an ambiguous prompt instead of
                one mask.
            return_logits: Whether to return logits instead of boolean masks.
            hq_token_only: SAM-HQ: its own mask alone instead of the sum with SAM's.
            mask_format: `binary`; `packed`: eight pixels a byte; or `rle`: dictionaries as
                `pycocotools.mask.encode` returns them. See `predict.mask_formats`.

        Returns:
            Masks [K, height, width], predicted IoU [K] and low-resolution logits [K, h, w]; with P
            prompts, each has a leading axis of P, which may be 0. Masks and logits are read-only
            where they come from the device. As `rle`, masks are lists of K dictionaries.

        Raises:
            RuntimeError: No image is set, or a batch is.
            ValueError: A prompt has the wrong shape or labels, or the format is unknown.
        """
        images = self._require_images()
        if images.num_images > 1:
            raise RuntimeError("predict needs one image; after set_image_batch use predict_batch")
        prompt = ImagePrompt(point_coords, point_labels, box, mask_input)
        return self._predict(
            images,
            [prompt],
            multimask_output=multimask_output,
            return_logits=return_logits,
            hq_token_only=hq_token_only,
            mask_format=mask_format,
        )[0]

    def predict_batch(
        self,
        point_coords_batch: Sequence[np.ndarray | None] | None = None,
        point_labels_batch: Sequence[np.ndarray | None] | None = None,
        box_batch: Sequence[np.ndarray | None] | None = None,
        mask_input_batch: Sequence[np.ndarray | None] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
        *,
        mask_format: MaskFormat = "binary",
    ) -> tuple[list[Any], list[np.ndarray], list[np.ndarray]]:
        """Predict masks for every image that `set_image_batch` set.

        Args:
            point_coords_batch: For each image what `predict` takes as `point_coords`; likewise
                the next three.
            point_labels_batch: See `predict`.
            box_batch: See `predict`.
            mask_input_batch: See `predict`.
            multimask_output: See `predict`.
            return_logits: See `predict`.
            hq_token_only: See `predict`.
            mask_format: See `predict`.

        Returns:
            Lists over the images of what `predict` returns.

        Raises:
            RuntimeError: No image is set.
            ValueError: As `predict`, or a list has another length than the batch.
        """
        images = self._require_images()
        count = images.num_images
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
        results = self._predict(
            images,
            [ImagePrompt(*prompt) for prompt in zip(*columns, strict=True)],
            multimask_output=multimask_output,
            return_logits=return_logits,
            hq_token_only=hq_token_only,
            mask_format=mask_format,
        )
        masks, iou, low_res = (list(field) for field in zip(*results, strict=True))
        return masks, iou, low_res

    def predict_arrays(
        self,
        embedding: Embedding,
        arrays: Sequence[PromptArrays],
        *,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
        mask_format: MaskFormat = "binary",
    ) -> list[Masks]:
        """`predict` with prompts in the frame of the padded input, for every image.

        Args:
            embedding: Of the images.
            arrays: Each image's prompts.
            multimask_output: See `predict`.
            return_logits: See `predict`.
            hq_token_only: See `predict`.
            mask_format: See `predict`.

        Returns:
            For each image masks [P, K, height, width], predicted IoU [P, K] and low-resolution
            logits [P, K, h, w].
        """
        check_mask_format(mask_format, return_logits=return_logits)
        config, (rows, cols) = self.compiled.config, embedding.features.shape[1:3]
        num_masks = config.masks_per_prompt(multimask_output)
        patch = config.image_encoder.patch_size
        results = [
            Result(
                a.num_prompts,
                num_masks,
                sizes.original,
                (4 * rows, 4 * cols),
                mask_format,
                return_logits,
            )
            for a, sizes in zip(arrays, embedding.sizes, strict=True)
        ]

        def store(call: Call, low_res: Array, iou: Array) -> None:
            # The masks' programs are under way before anything of this call is waited for.
            logits, scores = (
                device_transforms.pinned([low_res, iou]) if self.on_device else (low_res, iou)
            )
            for place in range(call.images):
                image = call.image + place
                stop = min(call.start + call.prompts, arrays[image].num_prompts)
                count = max(0, stop - call.start)
                if not count:
                    continue
                masks = self.transforms.resize_masks(
                    low_res,
                    range(place * call.prompts, place * call.prompts + count),
                    (rows * patch, cols * patch),
                    *embedding.sizes[image][::-1],
                    return_logits=return_logits,
                    packing=results[image].packing,
                    out=results[image].room(call.start, count),
                )
                own = np.asarray(logits)[place, :count]
                # Arrays of the host are the caller's, to be written to; JAX's are nobody's.
                own = own if self.on_device else own.copy()
                own_scores = np.asarray(scores)[place, :count].copy()
                results[image].put(call.start, masks, own_scores, own)

        length = max([MIN_POINTS, *(power_of_two(a.labels.shape[1]) for a in arrays)])
        pending = None  # one call is decoded while the masks of the last come to the host
        for call in calls(arrays, self.prompts_at_once):
            parts = [
                a.part(call.start, call.start + call.prompts)
                for a in arrays[call.image : call.image + call.images]
            ]
            low_res, iou = self.compiled.decode(
                embedding.arrays,
                *pad_together(parts, call.prompts, length),
                first=None if call.images == len(arrays) else call.image,
                frame=embedding.frame,
                multimask_output=multimask_output,
                hq_token_only=hq_token_only,
            )
            if pending is not None:
                store(*pending)
            pending = call, low_res, iou
        if pending is not None:
            store(*pending)
        return [result.arrays() for result in results]

    @property
    def transforms(self) -> Any:
        """The functions that resize photos and masks: those of the device, or of the host."""
        return device_transforms if self.on_device else host_transforms

    @functools.cached_property
    def prompts_at_once(self) -> int:
        """Prompts of one decoder call at most."""
        device = min(self.compiled.decoder_leaves[0].devices(), key=lambda device: device.id)
        return PROMPTS_ON_CPU if device.platform == "cpu" else PROMPTS

    def _embed(self, padded: list[Any], sizes: list[ImageSizes]) -> Embedding:
        resized = np.array([size.resized for size in sizes], np.int32)
        crop, frame = self._crop(resized)
        encoded = self.compiled.encode_padded(padded, resized, crop)
        return Embedding(*encoded, tuple(sizes), self.fingerprint, frame)

    def _groups(self, sizes: Sequence[ImageSizes]) -> list[Sequence[int]]:
        """Which images are encoded together: all, or with crop those of one grid.

        Grids that are not for all images come in powers of two, for the sake of compilation.
        """
        grids: dict[Grid, list[int]] = {}
        for index, size in enumerate(sizes):
            grids.setdefault(self.grid(size.original), []).append(index)
        if len(grids) == 1:
            return [range(len(sizes))]
        return [
            places[start:stop]
            for places in grids.values()
            for start, stop in itertools.pairwise(_powers_of_two(len(places)))
        ]

    def _crop(self, resized: np.ndarray) -> tuple[tuple[int, int] | None, Grid | None]:
        """What is encoded of the square and the square's grid; None where it is all of it."""
        patch, side = self.compiled.config.image_encoder.patch_size, self.image_size
        height, width = (int(length) for length in resized.max(0))
        crop = crop_shape((height, width), side, patch)
        if self.padding == "square" or crop == (side, side):
            return None, None
        return crop, (side // patch, side // patch)

    def _require_images(self) -> SetImages:
        images = self._images
        if images is None:
            raise RuntimeError("no image is set: call set_image before")
        return images

    def _predict(
        self, images: SetImages, prompts: list[ImagePrompt], **options: Any
    ) -> list[Masks]:
        results: list[Masks] = [()] * len(prompts)  # pyright: ignore
        for embedding, places in zip(*images, strict=True):
            _, rows, cols, _ = embedding.features.shape
            arrays = [
                prompts[place].arrays(sizes, (4 * rows, 4 * cols))
                for place, sizes in zip(places, embedding.sizes, strict=True)
            ]
            found = self.predict_arrays(embedding, arrays, **options)
            for place, result in zip(places, found, strict=True):
                single = not prompts[place].is_batched
                results[place] = tuple(field[0] for field in result) if single else result
        return results


def _powers_of_two(count: int) -> list[int]:
    """Where pieces begin and end whose sizes are powers of two, the largest first."""
    bits = range(count.bit_length() - 1, -1, -1)
    return [0, *itertools.accumulate(1 << bit for bit in bits if count >> bit & 1)]


def check_image(image: Any) -> UInt8[np.ndarray, "height width 3"]:
    """The image as an array, if it is one that `set_image` takes.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image must be a uint8 array, got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {image.shape}"
        raise ValueError(f"image must be a uint8 array [height, width, 3], got {got}")
    if not image.size:
        raise ValueError(f"image must have pixels, got shape {image.shape}")
    return image
