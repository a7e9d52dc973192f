"""A model as compiled callables: its parameters are taken apart once, not at every call.

`nnx.jit(lambda sam, x: sam(x))` walks through the model's hundreds of objects in Python at every
call, which takes longer than a small photo's encoder does on a GPU. Here a call hands JAX the flat
list of arrays that it takes fastest, and the model's structure as one static argument.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num

from sparsesam_jax.choices import Padding
from sparsesam_jax.config import Grid
from sparsesam_jax.model.blocks import AttentionTables
from sparsesam_jax.model.program import Graph, Program
from sparsesam_jax.model.sam import ImageEmbedding, Labels, Prediction, SamModel
from sparsesam_jax.model.transforms import normalise


class CompiledSam:
    """`encode`, `decode` and the whole of a model, each compiled once for every shape.

    The parameters are those that the model has when this is made. After an update of the model,
    make it anew: that is cheap, and models of one structure share their compilations.

    ```python
    run = sam.compiled()
    embedding = run.encode(pixels)
    low_res, iou = run.decode(embedding, points, labels)
    masks, iou, low_res = run(images, points, labels)
    ```

    It pickles, deep-copies, and may be shared by threads.

    Args:
        sam: The model. One without an image encoder only decodes.

    Attributes:
        config: The model's configuration.
        dtype: The decoder's compute dtype.
    """

    def __init__(self, sam: SamModel):
        self.config = sam.config
        self.dtype = sam.mask_decoder.dtypes.compute
        decoder = _without(sam, "image_encoder")
        # Apart, so that models that differ in the encoder's sparsity share the decoder's program.
        self._decoder = Program.of(decoder)
        self._encoder = self._whole = None
        if hasattr(sam, "image_encoder"):
            self._encoder = Program.of(_without(sam, "prompt_encoder", "mask_decoder"))
            self._whole = Program.of(sam)
        self._tables: dict[tuple[Grid, Grid | None], tuple[AttentionTables, ...]] = {}
        self._mesh: Mesh | None = None

    @property
    def has_encoder(self) -> bool:
        """Whether images can be encoded, not only decoded."""
        return self._encoder is not None

    @property
    def decoder_leaves(self) -> list[Array]:
        """The parameters of the prompt encoder and of the mask decoder."""
        return self._decoder.leaves

    def without_encoder(self) -> CompiledSam:
        """The same without the image encoder's parameters."""
        decoder = object.__new__(CompiledSam)
        decoder.__dict__.update(self.__dict__, _encoder=None, _whole=None, _tables={})
        return decoder

    def on_devices(self, devices: Sequence[Any]) -> CompiledSam:
        """The same, whose `encode_padded` splits a batch over devices: as many images on each.

        Every device computes what a single one would of its images alone, the kernels included.
        """
        other = object.__new__(CompiledSam)
        mesh = Mesh(np.array(devices), ("batch",))
        program = self._require_encoder()
        leaves = jax.device_put(program.leaves, NamedSharding(mesh, PartitionSpec()))
        encoder = program._replace(leaves=leaves)
        other.__dict__.update(self.__dict__, _encoder=encoder, _tables={}, _mesh=mesh)
        return other

    def encode(
        self, pixels: Float[Array | np.ndarray, "B height width 3"], frame: Grid | None = None
    ) -> ImageEmbedding:
        """`SamModel.encode`: normalised, padded images to what the decoder needs of them."""
        program, tables = self._require_encoder(), self._tables_of(pixels.shape[1:3], frame)
        return _encode(program.graph, frame, program.leaves, tables, pixels)

    def encode_padded(
        self,
        padded: Sequence[Num[Array | np.ndarray, "height width 3"]]
        | Num[np.ndarray, "B height width 3"],
        sizes: Int[np.ndarray, "B 2"],
        crop: tuple[int, int] | None = None,
    ) -> ImageEmbedding:
        """The same for images of 0 to 255, padded but not normalised; sizes without padding.

        Args:
            padded: The images, or one array of them.
            sizes: Height and width of each without its padding.
            crop: Height and width of what is encoded of the padded images, whose frame it keeps;
                None is all.
        """
        program, whole = self._require_encoder(), (padded[0].shape[0], padded[0].shape[1])
        frame = None if crop is None else self._grid(whole)
        tables = self._tables_of(crop or whole, frame)
        statics = (program.graph, frame, crop)
        if self._mesh is None:
            images = padded if isinstance(padded, np.ndarray) else list(padded)
            return _encode_padded(*statics, program.leaves, tables, images, sizes)
        batch = NamedSharding(self._mesh, PartitionSpec("batch"))
        images, sizes = jax.device_put((np.asarray(padded), sizes), batch)
        return _encode_split(self._mesh, *statics, program.leaves, tables, images, sizes)

    def decode(
        self,
        embedding: ImageEmbedding,
        points: Float[Array | np.ndarray, "B P T 2"],
        labels: Labels | Num[np.ndarray, "B P T"] | Bool[np.ndarray, "B P T"],
        mask_input: Float[Array | np.ndarray, "B P h w"] | None = None,
        *,
        first: int | None = None,
        frame: Grid | None = None,
        multimask_output: bool = True,
        hq_token_only: bool = False,
    ) -> tuple[Float[Array, "B P K h w"], Float[Array, "B P K"]]:
        """`SamModel.decode`: prompts in the padded input's frame to low-resolution masks.

        Args:
            embedding: What `encode` returned.
            points: As for `SamModel.decode`; likewise the next two.
            labels: See `SamModel.decode`.
            mask_input: See `SamModel.decode`.
            first: Where the prompts are for fewer images than the embedding has: the first of
                them. None takes all images.
            frame: The one that `encode` was given.
            multimask_output: See `SamModel.decode`.
            hq_token_only: See `SamModel.decode`.
        """
        return _decode(
            self._decoder.graph,
            self._decoder.leaves,
            embedding,
            points,
            labels,
            mask_input,
            None if first is None else np.int32(first),
            frame=frame,
            multimask_output=multimask_output,
            hq_token_only=hq_token_only,
        )

    def __call__(
        self,
        images: Num[Array | np.ndarray, "B height width 3"],
        points: Float[Array | np.ndarray, "B P T 2"],
        labels: Labels | Num[np.ndarray, "B P T"] | Bool[np.ndarray, "B P T"],
        mask_input: Float[Array | np.ndarray, "B P h w"] | None = None,
        *,
        image_size: int | None = None,
        padding: Padding = "square",
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> Prediction:
        """`SamModel.__call__`: photos of one size and prompts to masks, compiled per photo size."""
        self._require_encoder()
        assert self._whole is not None
        return _predict(
            self._whole.graph,
            self._whole.leaves,
            images,
            points,
            labels,
            mask_input,
            image_size=image_size,
            padding=padding,
            multimask_output=multimask_output,
            return_logits=return_logits,
        )

    def _require_encoder(self) -> Program:
        if self._encoder is None:
            raise RuntimeError("this model has no image encoder: only embeddings can be decoded")
        return self._encoder

    def _grid(self, size: tuple[int, ...]) -> Grid:
        patch = self.config.image_encoder.patch_size
        return size[0] // patch, size[1] // patch

    def _tables_of(self, size: tuple[int, ...], frame: Grid | None) -> tuple[AttentionTables, ...]:
        """What the encoder derives from its weights for images of this size, made once."""
        key = (self._grid(size), frame)
        if key not in self._tables:
            program = self._require_encoder()
            leaves, mesh = program.leaves, self._mesh
            if mesh is not None:  # made on one device: kernels are not split by themselves
                leaves = jax.device_put(leaves, mesh.devices[0])
            tables = _encoder_tables(program.graph, leaves, *key)
            if mesh is not None:
                tables = jax.device_put(tables, NamedSharding(mesh, PartitionSpec()))
            self._tables[key] = tables
        return self._tables[key]


def _without(model: SamModel, *parts: str) -> SamModel:
    """The model without some of its parts, sharing the parameters of the others."""
    model = nnx.merge(*nnx.split(model))
    for part in parts:
        if hasattr(model, part):
            delattr(model, part)
    return model


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _encoder_tables(
    graph: Graph, leaves: list[Array], grid: Grid, frame: Grid | None
) -> tuple[AttentionTables, ...]:
    return graph.merge(leaves).image_encoder.tables(grid, frame)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(
    graph: Graph,
    frame: Grid | None,
    leaves: list[Array],
    tables: tuple[AttentionTables, ...],
    pixels: Array,
) -> ImageEmbedding:
    return graph.merge(leaves).encode(pixels, tables, frame)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode_padded(
    graph: Graph,
    frame: Grid | None,
    crop: tuple[int, int] | None,
    leaves: list[Array],
    tables: tuple[AttentionTables, ...],
    padded: list[Array] | Array,
    sizes: Array,
) -> ImageEmbedding:
    images = jnp.stack(padded) if isinstance(padded, list) else padded
    return _encode_images(graph, frame, crop, leaves, tables, images, sizes)


def _encode_images(
    graph: Graph,
    frame: Grid | None,
    crop: tuple[int, int] | None,
    leaves: list[Array],
    tables: tuple[AttentionTables, ...],
    images: Array,
    sizes: Array,
) -> ImageEmbedding:
    if crop is not None:
        images = images[:, : crop[0], : crop[1]]
    return graph.merge(leaves).encode(normalise(images, sizes), tables, frame)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _encode_split(
    mesh: Mesh,
    graph: Graph,
    frame: Grid | None,
    crop: tuple[int, int] | None,
    *arrays: Any,
) -> ImageEmbedding:
    whole, batch = PartitionSpec(), PartitionSpec("batch")
    return jax.shard_map(
        functools.partial(_encode_images, graph, frame, crop),
        mesh=mesh,
        in_specs=(whole, whole, batch, batch),
        out_specs=batch,
        check_vma=False,  # which the kernels do not say
    )(*arrays)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("frame", "multimask_output", "hq_token_only")
)
def _decode(
    graph: Graph,
    leaves: list[Array],
    embedding: ImageEmbedding,
    points: Array,
    labels: Array,
    mask_input: Array | None,
    first: Array | None,
    *,
    frame: Grid | None,
    multimask_output: bool,
    hq_token_only: bool,
) -> tuple[Array, Array]:
    if first is not None:
        images = points.shape[0]
        embedding = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, images), embedding
        )
    low_res, iou = graph.merge(leaves).decode(
        embedding,
        points,
        labels,
        mask_input,
        multimask_output=multimask_output,
        hq_token_only=hq_token_only,
        frame=frame,
    )
    return low_res.astype(jnp.float32), iou


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("image_size", "padding", "multimask_output", "return_logits"),
)
def _predict(
    graph: Graph,
    leaves: list[Array],
    images: Array,
    points: Array,
    labels: Array,
    mask_input: Array | None,
    **options: Any,
) -> Prediction:
    return graph.merge(leaves)(images, points, labels, mask_input, **options)
