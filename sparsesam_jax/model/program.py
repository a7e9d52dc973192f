"""A model taken apart for `jax.jit`: a static graph and a flat list of its arrays.

A list of arrays is what JAX takes fastest. The graph is hashed once, for hashing takes as long as
many a kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array


class Graph:
    """A model's structure, hashable: a static argument of a jitted function."""

    def __init__(self, graphdef: nnx.GraphDef, tree: Any):
        self._parts = (graphdef, tree)
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Graph) and self._parts == other._parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Graph, self._parts  # another process hashes texts to other numbers

    def merge(self, leaves: list[Array]) -> Any:
        """The model with these arrays."""
        graphdef, tree = self._parts
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


class Program(NamedTuple):
    """A model's structure and its arrays."""

    graph: Graph
    leaves: list[Array]

    @classmethod
    def of(cls, model: nnx.Module) -> Program:
        """Take a model apart; its arrays are those of now."""
        graphdef, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)
        return cls(Graph(graphdef, tree), leaves)
