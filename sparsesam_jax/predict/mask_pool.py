"""Low-resolution masks that are kept of many decoder calls, until it is known which survive."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

POOL = 256  # Masks in one array of the device: 64 MiB at 1024 pixels.
AT_ONCE = 32  # Masks that are taken at once, at most.


class HostPool:
    """Masks as arrays of the host."""

    at_once = AT_ONCE

    def keep(self, low_res: Float[Array, "*batch h w"], which: Int[np.ndarray, " N"]) -> list[Any]:
        """Keep some masks of a call, where its leading axes are counted as one.

        Returns:
            A handle a mask, for `take`.
        """
        planes = np.asarray(low_res).reshape(-1, *low_res.shape[-2:])
        return [planes[index].copy() for index in which]

    def take(self, handles: Sequence[Any]) -> Float[np.ndarray, "N h w"]:
        """The masks of these handles."""
        return np.stack(handles)


class DevicePool:
    """Masks in arrays of one size on the device, so that any number of them shares two programs."""

    at_once = AT_ONCE

    def __init__(self) -> None:
        self._pools: list[Array] = []
        self._open: dict[tuple[int, ...], tuple[int, int]] = {}  # a shape's last pool, its masks

    def keep(
        self, low_res: Float[Array, "*batch h w"], which: Int[np.ndarray, " N"]
    ) -> list[tuple[int, int]]:
        """As `HostPool.keep`."""
        handles = []
        shape = low_res.shape[-2:]
        while len(handles) < len(which):
            pool, used = self._open.get(shape, (0, POOL))
            if used == POOL:
                pool, used = len(self._pools), 0
                self._pools.append(jnp.zeros((POOL, *shape), low_res.dtype))
            part = which[len(handles) : len(handles) + POOL - used]
            source, target = np.zeros(POOL, np.int32), np.full(POOL, POOL, np.int32)
            source[: len(part)], target[: len(part)] = part, used + np.arange(len(part))
            self._pools[pool] = _put(self._pools[pool], low_res, source, target)
            handles += [(pool, used + place) for place in range(len(part))]
            self._open[shape] = (pool, used + len(part))
        return handles

    def take(self, handles: Sequence[tuple[int, int]]) -> Float[Array, "at_once h w"]:
        """The masks of up to `at_once` handles of one shape; behind them are others."""
        found = None
        for number in sorted({pool for pool, _ in handles}):
            pool = self._pools[number]
            source = np.full(self.at_once, POOL, np.int32)
            for place, (owner, index) in enumerate(handles):
                source[place] = index if owner == number else POOL
            found = jnp.zeros((self.at_once, *pool.shape[1:])) if found is None else found
            found = _get(found, pool, source)
        assert found is not None
        return found


@functools.partial(jax.jit, donate_argnums=0)
def _put(pool: Array, low_res: Array, source: Array, target: Array) -> Array:
    masks = low_res.reshape(-1, *low_res.shape[-2:])[source]
    return pool.at[target].set(masks, mode="drop")


@functools.partial(jax.jit, donate_argnums=0)
def _get(found: Array, pool: Array, source: Array) -> Array:
    masks = pool.at[source].get(mode="clip")
    return jnp.where((source < len(pool))[:, None, None], masks, found)
