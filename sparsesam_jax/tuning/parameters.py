"""Which parameters are tuned: by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array

from sparsesam_jax.model.program import Graph, Program
from sparsesam_jax.model.sam import SamModel

# Short names for what is tuned most.
PATTERNS = {
    "all": ".*",
    "decoder": "(mask_decoder|prompt_encoder)[.].*",
    "encoder": "image_encoder[.].*",
    "neck": "image_encoder[.]neck[.].*",
    "lora": ".*[.]lora[.].*",
}
# Matrices decay; norms, biases, learned vectors and position tables do not.
_DECAYED = re.compile(r".*(kernel|lora_a|lora_b)")


class Parts(NamedTuple):
    """A model as structure, tuned parameters and everything else, by name.

    Attributes:
        graph: Its structure.
        names: Of all arrays, in the structure's order.
        tuned: Parameters that an optimiser changes.
        fixed: All other arrays.
    """

    graph: Graph
    names: tuple[str, ...]
    tuned: dict[str, Array]
    fixed: dict[str, Array]

    def model(self, tuned: dict[str, Array], fixed: dict[str, Array] | None = None) -> Any:
        """The model with these parameters; works under `jax.jit` and `jax.grad`."""
        arrays = tuned | (self.fixed if fixed is None else fixed)
        return self.graph.merge([arrays[name] for name in self.names])


def take_apart(model: SamModel, patterns: Sequence[str]) -> Parts:
    """Split a model by what is tuned.

    Args:
        model: The model.
        patterns: Regular expressions of whole names, such as `image_encoder[.]neck[.].*`, or keys
            of `PATTERNS`.

    Raises:
        ValueError: A pattern is no regular expression or matches no parameter.
    """
    tuned, fixed, expressions = {}, {}, {}
    for pattern in patterns:
        try:
            expressions[pattern] = re.compile(PATTERNS.get(pattern, pattern))
        except re.error as error:
            expected = f"{', '.join(PATTERNS)} or regular expressions"
            raise ValueError(f"train must be {expected}, got {pattern!r}: {error}") from error
    unused, names = set(expressions), []
    for key, leaf in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, key))
        names.append(name)
        matching = {p for p, regex in expressions.items() if regex.fullmatch(name)}
        is_tuned = isinstance(leaf, nnx.Param) and matching
        unused -= matching if is_tuned else set()
        (tuned if is_tuned else fixed)[name] = leaf.get_value()
    if unused:
        raise ValueError(f"train must match parameters, got {', '.join(sorted(unused))}")
    return Parts(Program.of(model).graph, tuple(names), tuned, fixed)


def decayed(parameters: dict[str, Array]) -> dict[str, bool]:
    """Which parameters weight decay applies to."""
    return {name: bool(_DECAYED.fullmatch(name)) for name in parameters}
