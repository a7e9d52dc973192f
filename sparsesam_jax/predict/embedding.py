"""Embeddings of images as things: taken from a predictor, saved, loaded, and set in another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

from sparsesam_jax.checkpoints import native
from sparsesam_jax.choices import Products
from sparsesam_jax.config import Grid, SamConfig
from sparsesam_jax.model.sam import ImageEmbedding
from sparsesam_jax.predict.prompt_arrays import ImageSizes

FORMAT = "sparsesam_jax.embedding"


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """What a predictor knows of the image, or of the batch of images, that is set.

    Attributes:
        features: The image encoder's output, [B, Gh, Gw, C].
        early_features: Output of the first global block, [B, Gh, Gw, d]; SAM-HQ only, else None.
        sizes: Each image's size as it came and as it lies in the padded input.
        fingerprint: Of the decoder that these features are for, and of how the encoder multiplied,
            see `fingerprint`.
        frame: Rows and columns of the padded square's features, of which these are the top left
            part; None where they are all of it.
    """

    features: Float[Array | np.ndarray, "B Gh Gw C"]
    early_features: Float[Array | np.ndarray, "B Gh Gw d"] | None
    sizes: tuple[ImageSizes, ...]
    fingerprint: str
    frame: Grid | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 4 or len(self.features) != len(self.sizes):
            raise ValueError(
                f"features must be [{len(self.sizes)}, rows, columns, channels], one a size, "
                f"got shape {self.features.shape}"
            )

    @property
    def arrays(self) -> ImageEmbedding:
        """The features as the decoder takes them."""
        return ImageEmbedding(self.features, self.early_features)  # pyright: ignore

    def is_for(self, fingerprint: str) -> bool:
        """Whether the predictor's decoder takes these features, by encoders of either kind."""
        own, other = (text.partition("-")[0] for text in (self.fingerprint, fingerprint))
        return own == other

    def __getitem__(self, index: int) -> Embedding:
        """The embedding of one of the images."""
        features, early = (None if x is None else _image(x, index) for x in self.arrays)
        assert features is not None
        return dataclasses.replace(
            self, features=features, early_features=early, sizes=(self.sizes[index],)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the embedding as a safetensors file, whole or not at all; a file is replaced.

        Raises:
            OSError: The file cannot be written.
        """
        arrays = {name: x for name, x in self.arrays._asdict().items() if x is not None}
        specs = {
            name: native.TensorSpec(tuple(x.shape), x.dtype.name) for name, x in arrays.items()
        }
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "sizes": json.dumps(self.sizes),
            "frame": json.dumps(self.frame),
        }
        native.write_safetensors(path, metadata, specs, lambda name: np.asarray(arrays[name]))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Embedding:
        """Read what `save` wrote; no model is needed for it.

        Raises:
            ValueError: The file is missing, broken, or no embedding.
        """
        if not Path(path).is_file():
            raise ValueError(f"path must be a file, got {os.fspath(path)!r}, which is none")
        metadata, tensors = native.inspect(path)
        if metadata.get("format") != FORMAT or "features" not in tensors:
            got = metadata.get("format")
            raise ValueError(f"{path} must be a file that Embedding.save wrote, got format {got!r}")
        try:
            sizes = [ImageSizes(*map(tuple, pair)) for pair in json.loads(metadata["sizes"])]
            fingerprint, frame = metadata["fingerprint"], json.loads(metadata["frame"])
            frame = None if frame is None else (int(frame[0]), int(frame[1]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} must have sizes, a fingerprint and a frame, got none"
            ) from error
        features, early = (
            native.load_tensor(path, name) if name in tensors else None
            for name in ImageEmbedding._fields
        )
        assert features is not None
        return cls(features, early, tuple(sizes), fingerprint, frame)


@jax.jit
def _image(x: Array, index: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index, 1)


def fingerprint(
    config: SamConfig, decoder_leaves: Sequence[Array], products: Products = "dtype"
) -> str:
    """A text that tells decoders apart: of the configuration and of the decoder's parameters.

    The encoder's parameters are not in it, so that it can be had without them, and so that
    features at any density fit. Where the encoder multiplies in float8, `-float8` stands behind it,
    so that such features are told apart from others; a decoder takes both. Parameters count as
    bfloat16, so that a model fits itself in float32 and in bfloat16; float16 parameters fit only
    those in float16.
    """
    digest = hashlib.sha256(config.to_json().encode())
    for leaf in jax.device_get(list(decoder_leaves)):
        digest.update(np.asarray(leaf).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()[:32] + ("" if products == "dtype" else f"-{products}")
