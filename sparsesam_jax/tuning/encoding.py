"""The image encoder for gradients: blocks that repeat are compiled once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsesam_jax.model.program import Program
from sparsesam_jax.model.sam import ImageEmbedding, SamModel
from sparsesam_jax.sparsity.plan import Rankings, encoder_plan

_KEPT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def encode(sam: SamModel, pixels: Float[Array, "B height width 3"]) -> ImageEmbedding:
    """`SamModel.encode`, as a loop over equal groups of blocks where the encoder has such.

    SAM's encoders repeat some windowed blocks and a global one. A step's program then holds one
    group and its gradient instead of all, and compiles in a fraction of the time. Blocks that rank
    tokens for others, as with a sparsity, and SAM-HQ, which looks between them, are left as they
    are.
    """
    encoder = sam.image_encoder
    programs = [Program.of(block) for block in encoder.blocks]
    period = _period([program.graph for program in programs])
    if encoder.sparsity is not None or sam.config.hq or period == len(programs):
        return sam.encode(pixels)
    x = encoder.embed(pixels)
    plans = encoder_plan(encoder.config, None, (x.shape[1], x.shape[2]), encoder.implementation)
    leaves = [
        jax.tree.map(lambda *each: jnp.stack(each), *(p.leaves for p in programs[place::period]))
        for place in range(period)
    ]

    def group(x: Array, leaves: list[list[Array]]) -> tuple[Array, None]:
        for program, plan, arrays in zip(programs, plans, leaves, strict=False):
            x, _ = program.graph.merge(arrays)(x, plan, Rankings())
        return x, None

    if encoder.remat:  # all but products with weights is computed again
        group = jax.checkpoint(group, policy=_KEPT)
    x, _ = jax.lax.scan(group, x, leaves)
    return ImageEmbedding(encoder.neck_features(x), None)


def _period(kinds: list[object]) -> int:
    """After how many blocks they repeat to the end; the number of blocks where they do not."""
    count = len(kinds)
    divisors = (p for p in range(1, count + 1) if count % p == 0)
    return next(p for p in divisors if kinds[p:] == kinds[: count - p])
