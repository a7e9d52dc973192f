"""`prepare` and `launch`, which every kernel has: what calls share, and what launches."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    gather_norm_kernel,
    layer_norm,
    matmul_kernel,
    projection,
    relative_position,
    routed_mlp,
    stripe_attention,
    tile_position,
    window_attention,
)
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.implementation import JAX_SUPPORTS_MOSAIC_GPU
from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.tiles import Tiling

needs_mosaic = pytest.mark.skipif(
    not JAX_SUPPORTS_MOSAIC_GPU, reason="Mosaic GPU needs jax >= 0.11; its layout is asked for"
)


def zeros(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A kernel's arguments; how many kernels `launch` runs, and `prepare`."""

    module: ModuleType
    arguments: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    launched: int = 1
    prepared: int = 0

    def prepare(self, *arguments: Any) -> tuple[Any, Any]:
        return self.module.prepare(*arguments, **self.options)


x, vector, square = zeros(2, 128, 64), zeros(64), zeros(64, 64)
qkv, table = zeros(2, 64, 64, 3, 4, 64), zeros(64, 64, 64)
sequence = jnp.tile(jnp.arange(4096, dtype=jnp.int32), (2, 1))
rows, index = jnp.arange(8, dtype=jnp.int32), zeros(2, 24, dtype=jnp.int32)
weights = MLPWeights(vector, vector, square, vector, square, vector)
layout = BlockLayout.a_shape(4096, 0.3)
one_hots = dict(layout=layout, position_bias="xla")
product = dict(epilogue="add", config=matmul_kernel.Config(tile_n=64))
CALLS = {
    "gather_norm": Call(module=gather_norm_kernel, arguments=(x[0], vector, vector, rows)),
    "layer_norm": Call(module=layer_norm, arguments=(x, vector, vector)),
    "matmul": Call(
        module=matmul_kernel, arguments=(x[0], square, vector, None, x[1]), options=product
    ),
    "projection": Call(module=projection, arguments=(x, square, vector)),
    "mlp": Call(module=routed_mlp, arguments=(x, None, weights), launched=3),
    "routed mlp": Call(module=routed_mlp, arguments=(x, index, weights), launched=3),
    "relative_position": Call(module=relative_position, arguments=(qkv, table, table)),
    "tile_position": Call(
        module=tile_position,
        arguments=(qkv, table, table),
        options=dict(tiling=Tiling(64, 64, 1)),
    ),
    "stripe": Call(
        module=stripe_attention,
        arguments=(qkv, table, table),
        options=dict(layout=BlockLayout.dense(4096)),
        prepared=1,
    ),
    "stripe, one-hots by XLA": Call(
        module=stripe_attention, arguments=(qkv, table, table, sequence), options=one_hots
    ),
    "stripe without bias": Call(
        module=stripe_attention,
        arguments=(qkv, None, None, sequence),
        options=dict(layout=layout),
    ),
    "window": Call(
        module=window_attention,
        arguments=(qkv, table[:, :14], table[:, :14]),
        options=dict(window_size=14),
        prepared=1,
    ),
}


def lowered(function: Any, arguments: Any) -> str:
    """The program for CUDA; of several launches with the same statics it has one kernel."""
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
@pytest.mark.parametrize("name", CALLS)
def test_prepare_does_not_launch(name):
    call = CALLS[name]
    program = lowered(lambda *arguments: call.prepare(*arguments)[1], call.arguments)
    assert program.count("@mosaic_gpu_v2") == call.prepared  # the kernel of the position bias


@needs_mosaic
@pytest.mark.parametrize("name", CALLS)
def test_layers_share_a_kernel(name):
    call = CALLS[name]

    def two_layers(*arguments):
        outputs = []
        for _ in range(2):
            statics, operands = call.prepare(*arguments)
            outputs.append(call.module.launch(statics, *operands))
        return outputs

    program = lowered(two_layers, call.arguments)
    assert program.count("@mosaic_gpu_v2") == call.launched + call.prepared


def test_stripe_attention_is_prepared_for_some_images():
    options = dict(layout=layout, position_bias="xla")
    prepare, images = stripe_attention.prepare, range(1, 2)
    tiles = np.arange(4096, dtype=np.int32).reshape(8, 8, 8, 8).swapaxes(1, 2).ravel()
    arguments = (qkv, table, table)
    statics, (first, view, operands, _) = prepare(*arguments, tiles, images=images, **options)
    # The kernel reads its image of the whole map, and writes it to its place in the batch.
    assert not statics.gathered and (statics.num_images, statics.batch_size) == (1, 2)
    assert first.tolist() == [1] and len(view) == 2 * 64
    assert len(operands.rel_h) == 4 * 64  # heads and tiles of the one image
    statics, (_, view, operands, _) = prepare(*arguments, sequence, images=images, **options)
    # Of a sequence it reads what was gathered for it alone.
    assert statics.gathered and len(view) == 512 and len(operands.onehot) == 1
