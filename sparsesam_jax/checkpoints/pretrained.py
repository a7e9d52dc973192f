"""`Sam`: the model together with its weights files."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Self

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels.implementation import Implementation
from sparsesam_jax.checkpoints import native
from sparsesam_jax.config import Sparsity
from sparsesam_jax.model.sam import SamModel

EMBEDDED_WEIGHTS = ("vit_t",)


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
    ) -> Self:
        """Load converted weights.

        Args:
            name_or_path: `"vit_t"`, the embedded default, or a file that `sparsesam convert` wrote.
            sparsity: What the image encoder keeps; None is dense, SAM exactly.
            dtype: Compute dtype.
            param_dtype: Dtype of the parameters; None is the compute dtype.
            residual_dtype: As for `Sam`.
            implementation: As for `Sam`.

        Raises:
            ValueError: The file is missing or holds no converted weights, an argument is none of
                its choices, or the sparsity does not fit the model.
        """
        path = locate(name_or_path)
        config, arrays = native.read(path)
        abstract = cls.abstract(
            config,
            sparsity=sparsity,
            dtype=dtype,
            param_dtype=dtype if param_dtype is None else param_dtype,
            residual_dtype=residual_dtype,
            implementation=implementation,
        )
        graphdef, state = nnx.split(abstract)
        leaves = {".".join(map(str, key)): (key, leaf) for key, leaf in nnx.to_flat_state(state)}
        problems = native.mismatches(
            {name: leaf.shape for name, (_, leaf) in leaves.items()},
            {name: native.TensorSpec(a.shape, a.dtype.name) for name, a in arrays.items()},
        )
        if problems:
            raise ValueError(
                f"{path} must hold the parameters of its config: {'; '.join(problems)}"
            )
        loaded = [
            (key, leaf.replace(jnp.asarray(arrays[name], leaf.dtype)))
            for name, (key, leaf) in leaves.items()
        ]
        return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of converted weights that a name or a path means.

    Raises:
        ValueError: It is neither the name of embedded weights nor an existing file.
    """
    if name_or_path in EMBEDDED_WEIGHTS:
        return Path(str(files("sparsesam_jax") / "weights" / f"{name_or_path}.safetensors"))
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"weights must be one of the embedded ({', '.join(EMBEDDED_WEIGHTS)}) or a file that "
            f"`sparsesam convert` wrote, got {os.fspath(name_or_path)!r}, which is neither"
        )
    return path
