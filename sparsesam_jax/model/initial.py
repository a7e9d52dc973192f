"""Initial values of parameters, drawn without a compilation a shape.

JAX compiles a draw for every shape that it is asked for, and a SAM has over fifty: constructing a
toy took many seconds. Here all draws are chunks of one shape, put together by numpy. Under
`jax.jit` the same keys give the same values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array

Initializer = Callable[..., Array]  # of a key, a shape and a dtype

_CHUNK = 1 << 16  # numbers in a draw
_TRUNCATED_STD = 0.87962566103423978  # of a standard normal cut off at two deviations


def constant(value: float) -> Initializer:
    """Every parameter has this value."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        del key
        return jnp.asarray(np.full(shape, value, dtype))

    return init


def normal(std: float) -> Initializer:
    """A normal distribution of mean 0."""
    return _drawn(std, truncated=False)


def lecun_normal(fan_in: int) -> Initializer:
    """A normal distribution of variance `1 / fan_in` (LeCun 1998), cut off at two deviations."""
    return _drawn(fan_in**-0.5 / _TRUNCATED_STD, truncated=True)


def _drawn(std: float, *, truncated: bool) -> Initializer:
    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        size = math.prod(shape)
        chunks = -(-size // _CHUNK)
        if isinstance(key, Tracer):
            draws = jax.vmap(lambda i: _draw(key, i, truncated))(jnp.arange(chunks))
            return (draws.ravel()[:size].reshape(shape) * std).astype(dtype)
        drawn = [np.asarray(_draw(key, np.int32(i), truncated)) for i in range(chunks)]
        values = np.concatenate([np.zeros(0, np.float32), *drawn])[:size].reshape(shape)
        return jnp.asarray((values * np.float32(std)).astype(dtype))

    return init


@functools.partial(jax.jit, static_argnums=2)
def _draw(key: Array, index: Array | np.int32, truncated: bool) -> Array:
    key = jax.random.fold_in(key, index)
    if truncated:
        return jax.random.truncated_normal(key, -2.0, 2.0, (_CHUNK,))
    return jax.random.normal(key, (_CHUNK,))
