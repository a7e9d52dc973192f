"""Says where NaN in a prediction comes from."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsesam_jax.model.sam import SamModel


def check_finite(sam: SamModel, *predicted: np.ndarray) -> None:
    """Raise ValueError if what a model predicted holds NaN or an infinity.

    The message names the first of the model's parameters that does. Parameters are only looked at
    where a prediction is wrong, so that a good one costs nothing.
    """
    if all(np.isfinite(values).all() for values in predicted):
        return
    for path, parameter in nnx.to_flat_state(nnx.state(sam, nnx.Param)):
        if not bool(jnp.isfinite(parameter[...]).all()):
            name = ".".join(map(str, path))
            raise ValueError(f"weights must be finite, got NaN or an infinity in {name}")
    dtype = sam.image_encoder.dtypes.compute
    raise ValueError(
        f"masks must be finite, got NaN or an infinity in {np.dtype(dtype).name}; all weights are "
        "finite, so a wider dtype may do"
    )
