"""`Sam`: the model together with its weights files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels.implementation import Implementation
from sparsesam_jax.checkpoints import native
from sparsesam_jax.checkpoints.conversion import cast, write_checkpoint
from sparsesam_jax.checkpoints.errors import few
from sparsesam_jax.checkpoints.native import TensorSpec
from sparsesam_jax.checkpoints.reading import Checkpoint, open_checkpoint
from sparsesam_jax.checkpoints.sources import locate
from sparsesam_jax.choices import Dtype, Format, Products
from sparsesam_jax.config import SamConfig, Sparsity
from sparsesam_jax.model.compiled import CompiledSam
from sparsesam_jax.model.float8_scales import filled, has_float8, set_bounds
from sparsesam_jax.model.sam import Model, SamModel


class Sam(SamModel):
    """Segment Anything and its weights files: `SamModel`, whose arguments it takes, from a file."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        sparsity: Sparsity | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        residual_dtype: DTypeLike | None = None,
        implementation: Implementation = "auto",
        remat: bool = False,
        products: Products = "dtype",
        float8_layers: Sequence[str] | None = None,
        config: SamConfig | None = None,
        check_finite: bool = True,
    ) -> Self:
        """Load weights of any format, converted in memory where it is not this project's.

        Args:
            name_or_path: `"vit_t"`, the embedded default, or a checkpoint: this project's
                safetensors, Meta's or SAM-HQ's `.pth`, or Hugging Face's folder, file or index of
                shards. PyTorch is needed for pickles only (`.pth`, `.bin`).
            sparsity: What the image encoder keeps; None is dense, SAM exactly.
            dtype: Compute dtype.
            param_dtype: Dtype of the parameters; None is the compute dtype.
            residual_dtype: As for `Sam`.
            implementation: As for `Sam`.
            remat: As for `Sam`.
            products: As for `Sam`. The weights of layers in float8 are quantised as they are read,
                from the checkpoint's own values, and not kept in any other dtype.
            float8_layers: As for `Sam`.
            config: The model's shape, for a checkpoint whose tensors do not tell it.
            check_finite: Whether weights with a NaN or an infinity are an error.

        Raises:
            ValueError: The checkpoint is missing or not one of SAM, its values are not finite or do
                not fit `param_dtype`, an argument is none of its choices, or the sparsity does not
                fit the model.
        """
        checkpoint = _open(name_or_path, config)
        abstract = cls.abstract(
            checkpoint.config,
            sparsity=sparsity,
            dtype=dtype,
            param_dtype=dtype if param_dtype is None else param_dtype,
            residual_dtype=residual_dtype,
            implementation=implementation,
            remat=remat,
            products=products,
            float8_layers=float8_layers,
        )
        model = _filled(abstract, checkpoint, check_finite=check_finite)
        set_bounds(model.image_encoder.blocks)
        return model

    @classmethod
    def decoder_from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        config: SamConfig | None = None,
        check_finite: bool = True,
    ) -> Self:
        """Load a model that only decodes: the image encoder's weights are not kept in memory.

        Args:
            name_or_path: As for `from_pretrained`; likewise all others.
            dtype: See `from_pretrained`.
            param_dtype: See `from_pretrained`.
            config: See `from_pretrained`.
            check_finite: See `from_pretrained`.

        Returns:
            A model without `image_encoder`, for `SamPredictor` and embeddings that were saved.

        Raises:
            ValueError: As `from_pretrained`.
        """
        checkpoint = _open(name_or_path, config)
        param_dtype = dtype if param_dtype is None else param_dtype
        abstract = cls.abstract(checkpoint.config, dtype=dtype, param_dtype=param_dtype)
        del abstract.image_encoder
        return _filled(abstract, checkpoint, check_finite=check_finite)

    def compiled(self) -> CompiledSam:
        """The model as compiled callables: the fast way to call it, see `CompiledSam`."""
        return CompiledSam(self)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        format: Format | None = None,
        dtype: Dtype | None = None,
    ) -> None:
        """Write the weights, whole or not at all: for `from_pretrained`, PyTorch or transformers.

        Sparsity and compute dtype are no part of a checkpoint.

        Args:
            path: What to write; a file that exists is replaced. Hugging Face's format is a folder,
                or the tensors alone where `path` ends in `.safetensors`.
            format: `"native"` (this project's), `"meta"` (a `.pth` for Meta's or SAM-HQ's code) or
                `"huggingface"`; None goes by the suffix (`.pth`, `.pt`: meta; `.safetensors`:
                native).
            dtype: Dtype of all tensors; None keeps those of the parameters.

        Raises:
            ValueError: The model is in float8, which has lost what a checkpoint holds, or has
                other parameters than its configuration says, for instance because layers were
                replaced, the format cannot have such a model, or `dtype` not
                such values.
            OSError: A file cannot be written.
        """
        if hasattr(self, "image_encoder") and has_float8(self.image_encoder.blocks):
            raise ValueError(
                'the model must have products="dtype" to be saved, got "float8", whose weights are '
                "rounded; save the model it was made of, and load that with float8 again"
            )
        leaves = {_name(key): leaf for key, leaf in nnx.to_flat_state(nnx.state(self))}
        found = {name: _spec(leaf.get_value()) for name, leaf in leaves.items()}
        shapes = native.parameter_shapes(self.config)
        problems = native.mismatches({key: spec.shape for key, spec in shapes.items()}, found)
        if problems:
            raise ValueError(
                "the model must have the parameters that its config says, but has "
                f"{'; '.join(problems)}; a layer that was replaced, as by LoRA, must be merged "
                "into SAM's own first"
            )
        write_checkpoint(
            path,
            self.config,
            {name: found[name] for name in shapes},
            lambda name: np.asarray(leaves[name].get_value()),
            to=format,
            dtype=dtype,
        )


def _open(name_or_path: str | os.PathLike[str], config: SamConfig | None) -> Checkpoint:
    # The parameters are made another dtype in any case.
    dtypes = (*native.DTYPES, "float64")
    return open_checkpoint(locate(name_or_path), config=config, dtypes=dtypes)


def _filled(abstract: Model, checkpoint: Checkpoint, *, check_finite: bool) -> Model:
    """A model of shapes with a checkpoint's values for them."""
    not_finite = []

    def load(name: str, dtype: str) -> np.ndarray:
        array = cast(checkpoint.load(name), dtype, name)
        if check_finite and not np.isfinite(array).all():
            not_finite.append(name)
        return array

    model = filled(abstract, load)
    if not_finite:
        raise ValueError(
            f"{checkpoint.path}: weights must be finite, got NaN or an infinity in "
            f"{few(not_finite)}; check_finite=False loads them as they are"
        )
    return model


def _name(key: tuple[Any, ...]) -> str:
    return ".".join(map(str, key))


def _spec(value: Any) -> TensorSpec:
    """Shape and dtype; of what is no array, such as a counter, its type."""
    dtype = getattr(value, "dtype", type(value).__name__)
    return TensorSpec(tuple(getattr(value, "shape", ())), str(dtype))
